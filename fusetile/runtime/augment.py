"""Augmentation: in every epoch a sample is changed in another way, which is drawn from the seed, the epoch and the
sample's number, and from nothing else: a node that needs a part of an image computes the pixels that another one with
the whole image would. All arithmetic of bytes is in whole numbers, for the same result on all processors.

A change is one for all that belongs to a sample: its image, its mask, its boxes, and the image that is its target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from fusetile import philox
from fusetile.errors import UserError

Size = tuple[int, int]  # width, height

_BITS = 14  # of the fractions in whole-number arithmetic
_ONE = 1 << _BITS
_HALF_BITS = _BITS // 2  # of an interpolation's weight along one side
_DRAWS = 9  # numbers per sample
_BLOCKS = -(-_DRAWS // 4)
_GREY = (0.299, 0.587, 0.114)  # luminance of red, green, blue: ITU-R BT.601
_YIQ = np.array([_GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
_RGB = np.linalg.inv(_YIQ)
_COLOUR = ("brightness", "contrast", "saturation")
_KEPT = 0.2  # of a box's area must be in a window, or the box is gone


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to one sample. The window is what is left of an image: `scale` are its sides as parts of what they
    would be without a change, `at` says where it is (0: left or top, 1: right or bottom)."""

    scale: tuple[float, float] = (1.0, 1.0)
    at: tuple[float, float] = (0.5, 0.5)
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0  # of a turn

    def window(self, size: Size, base: tuple[float, float]) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the window in an image of `size` from which `base` would be taken."""
        width, height = (side * part for side, part in zip(base, self.scale, strict=True))
        left, top = (
            max(0.0, at * (whole - part)) for at, whole, part in zip(self.at, size, (width, height), strict=True)
        )
        return left, top, min(left + width, size[0]), min(top + height, size[1])  # whatever has been rounded

    def colours(self, values: np.ndarray) -> np.ndarray:
        """Bytes [C,H,W], one or three channels, in other colours."""
        if self == Change(self.scale, self.at, self.flip):
            return values
        channels = len(values)
        matrix, offset = np.eye(channels), 0.5 * (1 - self.contrast)
        if channels == 3:
            grey = np.tile(np.array(_GREY), (3, 1))
            turn = 2 * math.pi * self.hue
            turned = np.eye(3)
            turned[1:, 1:] = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
            matrix = _RGB @ turned @ _YIQ @ (grey + (matrix - grey) * self.saturation)
        whole = np.rint(matrix * (self.contrast * self.brightness * _ONE)).astype(int).tolist()
        found = np.empty(values.shape, np.uint8)
        wide = values.astype(np.int32)
        for row, channel in zip(whole, found, strict=True):
            total = sum(factor * part for factor, part in zip(row, wide, strict=True))
            np.clip((total + round(255 * offset * _ONE) + _ONE // 2) >> _BITS, 0, 255, out=channel, casting="unsafe")
        return found

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes [n, 5] of class, centre x, centre y, width, height in the window: the parts that are in it."""
        kinds, centres, sizes = boxes[:, :1], boxes[:, 1:3].astype(float), boxes[:, 3:].astype(float)
        left, top, right, bottom = self.window((1, 1), (1.0, 1.0))
        start, extent = np.array([left, top]), np.array([right - left, bottom - top])
        low, high = ((centres + side * sizes / 2 - start) / extent for side in (-1, 1))
        inside = np.clip(low, 0, 1), np.clip(high, 0, 1)
        parts = inside[1] - inside[0]
        found = np.concatenate([kinds, (inside[0] + inside[1]) / 2, parts], 1)
        if self.flip:
            found[:, 1] = 1 - found[:, 1]
        left_over = parts.prod(1) >= _KEPT * (sizes / extent).prod(1)
        return found[left_over & (parts > 0).all(1)].astype(np.float32)


