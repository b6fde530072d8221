"""Training data: named arrays in an .npz file or a folder of .npy files, or images; checked once, read batch by batch.

The first dimension of every array counts the samples. A node reads only the boxes that its feeds want. Files are mapped
into memory where they can be: .npy files, and the members of an .npz that `numpy.savez` wrote (uncompressed). What the
next step needs is read while this one computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusetile.box import Box, slices, volume
from fusetile.errors import UserError
from fusetile.philox import permutation
from fusetile.program import Feed, Program
from fusetile.runtime.arrays import let_go, open_arrays
from fusetile.runtime.detection import Boxes, Detection, check_boxes, padded
from fusetile.runtime.images import ImageFolder
from fusetile.runtime.storage import Place

_CHECKED_at_once = 1 << 22  # elements
_AHEAD_bytes = 1 << 18  # smaller batches are read faster than a thread is woken


@dataclass(frozen=True, slots=True)
class Scaling:
    """What happens to inputs: bytes become numbers from 0 to 1; then, per channel, (x - mean) / std. A single number is
    for all channels."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def check(self, feed: Feed) -> None:
        """Raises UserError if the channels are not those of an input."""
        channels = feed.shape[1]
        for flag, values in (("--mean", self.mean), ("--std", self.std)):
            if len(values) not in (0, 1, channels):
                raise UserError(f"{flag}: {len(values)} numbers for the {channels} channels of {feed.key!r}")

    def apply(self, values: np.ndarray, box: Box) -> np.ndarray:
        """The values of a box of an input, scaled; as they are if there is nothing to do."""
        if values.dtype != np.uint8 and not self.mean and not self.std:
            return values
        mean, std = np.array(self.mean or (0.0,)), np.array(self.std or (1.0,))
        numbers = (1 / 255 if values.dtype == np.uint8 else 1.0) / std, -mean / std
        factor, offset = (
            (part[slice(*box[1])] if len(part) > 1 else part).astype(np.float32).reshape(-1, *[1] * (len(box) - 2))
            for part in numbers
        )
        return values.astype(np.float32) * factor + offset


class Data:
    """The samples of a program's feeds. Raises UserError if anything about them is wrong."""

    def __init__(self, path: Path, program: Program, *, shuffle: bool, scaling: Scaling | None = None) -> None:
        self._program, self._shuffle, self._scaling = program, shuffle, scaling or Scaling()
        self._feeds = [feed for feed in program.feeds if feed.role in ("input", "target")]
        for feed in self._feeds:
            if feed.role == "input" and not feed.classes:
                self._scaling.check(feed)
        arrays = _open(path, self._feeds)
        self._arrays = {feed.key: _find(arrays, feed, self._feeds, path) for feed in self._feeds}
        counts = {key: len(array) for key, array in self._arrays.items()} or _counts(arrays)
        if len(set(counts.values())) != 1:
            listed = ", ".join(f"{key}: {count}" for key, count in counts.items())
            raise UserError(f"{path}: the arrays have different numbers of samples ({listed or 'there are none'})")
        self.count = next(iter(counts.values()))
        if self.count < program.batch:
            raise UserError(f"{path} has {self.count} samples, fewer than one batch of {program.batch}")
        for feed in {feed.key: feed for feed in self._feeds if feed.classes}.values():
            array = self._arrays[feed.key]
            if not feed.boxes:
                _check_classes(array, feed, path)
            elif isinstance(array, np.ndarray):  # a folder's boxes have been looked at
                check_boxes(array, feed.classes, path)
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
        rows = self.rows(step)
        return [self._read_feed(feed, rows) for feed in self._feeds]

    def _read_feed(self, feed: Feed, rows: np.ndarray) -> np.ndarray | None:
        box = feed.buffer.box
        if not volume(box):
            return None
        batch, *rest = slices(box)
        index: Any = (rows[batch], *rest)
        array = self._arrays[feed.key]
        values = np.asarray(array[index])
        let_go(array)
        return self._scaling.apply(values, box) if feed.role == "input" and not feed.classes else values


def _open(path: Path, feeds: list[Feed]) -> Mapping[str, Any]:
    """Arrays, or what looks like them, by name."""
    if Detection.is_one(path):
        return _boxes(path, feeds)
    if ImageFolder.is_one(path):
        return _images(path, feeds)
    return open_arrays(path)


def most_boxes(path: Path) -> int:
    """Of data for a detector: boxes in the sample that has most. Raises UserError if there are no boxes in the data."""
    if Detection.is_one(path):
        return Detection(path).most
    arrays = open_arrays(path)
    shape = arrays["y"].shape if "y" in arrays else ()
    if len(shape) != 3 or shape[2] != 5:
        raise UserError(f"{path} has no boxes: neither images with .txt files, nor an array 'y' [samples, boxes, 5]")
    return shape[1]


