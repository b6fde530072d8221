"""Image files as arrays; needs Pillow. And a folder of images with a folder per class: FOLDER/cat/1.jpg,
FOLDER/dog/1.jpg, ... Classes are numbered in the order of their folders' names, samples go by class and name."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from fusetile.errors import UserError
from fusetile.runtime.augment import Change, Size

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
Found = TypeVar("Found")
_MODES = {1: "L", 3: "RGB"}
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_UNREADABLE = OSError, SyntaxError, ValueError, EOFError  # as Pillow's decoders have it


class ImageFolder:
    """The files and their classes. Raises UserError for a folder that can't be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.classes = self.names(folder)
        self.files: list[Path] = []
        labels: list[int] = []
        for number, name in enumerate(self.classes):
            found = image_files(folder / name)
            if not found:
                raise UserError(
                    f"{folder / name}: there is no image in this folder of a class ({', '.join(sorted(SUFFIXES))})"
                )
            self.files += found
            labels += [number] * len(found)
        self.labels = np.array(labels, np.int64)

    @staticmethod
    def names(folder: Path) -> list[str]:
        """Those of the classes."""
        return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))

    @classmethod
    def is_one(cls, path: Path) -> bool:
        """Whether there is an image in a folder of this folder."""
        return path.is_dir() and any(image_files(folder) for folder in path.iterdir() if folder.is_dir())


def image_files(folder: Path) -> list[Path]:
    """The images in a folder, by name; hidden files are none."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")


class Fit(Enum):
    """What of an image becomes a sample, if it is not changed."""

    CUT = "its middle, as large as it can be with the sample's proportions, scaled"
    STRETCHED = "all of it, stretched"
    PATCH = "as many pixels from its middle as a sample has"


class Images:
    """Looks like an array [samples, C, H, W] of uint8; files are read when their samples are. Patches start at
    multiples of `unit` pixels. Raises UserError if there is no such image, or no Pillow."""

    dtype = np.dtype(np.uint8)

    def __init__(self, files: Sequence[Path], sample: tuple[int, ...], fit: Fit, unit: Size = (1, 1)) -> None:
        if len(sample) != 3 or sample[0] not in _MODES:
            raise UserError(f"{files[0].parent}: images have 1 or 3 channels, the model wants samples {sample}")
        self._files, self._fit, self._unit = files, fit, unit
        self.shape = (len(files), *sample)
        self.ndim = len(self.shape)

    def check(self) -> None:
        """Raises UserError if one of the files is no image, or not all of one."""
        for_each(looked_at, self._files)

    def read(self, rows: np.ndarray, inside: tuple[slice, ...], changes: Sequence[Change]) -> np.ndarray:
        """A box of some samples."""
        return np.stack([self._sample(*each, *inside) for each in zip(rows, changes, strict=True)])

    def _sample(self, row: int, change: Change, *inside: slice) -> np.ndarray:
        """A box of a sample [C,H,W]."""
        _, channels, height, width = self.shape

        def pixels(image: Any) -> np.ndarray:
            from PIL import ImageOps

            if self._fit is not Fit.PATCH:  # of a large JPEG only as many pixels are decoded as are needed
                side = math.ceil(max(height, width) / min(change.scale))
                image.draft(None, (side, side))
            upright = ImageOps.exif_transpose(image).convert(_MODES[channels])
            return np.asarray(upright.resize((width, height), box=self._window(upright.size, change)))

        found = decoded(self._files[row], pixels).reshape(height, width, channels).transpose(2, 0, 1)
        part = (found[:, :, ::-1] if change.flip else found)[:, *inside[1:]]
        return change.colours(part)[inside[0]]

    def _window(self, size: Size, change: Change) -> tuple[float, float, float, float]:
        height, width = self.shape[2:]
        if self._fit is Fit.STRETCHED:
            return change.window(size, size)
        if self._fit is Fit.CUT:
            part = min(size[0] / width, size[1] / height)
            return change.window(size, (width * part, height * part))
        left, top = (
            round(at * (whole // unit - side // unit)) * unit
            for at, whole, unit, side in zip(change.at, size, self._unit, (width, height), strict=True)
        )
        return left, top, left + width, top + height


class Masks:
    """Looks like an array [samples, H, W] of classes, the values of grey or palette images. They are stretched; each
    pixel is that which is next. Raises UserError if there is no such image, or no Pillow."""

    dtype = np.dtype(np.uint8)

    def __init__(self, files: Sequence[Path], sample: tuple[int, ...], classes: int, ignore: int | None) -> None:
        self._files, self._classes, self._ignore = files, classes, ignore
        self.shape = (len(files), *sample)
        self.ndim = len(self.shape)

    def check(self) -> None:
        """Raises UserError for a mask that can't be read, and for a value that is no class: all are decoded."""
        for_each(lambda path: decoded(path, lambda image: self._values(image, path)), self._files)

    def read(self, rows: np.ndarray, inside: tuple[slice, ...], changes: Sequence[Change]) -> np.ndarray:
        """A box of some samples. Raises UserError for a value that is no class."""
        return np.stack([self._sample(*each)[inside] for each in zip(rows, changes, strict=True)])

    def _sample(self, row: int, change: Change) -> np.ndarray:
        _, height, width = self.shape
        path = self._files[row]

        def pixels(image: Any) -> np.ndarray:
            self._values(image, path)
            nearest = _pillow().Resampling.NEAREST
            return np.asarray(image.resize((width, height), nearest, change.window(image.size, image.size)))

        found = decoded(path, pixels)
        return found[:, ::-1] if change.flip else found

    def _values(self, image: Any, path: Path) -> np.ndarray:
        """Those of a mask [H,W], all of which are classes."""
        if image.mode not in ("1", "L", "P") or image.format == "JPEG":
            raise UserError(
                f"{path} is an image of kind {image.format} {image.mode}; a mask is a grey or palette PNG, whose "
                "values are the numbers of classes"
            )
        values = np.asarray(image)
        bad = np.argwhere((values >= self._classes) & (values != (-1 if self._ignore is None else self._ignore)))
        if len(bad):
            row, column = bad[0].tolist()
            raise UserError(
                f"{path} has class {values[row, column]} at row {row}, column {column}; the model has {self._classes} "
                f"classes, 0 to {self._classes - 1}; --ignore-index is for pixels that do not count"
            )
        return values


