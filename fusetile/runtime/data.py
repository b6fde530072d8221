"""Training data: named arrays in an .npz file or a folder of .npy files, or images; checked once, read batch by batch.

The first dimension of every array counts the samples. A node reads only the boxes that its feeds want. Files are mapped
into memory where they can be: .npy files, and the members of an .npz that `numpy.savez` wrote (uncompressed). What the
next step needs is read while this one computes.
"""

from __future__ import annotations

import errno
import math
import mmap
import sys
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fusetile.box import Box, slices, volume
from fusetile.errors import UserError
from fusetile.philox import permutation
from fusetile.program import Feed, Program
from fusetile.runtime.images import ImageFolder
from fusetile.runtime.storage import Place

_LOCAL_HEADER_bytes = 30
_CHECKED_at_once = 1 << 22  # elements
_ADDRESSABLE_bytes = sys.maxsize
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
            _check_classes(self._arrays[feed.key], feed, path)
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
        _let_go(array)
        return self._scaling.apply(values, box) if feed.role == "input" and not feed.classes else values


def _let_go(array: Any) -> None:
    """What was read of a mapped file counts no more as memory of this process; the system may still have it at hand."""
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(array, np.memmap) and isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


def _open(path: Path, feeds: list[Feed]) -> Mapping[str, Any]:
    """Arrays, or what looks like them, by name."""
    if path.is_dir() and ImageFolder.is_one(path):
        return _images(path, feeds)
    if path.is_dir():
        files = {file.stem: file for file in sorted(path.glob("*.npy"))}
        if not files:
            raise UserError(f"there are no .npy files, and no folders with images, in the folder {path}")
        return {name: _load(file) for name, file in files.items()}
    if not path.exists():
        raise UserError(f"there is no data file {path}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is neither an .npz file nor a folder of .npy files: write one with numpy.savez")
    return _Archive(path)


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


def _load(file: Path) -> np.ndarray:
    try:
        with open(file, "rb") as opened:
            mapped = _map(opened, file)
        return np.load(file, allow_pickle=False) if mapped is None else mapped
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"can't read {file} as an array: {error}") from error


class _Archive(Mapping[str, np.ndarray]):
    """An .npz file: members are opened when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with zipfile.ZipFile(path) as archive:
            self._members = {
                info.filename.removesuffix(".npy"): info
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, name: str) -> np.ndarray:
        info = self._members[name]
        try:
            if info.compress_type == zipfile.ZIP_STORED:
                with open(self._path, "rb") as file:
                    mapped = _map_member(file, info, self._path)
                if mapped is not None:
                    return mapped
            with np.load(self._path, allow_pickle=False) as archive:
                return archive[name]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"can't read the array {name!r} of {self._path}: {error}") from error


def _map_member(file: BinaryIO, info: zipfile.ZipInfo, path: Path) -> np.ndarray | None:
    """An uncompressed member as a mapped array; see `_map`."""
    file.seek(info.header_offset)
    local = file.read(_LOCAL_HEADER_bytes)
    file.seek(int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little"), 1)
    return _map(file, path)


def _map(file: BinaryIO, path: Path) -> np.ndarray | None:
    """The .npy file that begins where `file` is, as a mapped array; None if its header is of a rare kind that only
    np.load reads."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        return None
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject or 0 in shape or not shape:
        return None
    size_bytes = math.prod(shape) * dtype.itemsize
    too_large = UserError(
        f"{path} holds an array of {size_bytes / 1e9:.1f} GB, more than this {_ADDRESSABLE_bytes.bit_length() + 1}-bit "
        "system can map into memory: use a 64-bit system, smaller images or fewer samples"
    )
    if size_bytes > _ADDRESSABLE_bytes:
        raise too_large
    try:
        return np.memmap(file, dtype, mode="r", offset=file.tell(), shape=shape, order="F" if fortran else "C")
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise too_large from error


def _find(arrays: Mapping[str, np.ndarray], feed: Feed, feeds: list[Feed], path: Path) -> np.ndarray:
    """The array of a feed, checked against what the feed wants."""
    inputs = {other.key for other in feeds if other.role == "input"}
    names = [feed.key, "x"] if feed.role == "input" and len(inputs) == 1 else [feed.key]
    name = next((name for name in names if name in arrays), None)
    if name is None:
        there = ", ".join(repr(name) for name in arrays) or "nothing"
        wanted = " or ".join(repr(name) for name in dict.fromkeys(names))
        raise UserError(f"{path} has no array {wanted} (the {feed.role} of the model); it has {there}")
    array = arrays[name]
    sample = feed.shape[1:]
    if feed.role == "target" and _is_deeper(array.shape[1:], sample):
        array = array.reshape(len(array), *sample)
    if array.ndim == 0 or array.shape[1:] != sample:
        expected = ", ".join(map(str, ("samples", *sample)))
        raise UserError(f"{path}: {name!r} has shape {array.shape} where the model wants ({expected})")
    wanted = "iu" if feed.classes else "f"
    if array.dtype.kind not in wanted and not (array.dtype == np.uint8 and feed.role == "input"):
        what = "integer class indices" if feed.classes else "floating-point numbers (convert with .astype('float32'))"
        raise UserError(f"{path}: {name!r} has dtype {array.dtype} where the model wants {what}")
    return array


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
