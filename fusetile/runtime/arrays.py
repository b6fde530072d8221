"""Named arrays in an .npz file or a folder of .npy files, mapped into memory where they can be: .npy files, and the
members of an .npz that `numpy.savez` wrote (uncompressed)."""

from __future__ import annotations

import errno
import math
import mmap
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fusetile.errors import UserError
from fusetile.runtime.augment import SAME, Change, picked, resampled

_LOCAL_HEADER_bytes = 30
_ADDRESSABLE_bytes = sys.maxsize
_ROWS_at_once = 8  # of a mapped file: for each row the system may map 2 MB


def open_arrays(path: Path) -> Mapping[str, np.ndarray]:
    """The arrays of a file or a folder, by name. Raises UserError."""
    if path.is_dir():
        files = sorted(path.glob("*.npy"))
        if not files:
            raise UserError(f"there are no .npy files, and no folders with images, in the folder {path}")
        return {file.stem: _load(file) for file in files}
    if not path.exists():
        raise UserError(f"there is no data file {path}")
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            begun = file.read(2) == b"PK"
        what = "cut off" if begun else "neither an .npz file nor a folder of .npy files"
        raise UserError(f"{path} is {what}: {'copy it again' if begun else 'write one with numpy.savez'}")
    return _Archive(path)


class Kind(Enum):
    """What the samples of an array are, if they are to be changed."""

    OTHER = "nothing to change"
    IMAGE = "[C,H,W]"
    MASK = "[H,W], whole numbers"


class Array:
    """A mapped array, with its mapping, or one in memory."""

    def __init__(self, values: np.ndarray, kind: Kind = Kind.OTHER) -> None:
        self.values, self.kind = np.asarray(values), kind  # a plain view of a mapped one: numpy.memmap is slow
        self.shape, self.dtype, self.ndim = values.shape, values.dtype, values.ndim
        base: Any = values
        while isinstance(base, np.ndarray):
            base = base.base
        self.mapping = base if isinstance(values, np.memmap) and isinstance(base, mmap.mmap) else None
        self._rows_held = 0  # that may still count as memory of this process

    def read(self, rows: np.ndarray, inside: tuple[slice, ...], changes: Sequence[Change]) -> np.ndarray:
        """A box of some samples."""
        if len(rows) <= _ROWS_at_once:
            return self._read(rows, inside, changes)
        index: Any = (0, *inside)
        found = np.empty((len(rows), *self.values[index].shape), self.dtype)
        for start in range(0, len(rows), _ROWS_at_once):
            some = slice(start, start + _ROWS_at_once)
            found[some] = self._read(rows[some], inside, changes[some])
        return found

    def _read(self, rows: np.ndarray, inside: tuple[slice, ...], changes: Sequence[Change]) -> np.ndarray:
        several: Any = (rows, *inside)
        if self.kind is Kind.OTHER or all(change == SAME for change in changes):
            found: np.ndarray = self.values[several]
        else:
            one: Any = (0, *inside)
            found = np.empty((len(rows), *self.values[one].shape), self.dtype)
            for place, row, change in zip(found, rows, changes, strict=True):
                place[:] = self._changed(row, change, inside)
        self._rows_held += len(rows)
        if self._rows_held >= _ROWS_at_once:
            self._let_go()
        return found

    def copy(self, rows: slice) -> np.ndarray:
        """Of some samples."""
        found = np.array(self.values[rows])
        self._let_go()
        return found

    def _changed(self, row: int, change: Change, inside: tuple[slice, ...]) -> np.ndarray:
        if self.kind is Kind.MASK:
            return picked(self.values[row], change, *inside)
        channels, *part = inside
        found = resampled(self.values[row], change, *part)
        return (change.colours(found) if self.dtype == np.uint8 else found)[channels]

    def _let_go(self) -> None:
        """What was read of a mapped file counts no more as memory of this process; the system may still have it at
        hand."""
        self._rows_held = 0
        if self.mapping is not None:
            self.mapping.madvise(mmap.MADV_DONTNEED)


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