def _images(path: Path, feeds: list[Feed]) -> dict[str, Any]:
    """The one input and the one target of a classifier."""
    folder = ImageFolder(path)
    found: dict[str, Any] = {"y": folder.labels}
    for feed in feeds:
        if feed.role == "input":
            found[feed.key] = folder.images(feed.shape[1:])
        elif feed.classes and feed.classes != len(folder.classes):
            raise UserError(f"{path} has {len(folder.classes)} classes, the model {feed.classes}")
    return found


def _boxes(path: Path, feeds: list[Feed]) -> dict[str, Any]:
    """The one input and the target, or targets, of a detector."""
    folder = Detection(path)
    found: dict[str, Any] = {feed.key: folder.images(feed.shape[1:]) for feed in feeds if feed.role == "input"}
    for feed in feeds:
        if feed.role == "target" and not feed.boxes:
            raise UserError(f"{path} has boxes, which are no targets for this --loss")
        if feed.boxes:
            found[feed.key] = folder.targets(feed.shape[1], feed.classes)
    return found or {"y": Boxes(folder.boxes, folder.most)}


def _find(arrays: Mapping[str, np.ndarray], feed: Feed, feeds: list[Feed], path: Path) -> np.ndarray:
    """The array of a feed, checked against what the feed wants."""
    alike = {other.key for other in feeds if other.role == feed.role}
    names = [feed.key, *([{"input": "x", "target": "y"}[feed.role]] if len(alike) == 1 else [])]
    name = next((name for name in names if name in arrays), None)
    if name is None:
        there = ", ".join(repr(name) for name in arrays) or "nothing"
        wanted = " or ".join(repr(name) for name in dict.fromkeys(names))
        raise UserError(f"{path} has no array {wanted} (the {feed.role} of the model); it has {there}")
    array = arrays[name]
    sample = feed.shape[1:]
    if feed.boxes and isinstance(array, np.ndarray):
        array = _filled_up(array, sample)
    if feed.role == "target" and _is_deeper(array.shape[1:], sample):
        array = array.reshape(len(array), *sample)
    if array.ndim == 0 or array.shape[1:] != sample:
        expected = ", ".join(map(str, ("samples", *sample)))
        raise UserError(f"{path}: {name!r} has shape {array.shape} where the model wants ({expected})")
    labels = feed.classes and not feed.boxes
    wanted = "iu" if labels else "f"
    if array.dtype.kind not in wanted and not (array.dtype == np.uint8 and feed.role == "input"):
        what = "integer class indices" if labels else "floating-point numbers (convert with .astype('float32'))"
        raise UserError(f"{path}: {name!r} has dtype {array.dtype} where the model wants {what}")
    return array


def _filled_up(array: np.ndarray, sample: tuple[int, ...]) -> np.ndarray:
    """With rows of no object, where there are fewer than the model takes."""
    fits = array.shape[2:] == sample[1:] and array.shape[1] <= sample[0] and array.dtype.kind == "f"
    return padded(list(array), sample[0]) if fits else array


def _is_deeper(shape: tuple[int, ...], sample: tuple[int, ...]) -> bool:
    """Whether an output of more than four dimensions, which is kept with its last ones as one, has this shape."""
    last = len(sample) - 1
    return len(shape) > last + 1 > 1 and shape[:last] == sample[:last] and math.prod(shape[last:]) == sample[last]


def _counts(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Samples per array, for a node that reads none of them and yet must know how long an epoch is."""
    return {name: len(arrays[name]) for name in arrays if arrays[name].ndim}


def _check_classes(array: np.ndarray, feed: Feed, path: Path) -> None:
    rows = max(1, _CHECKED_at_once * len(array) // max(1, array.size))
    for start in range(0, len(array), rows):
        part = np.asarray(array[start : start + rows])
        bad = (part < 0) | (part >= feed.classes)
        wrong = np.argwhere(bad if feed.ignore is None else bad & (part != feed.ignore))
        if len(wrong):
            row, *pixel = (int(i) for i in wrong[0])
            where = f"sample {start + row}" + (f", pixel {tuple(pixel)}" if pixel else "")
            value = part[tuple(wrong[0])]
            raise UserError(
                f"{path}: {feed.key!r} has class {value} at {where}; the model has {feed.classes} classes, "
                f"0 to {feed.classes - 1}" + (f", and the ignored {feed.ignore}" if feed.ignore is not None else "")
            )
