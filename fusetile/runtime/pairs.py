"""Folders of pairs of images: FOLDER/images/1.jpg with its classes per pixel, FOLDER/masks/1.png; or FOLDER/input/1.png
with the output that it should have, FOLDER/target/1.png. Need Pillow.

A mask is a grey or palette PNG whose values are the numbers of classes. Images and masks are stretched to the model's
size. Of an input and its target patches of the model's sizes are taken as they are: from the middle, or anywhere if
they are augmented with crop. The target's size is to the input's as the model's output to its input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import gcd
from pathlib import Path

from fusetile.errors import UserError
from fusetile.runtime.augment import Size
from fusetile.runtime.images import Fit, Images, for_each, image_files, looked_at, partners

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
        self.files = {"input": inputs, "target": partners(inputs, folder / "target", "target")}
        self._first = looked_at(inputs[0]), looked_at(self.files["target"][0])
        common = [gcd(*sides) for sides in zip(*self._first, strict=True)]
        self.units = {
            role: (size[0] // common[0], size[1] // common[1])
            for role, size in zip(self.files, self._first, strict=True)
        }

    @cached_property
    def sizes(self) -> dict[str, list[Size]]:
        """Of all images. Raises UserError if they do not go together."""
        found = {role: for_each(looked_at, files) for role, files in self.files.items()}
        for files, sizes in zip(zip(*self.files.values(), strict=True), zip(*found.values(), strict=True), strict=True):
            self._check_sizes(files, sizes)
        return found

    def check(self, samples: Mapping[str, tuple[int, ...]]) -> None:
        """Raises UserError if the model's sizes are in other proportions than those of the images."""
        if len(samples) == 2:
            sides = [samples[role][:0:-1] for role in self.files]
            if not self._fit(*sides):
                raise UserError(
                    f"{self._folder}: images of {_x(self._first[0])} have targets of {_x(self._first[1])}, and the "
                    f"model makes {_x(sides[1])} of {_x(sides[0])}"
                )

    def _check_sizes(self, files: Sequence[Path], sizes: Sequence[Size]) -> None:
        if not self._fit(*sizes):
            first = self._first
            raise UserError(
                f"{files[1]} has {_x(sizes[1])} pixels and {files[0]} {_x(sizes[0])}: those of the first pair have "
                f"{_x(first[1])} and {_x(first[0])}, and all must be in the same proportion"
            )

    def _fit(self, size: Sequence[int], target: Sequence[int]) -> bool:
        units = zip(*self.units.values(), strict=True)
        return all(a * v == b * u for a, b, (u, v) in zip(size, target, units, strict=True))


class Patches(Images):
    """Inputs or targets as an array of samples [C,H,W]."""

    def __init__(self, pairs: Pairs, role: str, sample: tuple[int, ...]) -> None:
        super().__init__(pairs.files[role], sample, Fit.PATCH, pairs.units[role])
        self._pairs, self._role = pairs, role

    def check(self) -> None:
        """Raises UserError for images that can't be read, are too small, or do not go with their partners."""
        least = (self.shape[3], self.shape[2])
        for path, size in zip(self._pairs.files[self._role], self._pairs.sizes[self._role], strict=True):
            if size[0] < least[0] or size[1] < least[1]:
                raise UserError(f"{path} has {_x(size)} pixels, less than the model's {_x(least)}")


def _x(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