SAME = Change()
"""No change."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How strongly samples are changed. flip: how many are mirrored. crop: by how much the sides of the window can be
    shorter than the image's. brightness, contrast, saturation: by how much the factor can be away from 1. hue: by which
    part of a turn it can be away. All from 0 to 1; 0 is no change."""

    flip: float = 0.0
    crop: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """From "flip,crop=0.3,colour"; names without a number have that of `USUAL`. Raises UserError."""
        found: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            name, _, number = (word.strip() for word in part.partition("="))
            if name not in USUAL:
                raise UserError(f"--augment: there is no {name!r}; choose of {', '.join(USUAL)}, as in flip,crop=0.2")
            try:
                strength = float(number) if number else USUAL[name]
            except ValueError:
                strength = math.nan
            if not 0 <= strength <= _MOST.get(name, 1.0):
                raise UserError(
                    f"--augment {part}: the strength of {name} is a number from 0 to {_MOST.get(name, 1.0)}"
                )
            found |= dict.fromkeys(_COLOUR if name == "colour" else (name,), strength)
        return cls(**found)

    @property
    def text(self) -> str:
        """What `parse` reads."""
        return ",".join(f"{each.name}={getattr(self, each.name)}" for each in fields(self))

    @property
    def colours(self) -> bool:
        """Whether values are changed, and not only places."""
        return any((self.brightness, self.contrast, self.saturation, self.hue))

    def changes(self, rows: Sequence[int] | np.ndarray, *, seed: int, epoch: int) -> list[Change]:
        """Those of samples in an epoch (from 0)."""
        if self == Augmentation():
            return [SAME] * len(rows)
        index = np.asarray(rows)[:, None] * _BLOCKS + np.arange(_BLOCKS)
        words = np.stack(philox.draw(seed=seed, site=philox.AUGMENT, step=epoch, index=index), -1)
        numbers = (words >> np.uint64(8)).astype(float) * 2.0**-24
        return [self._change(each[:_DRAWS]) for each in numbers.reshape(len(index), -1).tolist()]

    def _change(self, u: list[float]) -> Change:
        def around(centre: float, reach: float, drawn: float) -> float:
            return centre + reach * (2 * drawn - 1)

        return Change(
            scale=(1 - self.crop * u[0], 1 - self.crop * u[1]) if self.crop else SAME.scale,
            at=(u[2], u[3]) if self.crop else SAME.at,
            flip=u[4] < self.flip,
            brightness=around(1, self.brightness, u[5]),
            contrast=around(1, self.contrast, u[6]),
            saturation=around(1, self.saturation, u[7]),
            hue=around(0, self.hue, u[8]),
        )


USUAL: Mapping[str, float] = {
    "flip": 0.5,
    "crop": 0.3,
    "colour": 0.4,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.05,
}
"""Strengths where the command line has none; colour is brightness, contrast and saturation."""
_MOST: Mapping[str, float] = {"crop": 0.9, "hue": 0.5}
assert {each.name for each in fields(Augmentation)} == {*USUAL} - {"colour"}


def resampled(image: np.ndarray, change: Change, rows: slice, columns: slice) -> np.ndarray:
    """Rows and columns of a changed image [C,H,W], of its size, interpolated between pixels."""
    height, width = image.shape[1:]
    left, top, right, bottom = change.window((width, height), (width, height))
    above, below, down = _neighbours(top, bottom, height, rows)
    west, east, right_part = _neighbours(left, right, width, columns, flip=change.flip)
    down = down[:, None]
    if image.dtype != np.uint8:
        down, right_part = down.astype(image.dtype), right_part.astype(image.dtype)
        upper, lower = (image[:, i] for i in (above, below))
        strips = upper + (lower - upper) * down
        return strips[:, :, west] + (strips[:, :, east] - strips[:, :, west]) * right_part
    one = 1 << _HALF_BITS
    down, right_part = (np.rint(part * one).astype(np.int32) for part in (down, right_part))
    strips = image[:, above] * (one - down) + image[:, below] * down
    both = strips[:, :, west] * (one - right_part) + strips[:, :, east] * right_part
    return ((both + _ONE // 2) >> _BITS).astype(np.uint8)


def picked(mask: np.ndarray, change: Change, rows: slice, columns: slice) -> np.ndarray:
    """Rows and columns of a changed mask [H,W], of its size: for each the pixel that is next."""
    height, width = mask.shape
    left, top, right, bottom = change.window((width, height), (width, height))
    down = np.floor(_places(top, bottom, height, rows)).astype(int)
    across = np.floor(_places(left, right, width, columns, flip=change.flip)).astype(int)
    return mask[down.clip(0, height - 1)[:, None], across.clip(0, width - 1)]


def _neighbours(
    start: float, end: float, size: int, part: slice, *, flip: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per pixel of a part of a side, between which two pixels of the image it is, and how far from the first."""
    places = (_places(start, end, size, part, flip=flip) - 0.5).clip(0, size - 1)
    first = np.floor(places).astype(int)
    return first, (first + 1).clip(0, size - 1), places - first


def _places(start: float, end: float, size: int, part: slice, *, flip: bool = False) -> np.ndarray:
    """Where the centres of a side's pixels are in the image, of which `start` to `end` become the whole side."""
    pixels = np.arange(size)[part]
    return start + ((size - 1 - pixels if flip else pixels) + 0.5) * ((end - start) / size)
