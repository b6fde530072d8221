"""Training data, batch by batch. A node reads only the boxes that its feeds want. The next step's are read while this
one computes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fusetile.box import slices, volume
from fusetile.philox import permutation
from fusetile.program import Buffer, Feed, Program, Routine
from fusetile.runtime.augment import SAME, Augmentation, Change
from fusetile.runtime.outlet import Outlet
from fusetile.runtime.samples import Samples, Scaling
from fusetile.runtime.storage import Place

_AHEAD_seconds = 0.0005  # what is read in less is not worth waking a thread for

Values = list[np.ndarray | None]
"""Per feed of samples, what it gets of a batch."""


class Feeder(ABC):
    """Fills the feeds of a program, or of one of its routines, with samples. Batches have numbers: those of the
    training count from 1 on, those of a validation are counted as they come."""

    count: int  # samples

    def __init__(self, program: Program, *, scaling: Scaling | None, routine: Routine | None) -> None:
        self._program, self._routine, self._scaling = program, routine or program.training, scaling or Scaling()
        self._feeds = [feed for feed in self._routine.feeds if feed.role in ("input", "target")]
        self._places: dict[Buffer, Place] = {}  # of the feeds, in the arena that is being filled
        self._arena: np.ndarray | None = None
        self._given = 0  # batches whose samples were named by the caller

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps; the rest of an epoch is dropped."""
        return self.count // (self._program.batch * self._program.accumulate)

    def fill(self, arena: np.ndarray, batch: int, *, total: int, routine: Routine | None = None) -> None:
        """Write the feeds of a batch of the training, which has `total` steps; those of another routine, if it is
        given, that reads the same samples."""
        step, place = divmod(batch - 1, self._program.accumulate)
        controls = {"step": batch, "kept": min(place, 1), **self._program.rates.controls(step + 1, total)}
        self._write(arena, (routine or self._routine).feeds, self._take(batch, None), controls)
        if batch < total * self._program.accumulate:
            self._prepare(batch + 1, None)

    def fill_rows(self, arena: np.ndarray, rows: np.ndarray, *, then: np.ndarray | None) -> None:
        """Write the feeds of any samples; those that come next are read ahead."""
        self._given += 1
        self._write(arena, self._routine.feeds, self._take(self._given, rows), {})
        if then is not None:
            self._prepare(self._given + 1, then)

    @abstractmethod
    def _take(self, batch: int, rows: np.ndarray | None) -> Values:
        """What the feeds get of a batch, which has these samples, or those that are its turn in the training."""

    @abstractmethod
    def _prepare(self, batch: int, rows: np.ndarray | None) -> None:
        """Begin to get what will be taken next."""

    def _write(self, arena: np.ndarray, feeds: tuple[Feed, ...], values: Values, controls: Mapping[str, float]) -> None:
        samples = iter(values)
        if self._arena is not arena:
            self._arena, self._places = arena, {}
        for feed in feeds:
            place = self._places.get(feed.buffer)
            if place is None:
                place = self._places[feed.buffer] = Place(arena, feed.buffer, feed.buffer.box)
            if feed.role in controls:
                place.write(np.array(controls[feed.role], feed.buffer.dtype))
            elif (part := next(samples)) is not None:
                place.write(part)

    def _scaled(self, feed: Feed, values: np.ndarray) -> np.ndarray:
        """What a feed gets of what was stored."""
        if feed.classes:
            return values
        return (self._scaling if feed.role == "input" else Scaling()).apply(values, feed.buffer.box)


