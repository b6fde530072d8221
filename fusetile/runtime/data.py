"""Training data, batch by batch. A node reads only the boxes that its feeds want. The next step's are read while this
one computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from fusetile.box import slices, volume
from fusetile.philox import permutation
from fusetile.program import Buffer, Feed, Program, Routine
from fusetile.runtime.augment import SAME, Augmentation, Change
from fusetile.runtime.samples import Samples, Scaling
from fusetile.runtime.storage import Place

_AHEAD_seconds = 0.0005  # what is read in less is not worth waking a thread for

Values = list[np.ndarray | None]
"""Per feed of samples, what it gets of a batch."""


class Data:
    """The samples of the feeds of a program, or of one of its routines. Raises UserError if anything about them is
    wrong."""

    def __init__(
        self,
        path: Path,
        program: Program,
        *,
        shuffle: bool,
        scaling: Scaling | None = None,
        augmentation: Augmentation | None = None,
        routine: Routine | None = None,
    ) -> None:
        self._program, self._shuffle, self._routine = program, shuffle, routine or program.training
        self._scaling, self._augmentation = scaling or Scaling(), augmentation or Augmentation()
        self._feeds = [feed for feed in self._routine.feeds if feed.role in ("input", "target")]
        least = program.batch * program.accumulate if routine is None else 1
        samples = Samples(path, self._feeds, least, self._scaling, self._augmentation)
        self._columns, self.count = samples.columns, samples.count
        self._epoch, self._order = -1, np.arange(self.count)
        self._places: dict[Buffer, Place] = {}  # of the feeds, in the arena that is being filled
        self._arena: np.ndarray | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._read_seconds = 0.0  # what the last batch took
        self._ahead_key: int | bytes = 0
        self._ahead: Future[Values] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps; the rest of an epoch is dropped."""
        return self.count // (self._program.batch * self._program.accumulate)

    def rows(self, batch: int) -> np.ndarray:
        """Indices of the samples of a batch of the training (from 1)."""
        epoch, position = divmod(batch - 1, self.steps_per_epoch * self._program.accumulate)
        if self._shuffle and epoch != self._epoch:
            self._epoch = epoch
            self._order = permutation(seed=self._program.seed, epoch=epoch, count=self.count)
        return self._order[position * self._program.batch : (position + 1) * self._program.batch]

    def fill(self, arena: np.ndarray, batch: int, *, total: int, routine: Routine | None = None) -> None:
        """Write the feeds of a batch of the training, which has `total` steps; those of another routine, if it is
        given, that reads the same samples."""
        step, place = divmod(batch - 1, self._program.accumulate)
        controls = {"step": batch, "kept": min(place, 1), **self._program.rates.controls(step + 1, total)}
        self._write(arena, (routine or self._routine).feeds, batch, partial(self._read, batch), controls)
        if batch < total * self._program.accumulate:
            self._read_ahead(batch + 1, partial(self._read, batch + 1))

    def fill_rows(self, arena: np.ndarray, rows: np.ndarray, *, then: np.ndarray | None) -> None:
        """Write the feeds of any samples; those that come next are read ahead."""
        self._write(arena, self._routine.feeds, rows.tobytes(), partial(self._read_rows, rows), {})
        if then is not None:
            self._read_ahead(then.tobytes(), partial(self._read_rows, then))

    def _write(
        self,
        arena: np.ndarray,
        feeds: tuple[Feed, ...],
        key: int | bytes,
        read: Callable[[], Values],
        controls: Mapping[str, float],
    ) -> None:
        ahead = self._ahead.result() if self._ahead is not None else None
        samples = iter(ahead if ahead is not None and self._ahead_key == key else read())
        self._ahead = None
        if self._arena is not arena:
            self._arena, self._places = arena, {}
        for feed in feeds:
            place = self._places.get(feed.buffer)
            if place is None:
                place = self._places[feed.buffer] = Place(arena, feed.buffer, feed.buffer.box)
            if feed.role in controls:
                place.write(np.array(controls[feed.role], feed.buffer.dtype))
            elif (values := next(samples)) is not None:
                place.write(values)

    def _read_ahead(self, key: int | bytes, read: Callable[[], Values]) -> None:
        """Begin to read what the next batch needs, if this one took long enough for that to be worth it."""
        if self._read_seconds > _AHEAD_seconds:
            self._ahead_key, self._ahead = key, self._reader.submit(read)

    def close(self) -> None:
        """Read nothing any more."""
        self._reader.shutdown(cancel_futures=True)

    def _read(self, batch: int) -> Values:
        rows, epoch = self.rows(batch), (batch - 1) // (self.steps_per_epoch * self._program.accumulate)
        return self._read_rows(rows, self._augmentation.changes(rows, seed=self._program.seed, epoch=epoch))

    def _read_rows(self, rows: np.ndarray, changes: Sequence[Change] = ()) -> Values:
        began, changes = time.perf_counter(), changes or [SAME] * len(rows)
        found = [self._read_feed(feed, rows, changes) for feed in self._feeds]
        self._read_seconds = time.perf_counter() - began
        return found

    def _read_feed(self, feed: Feed, rows: np.ndarray, changes: Sequence[Change]) -> np.ndarray | None:
        box = feed.buffer.box
        if not volume(box):
            return None
        batch, *inside = slices(box)
        values = self._columns[feed.key].read(rows[batch], tuple(inside), changes[batch])
        if feed.classes:
            return values
        return (self._scaling if feed.role == "input" else Scaling()).apply(values, box)
