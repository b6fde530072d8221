"""Training data, batch by batch. A node reads only the boxes that its feeds want. The next step's are read while this
one computes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fusetile.box import slices, volume
from fusetile.philox import permutation
from fusetile.program import Feed, Program
from fusetile.runtime.augment import Augmentation, Change
from fusetile.runtime.samples import Samples, Scaling
from fusetile.runtime.storage import Place

_AHEAD_bytes = 1 << 18  # smaller batches are read faster than a thread is woken


class Data:
    """The samples of a program's feeds. Raises UserError if anything about them is wrong."""

    def __init__(
        self,
        path: Path,
        program: Program,
        *,
        shuffle: bool,
        scaling: Scaling | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        self._program, self._shuffle = program, shuffle
        self._scaling, self._augmentation = scaling or Scaling(), augmentation or Augmentation()
        self._feeds = [feed for feed in program.feeds if feed.role in ("input", "target")]
        samples = Samples(path, self._feeds, program.batch, self._scaling, self._augmentation)
        self._columns, self.count = samples.columns, samples.count
        self._epoch, self._order = -1, np.arange(self.count)
        self._places: list[Place] = []  # of the feeds, in the arena that is being filled
        self._arena: np.ndarray | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._ahead_step = 0
        self._ahead: Future[list[np.ndarray | None]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches; the rest of an epoch is dropped."""
        return self.count // self._program.batch

    def rows(self, step: int) -> np.ndarray:
        """Indices of the samples of training step `step` (from 1)."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if self._shuffle and epoch != self._epoch:
            self._epoch = epoch
            self._order = permutation(seed=self._program.seed, epoch=epoch, count=self.count)
        return self._order[position * self._program.batch : (position + 1) * self._program.batch]

    def fill(self, arena: np.ndarray, step: int, *, total: int) -> None:
        """Write the feeds of a training step, of `total`."""
        controls = self._program.rates.controls(step, total)
        ahead = self._ahead.result() if self._ahead is not None else None
        read = ahead if ahead is not None and self._ahead_step == step else self._read(step)
        if self._arena is not arena:
            self._arena = arena
            self._places = [Place(arena, feed.buffer, feed.buffer.box) for feed in self._program.feeds]
        samples = iter(read)
        for feed, place in zip(self._program.feeds, self._places, strict=True):
            if feed.role == "step":
                place.write(np.array(step, np.int32))
            elif feed.role in controls:
                place.write(np.array(controls[feed.role], np.float32))
            elif (values := next(samples)) is not None:
                place.write(values)
        self._ahead = None
        if step < total and sum(values.nbytes for values in read if values is not None) >= _AHEAD_bytes:
            self._ahead_step, self._ahead = step + 1, self._reader.submit(self._read, step + 1)

    def close(self) -> None:
        """Read nothing any more."""
        self._reader.shutdown(cancel_futures=True)

    def _read(self, step: int) -> list[np.ndarray | None]:
        """Per feed of samples, what it gets of the step's batch."""
        rows, epoch = self.rows(step), (step - 1) // self.steps_per_epoch
        changes = self._augmentation.changes(rows, seed=self._program.seed, epoch=epoch)
        return [self._read_feed(feed, rows, changes) for feed in self._feeds]

    def _read_feed(self, feed: Feed, rows: np.ndarray, changes: Sequence[Change]) -> np.ndarray | None:
        box = feed.buffer.box
        if not volume(box):
            return None
        batch, *inside = slices(box)
        values = self._columns[feed.key].read(rows[batch], tuple(inside), changes[batch])
        if feed.classes:
            return values
        return (self._scaling if feed.role == "input" else Scaling()).apply(values, box)
