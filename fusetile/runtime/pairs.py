"""Folders of pairs of images: FOLDER/images/1.jpg with its classes per pixel, FOLDER/masks/1.png; or FOLDER/input/1.png
with the output that it should have, FOLDER/target/1.png. Need Pillow.

A mask is a grey or palette PNG whose values are the numbers of classes. Images and masks are stretched to the model's
size. Of an input and its target patches of the model's sizes are taken as they are: from the middle, or anywhere if
they are augmented with crop. The target's size is to the input's as the model's output to its input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from pathlib import Path

from fusetile.errors import UserError
from fusetile.runtime.augment import Size
from fusetile.runtime.images import Fit, Images, image_files, looked_at, partners

ROLES = frozenset({"images", "labels", "masks", "input", "target"})
"""Names of folders that are a part of what is with them."""


def is_pair(path: Path, first: str, second: str) -> bool:
    """Whether there are two such folders with images in a folder."""
    return all((path / name).is_dir() and image_files(path / name) for name in (first, second))


def masked_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Images, and their masks."""
    files = image_files(folder / "images")
    return files, partners(files, folder / "masks", "mask")


class Pairs:
    """The files of inputs and targets. Raises UserError if one is missing."""

    def __init__(self, folder: Path) -> None:
        inputs = image_files(folder / "input")
        self._folder = folder
        self._files = {"input": inputs, "target": partners(inputs, folder / "target", "target")}
        self.sizes = [tuple(map(looked_at, pair)) for pair in zip(*self._files.values(), strict=True)]
        first = self.sizes[0]
        common = [gcd(*sides) for sides in zip(*first, strict=True)]
        self._units = {
            role: (size[0] // common[0], size[1] // common[1]) for role, size in zip(self._files, first, strict=True)
        }
        for pair, sizes in zip(zip(*self._files.values(), strict=True), self.sizes, strict=True):
            self._check_sizes(pair, sizes)

    def patches(self, role: str, sample: tuple[int, ...]) -> Images:
        """Inputs or targets as an array of samples [C,H,W]. Raises UserError for images that are too small."""
        for path, sizes in zip(self._files[role], self.sizes, strict=True):
            width, height = sizes[role == "target"]
            if len(sample) == 3 and (width < sample[2] or height < sample[1]):
                raise UserError(f"{path} has {width}x{height} pixels, less than the model's {sample[2]}x{sample[1]}")
        return Images(self._files[role], sample, Fit.PATCH, self._units[role])

    def check(self, samples: Mapping[str, tuple[int, ...]]) -> None:
        """Raises UserError if the model's sizes are in other proportions than those of the images."""
        if len(samples) == 2:
            sides = [samples[role][:0:-1] for role in self._files]
            if not self._fit(*sides):
                raise UserError(
                    f"{self._folder}: images of {_x(self.sizes[0][0])} have targets of {_x(self.sizes[0][1])}, and the "
                    f"model makes {_x(sides[1])} of {_x(sides[0])}"
                )

    def _check_sizes(self, files: Sequence[Path], sizes: Sequence[Size]) -> None:
        if not self._fit(*sizes):
            first = self.sizes[0]
            raise UserError(
                f"{files[1]} has {_x(sizes[1])} pixels and {files[0]} {_x(sizes[0])}: those of the first pair have "
                f"{_x(first[1])} and {_x(first[0])}, and all must be in the same proportion"
            )

    def _fit(self, size: Sequence[int], target: Sequence[int]) -> bool:
        units = zip(*self._units.values(), strict=True)
        return all(a * v == b * u for a, b, (u, v) in zip(size, target, units, strict=True))


def _x(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