class Marks:
    """Looks like an array [samples, C, H, W] of uint8 made of masks: 255 where a pixel is of the channel's class. One
    channel is for all classes but 0."""

    dtype = np.dtype(np.uint8)

    def __init__(self, files: Sequence[Path], sample: tuple[int, ...], ignore: int) -> None:
        channels, height, width = sample
        self._masks = Masks(files, (height, width), channels if channels > 1 else ignore + 1, ignore)
        self.shape = (len(files), *sample)

    def check(self) -> None:
        """See Masks."""
        self._masks.check()

    def read(self, rows: np.ndarray, inside: tuple[slice, ...], changes: Sequence[Change]) -> np.ndarray:
        """A box of some samples. Raises UserError for a value that is no class."""
        channels, *pixels = inside
        masks = self._masks.read(rows, tuple(pixels), changes)[:, None]
        if self.shape[1] == 1:
            return np.where(masks > 0, np.uint8(255), np.uint8(0))
        classes = np.arange(self.shape[1])[channels].reshape(-1, 1, 1)
        return np.where(masks == classes, np.uint8(255), np.uint8(0))


def _pillow() -> ModuleType:
    """PIL.Image. Raises UserError if it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("reading images needs Pillow: pip install 'fusetile[images]'") from None
    return Image


def looked_at(path: Path) -> Size:
    """Width and height of an image. Raises UserError, also for one whose end is missing: that is seen without decoding,
    unless the end is an unusual one."""
    image = _pillow()
    try:
        with image.open(path) as opened:
            if opened.mode[0] in "IF":
                raise UserError(f"{path} has pixels of kind {opened.mode}: convert it to 8 bits per channel")
            size: Size = opened.size
            if not _ends(path, opened.format):
                opened.load()
            return size
    except (*_UNREADABLE, image.DecompressionBombError) as error:
        raise UserError(f"can't read {path} as an image ({error}): remove it, or replace it") from error


def _ends(path: Path, form: str | None) -> bool:
    """Whether a file ends as a whole one of its format does."""
    with path.open("rb") as file:
        if form not in _ENDS:
            return False
        file.seek(-len(_ENDS[form]), os.SEEK_END)
        return file.read() == _ENDS[form]


def for_each(look: Callable[[Path], Found], files: Sequence[Path]) -> list[Found]:
    """What is found in each of the files, looking at several at a time. Raises what is wrong with the first that is not
    right."""
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="check") as pool:
        return list(pool.map(look, files))  # an error cancels those that have not begun


def decoded(path: Path, pixels: Callable[[Any], np.ndarray]) -> np.ndarray:
    """`pixels` of an opened image. Raises UserError if it is damaged."""
    try:
        with _pillow().open(path) as image:
            return pixels(image)
    except _UNREADABLE as error:
        raise UserError(f"can't read {path} as an image ({error}): remove it, or replace it") from error


def partners(files: Sequence[Path], folder: Path, what: str) -> list[Path]:
    """For each image that of its name, but for the end, in another folder. Raises UserError if there is none."""
    there: Mapping[str, Path] = {path.stem: path for path in image_files(folder)}
    for path in files:
        if path.stem not in there:
            raise UserError(f"{path} has no {what}: there is no {folder / path.stem}.png")
    return [there[path.stem] for path in files]