class Reader(Feeder):
    """Samples that are read here, in a thread of their own. If this node is the source, the others get theirs from
    here: see `share`."""

    def __init__(self, program: Program, *, scaling: Scaling | None, routine: Routine | None) -> None:
        super().__init__(program, scaling=scaling, routine=routine)
        self._outlet: Outlet | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._read_seconds = 0.0  # what the last batch took
        self._ahead: tuple[int, Future[Values]] | None = None

    @abstractmethod
    def offer(self) -> dict[str, Any]:
        """What other nodes must know of the data: how many samples (`count`), the `types` of their parts by name."""

    @abstractmethod
    def _whole(self, batch: int, rows: np.ndarray | None) -> dict[str, np.ndarray]:
        """The samples of a batch, by name, of the types that are offered."""

    def _boxes(self, batch: int, rows: np.ndarray | None) -> dict[Buffer, np.ndarray]:
        """This node's boxes of a batch, by the buffers of its feeds."""
        return self._cut(self._whole(batch, rows))

    def share(self, outlet: Outlet) -> None:
        """From now on every batch that is read goes out to the other nodes as well."""
        self._outlet = outlet

    def close(self) -> None:
        """Read nothing any more."""
        self._reader.shutdown(cancel_futures=True)

    def _take(self, batch: int, rows: np.ndarray | None) -> Values:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == batch:
            return ahead[1].result()
        if self._outlet is not None:
            self._outlet.await_room(batch)
        return self._read(batch, rows)

    def _prepare(self, batch: int, rows: np.ndarray | None) -> None:
        """Read ahead if the last batch took long enough for that to be worth it, or others wait for it."""
        if self._outlet is not None:
            self._outlet.await_room(batch)
        if self._outlet is not None or self._read_seconds > _AHEAD_seconds:
            self._ahead = batch, self._reader.submit(self._read, batch, rows)

    def _read(self, batch: int, rows: np.ndarray | None = None) -> Values:
        began = time.perf_counter()
        if self._outlet is None:
            read = self._boxes(batch, rows)
        else:
            full = self._whole(batch, rows)
            self._outlet.send(batch, full)
            read = self._cut(full)
        found = [self._scaled(feed, read[feed.buffer]) if volume(feed.buffer.box) else None for feed in self._feeds]
        self._read_seconds = time.perf_counter() - began
        return found

    def _cut(self, full: Mapping[str, np.ndarray]) -> dict[Buffer, np.ndarray]:
        return {feed.buffer: full[feed.key][slices(feed.buffer.box)] for feed in self._feeds}


class Data(Reader):
    """Samples in files. Raises UserError if anything about them is wrong; see Samples."""

    def __init__(
        self,
        path: Path,
        program: Program,
        *,
        shuffle: bool,
        scaling: Scaling | None = None,
        augmentation: Augmentation | None = None,
        routine: Routine | None = None,
        checked: bool = False,
    ) -> None:
        super().__init__(program, scaling=scaling, routine=routine)
        self._shuffle, self._augmentation = shuffle, augmentation or Augmentation()
        least = program.batch * program.accumulate if routine is None else 1
        wanted = self._feeds if program.source is None else program.samples
        samples = Samples(
            path,
            wanted,
            least=least,
            part="train" if routine is None else "val",
            scaling=self._scaling,
            augmentation=self._augmentation,
            checked=checked,
        )
        self._columns, self.count = samples.columns, samples.count
        self._here, self._all = _cuts(self._feeds), _cuts(program.samples)
        self._epoch, self._order = -1, np.arange(self.count)

    def offer(self) -> dict[str, Any]:
        """See Reader."""
        return {"count": self.count, "types": {key: column.dtype.str for key, column in self._columns.items()}}

    def rows(self, batch: int) -> np.ndarray:
        """Indices of the samples of a batch of the training (from 1)."""
        epoch, position = divmod(batch - 1, self.steps_per_epoch * self._program.accumulate)
        if self._shuffle and epoch != self._epoch:
            self._epoch = epoch
            self._order = permutation(seed=self._program.seed, epoch=epoch, count=self.count)
        return self._order[position * self._program.batch : (position + 1) * self._program.batch]

    def _boxes(self, batch: int, rows: np.ndarray | None) -> dict[Buffer, np.ndarray]:
        rows, changes = self._named(batch, rows)
        return {
            feed.buffer: self._columns[feed.key].read(rows[some], inside, changes[some])
            for feed, some, inside in self._here
        }

    def _whole(self, batch: int, rows: np.ndarray | None) -> dict[str, np.ndarray]:
        """Every sample is read once, as a whole."""
        rows, changes = self._named(batch, rows)
        read = {
            feed.key: self._columns[feed.key].read(rows[some], inside, changes[some])
            for feed, some, inside in self._all
        }
        return {key: values.astype(self._columns[key].dtype) for key, values in read.items()}

    def _named(self, batch: int, rows: np.ndarray | None) -> tuple[np.ndarray, Sequence[Change]]:
        """The samples of a batch, and how they are changed: not in a validation."""
        if rows is not None:
            return rows, [SAME] * len(rows)
        rows, epoch = self.rows(batch), (batch - 1) // (self.steps_per_epoch * self._program.accumulate)
        return rows, self._augmentation.changes(rows, seed=self._program.seed, epoch=epoch)


def _cuts(feeds: Sequence[Feed]) -> list[tuple[Feed, slice, tuple[slice, ...]]]:
    """For the feeds that get anything of a batch: which samples, and which box of them."""
    boxes = [(feed, slices(feed.buffer.box)) for feed in feeds if volume(feed.buffer.box)]
    return [(feed, some, tuple(inside)) for feed, (some, *inside) in boxes]
