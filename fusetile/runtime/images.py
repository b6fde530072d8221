"""A folder of images with a folder per class: FOLDER/cat/1.jpg, FOLDER/dog/1.jpg, ... Needs Pillow.

Classes are numbered in the order of their folders' names, samples go by class and name. An image is scaled and cut at
its middle to the model's size, colours are those of its channels: one (grey) or three (red, green, blue), as uint8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fusetile.errors import UserError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_MODES = {1: "L", 3: "RGB"}


class ImageFolder:
    """The files and their classes. Raises UserError for a folder that can't be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        self.files: list[Path] = []
        labels: list[int] = []
        for number, name in enumerate(self.classes):
            found = image_files(folder / name)
            if not found:
                raise UserError(f"{folder / name}: there is no image in this folder of a class ({_listed()})")
            self.files += found
            labels += [number] * len(found)
        self.labels = np.array(labels, np.int64)

    @classmethod
    def is_one(cls, path: Path) -> bool:
        """Whether there is an image in a folder of this folder."""
        return path.is_dir() and any(image_files(folder) for folder in path.iterdir() if folder.is_dir())

    def images(self, sample: tuple[int, ...]) -> Images:
        """The images as an array of samples [C,H,W]."""
        return Images(self.files, sample)


def image_files(folder: Path) -> list[Path]:
    """The images in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


class Images:
    """Looks like an array [samples, C, H, W] of uint8; files are read when their samples are. They are scaled, and cut
    at the middle or stretched, to [H,W]. Raises UserError if there is no such image, or no Pillow."""

    dtype = np.dtype(np.uint8)

    def __init__(self, files: list[Path], sample: tuple[int, ...], *, stretched: bool = False) -> None:
        if len(sample) != 3 or sample[0] not in _MODES:
            raise UserError(f"{files[0].parent}: images have 1 or 3 channels, the model wants samples {sample}")
        try:
            from PIL import Image
        except ImportError:
            raise UserError("reading images needs Pillow: pip install 'fusetile[images]'") from None
        self._open, self._files, self._stretched = Image.open, files, stretched
        self.shape = (len(files), *sample)
        self.ndim, self.size = len(self.shape), int(np.prod(self.shape))
        for path in files:  # a file that is no image is found now and not after an hour
            with self._opened(path):
                pass

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: tuple[Any, ...]) -> np.ndarray:
        rows, *inside = index
        return np.stack([self._read(self._files[row])[tuple(inside)] for row in rows])

    def _read(self, path: Path) -> np.ndarray:
        from PIL import ImageOps

        _, channels, height, width = self.shape
        try:
            with self._opened(path) as image:
                upright = ImageOps.exif_transpose(image).convert(_MODES[channels])
                size = width, height
                fitted = np.asarray(upright.resize(size) if self._stretched else ImageOps.fit(upright, size))
        except OSError as error:
            raise UserError(f"{path} is damaged ({error}): remove it, or replace it") from error
        return fitted.reshape(height, width, channels).transpose(2, 0, 1)

    def _opened(self, path: Path) -> Any:
        try:
            return self._open(path)
        except OSError as error:
            raise UserError(f"can't read {path} as an image ({error}): remove it, or replace it") from error


def _listed() -> str:
    return ", ".join(sorted(SUFFIXES))
