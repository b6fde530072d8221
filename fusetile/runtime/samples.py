"""The samples of a training: an .npz file, a folder of .npy files, or a folder of images; as columns, one for each
thing that the model is fed. They are checked here, before anything is computed; of images, as far as that can be done
without decoding them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from fusetile.box import Box
from fusetile.errors import UserError
from fusetile.program import Feed
from fusetile.runtime.arrays import Array, Kind, open_arrays
from fusetile.runtime.augment import Augmentation, Change
from fusetile.runtime.data_yaml import Part
from fusetile.runtime.detection import NOTHING, Boxes, Detection
from fusetile.runtime.images import Fit, ImageFolder, Images, Marks, Masks
from fusetile.runtime.pairs import ROLES, Pairs, Patches, is_pair, masked_files

_CHECKED_at_once = 1 << 22  # elements
_UNCOUNTED = 255  # in masks of losses that know of no label to ignore: a pixel of no class


class Column(Protocol):
    """One thing of every sample."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of all samples."""

    @property
    def dtype(self) -> np.dtype:
        """What is read; uint8, where it is no class, stands for numbers from 0 to 1."""

    def read(self, rows: np.ndarray, inside: tuple[slice, ...], changes: Sequence[Change]) -> np.ndarray:
        """A box of the samples `rows`, each changed in its way."""


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


Reader = Callable[[Path, Sequence[Feed]], Mapping[str, Column | np.ndarray]]


class Samples:
    """The columns of feeds, by their keys, with at least as many samples. Raises UserError if anything about them is
    wrong; what is in the files is not looked at if they are `checked`."""

    def __init__(
        self,
        path: Path,
        feeds: Sequence[Feed],
        *,
        least: int,
        part: Part,
        scaling: Scaling,
        augmentation: Augmentation,
        checked: bool = False,
    ) -> None:
        for feed in feeds:
            if feed.role == "input" and not feed.classes:
                scaling.check(feed)
        feeds = list({feed.key: feed for feed in feeds}.values())  # some may get several boxes of the same
        arrays = _open(path, feeds, part)
        self.columns = {feed.key: _find(arrays, feed, feeds, path) for feed in feeds}
        counts = {key: column.shape[0] for key, column in self.columns.items()} or _counts(arrays)
        if len(set(counts.values())) != 1:
            listed = ", ".join(f"{key}: {count}" for key, count in counts.items())
            raise UserError(f"{path}: the arrays have different numbers of samples ({listed or 'there are none'})")
        self.count = next(iter(counts.values()))
        if self.count < least:
            raise UserError(f"{path} has {self.count} samples, fewer than one step of {least}")
        for feed in () if checked else feeds:
            _check(self.columns[feed.key], feed, path, augmentation)


def _open(path: Path, feeds: Sequence[Feed], part: Part) -> Mapping[str, Column | np.ndarray]:
    """Columns, or arrays, by name."""
    reader = _reader(path, part)
    if reader is not None:
        return reader(path, feeds)
    for inner in sorted(path.iterdir()) if path.is_dir() and not any(path.glob("*.npy")) else ():
        if inner.name not in ROLES and _reader(inner, part):
            raise UserError(f"{path} has no images itself, nor arrays; say --data {inner}")
    return open_arrays(path)


def _reader(path: Path, part: Part) -> Reader | None:
    """What reads a folder of images; None if it is none."""
    if Detection.is_one(path):
        return partial(_boxed, part=part)
    if is_pair(path, "images", "masks"):
        return _masked
    if is_pair(path, "input", "target"):
        return _paired
    return _classified if ImageFolder.is_one(path) else None


def most_boxes(path: Path, part: Part = "train") -> int:
    """Of data for a detector: boxes in the sample that has most. Raises UserError if there are no boxes in the data."""
    if Detection.is_one(path):
        return Detection(path, part).most
    arrays = open_arrays(path)
    shapes = [arrays[name].shape for name in arrays if name.startswith("y")]  # y, or y0, y1, ...
    most = [shape[1] for shape in shapes if len(shape) == 3 and shape[2] == 5]
    if not most:
        raise UserError(f"{path} has no boxes: neither images with .txt files, nor an array 'y' [samples, boxes, 5]")
    return max(most)


def check_alike(data: Path, val: Path) -> None:
    """Raises UserError if classes of the data that are held back have other numbers than those to train on."""
    trained, held_back = (_folders_of_classes(path) for path in (data, val))
    if trained and held_back and trained != held_back:
        differing = sorted({*trained} ^ {*held_back})
        raise UserError(
            f"{val} and {data} must have the same folders of classes, which are numbered by name: only one of them has "
            + ", ".join(map(repr, differing))
        )


def _folders_of_classes(path: Path) -> list[str]:
    return ImageFolder.names(path) if _reader(path, "train") is _classified else []


def _classified(path: Path, feeds: Sequence[Feed]) -> dict[str, Column | np.ndarray]:
    """The one input and the one target of a classifier."""
    folder = ImageFolder(path)
    found: dict[str, Column | np.ndarray] = {"y": folder.labels}
    for feed in feeds:
        if feed.role == "input":
            found[feed.key] = Images(folder.files, feed.shape[1:], Fit.CUT)
        elif feed.classes and feed.classes != len(folder.classes):
            raise UserError(f"{path} has {len(folder.classes)} classes, the model {feed.classes}")
    return found


def _boxed(path: Path, feeds: Sequence[Feed], part: Part) -> dict[str, Column | np.ndarray]:
    """The one input and the target, or targets, of a detector."""
    folder = Detection(path, part)
    found: dict[str, Column | np.ndarray] = {}
    for feed in feeds:
        if feed.role == "input":
            found[feed.key] = Images(folder.files, feed.shape[1:], Fit.STRETCHED)
        elif feed.boxes:
            found[feed.key] = folder.targets(feed.shape[1], feed.classes)
        else:
            raise UserError(f"{path} has boxes, which are no targets for this --loss")
    return found or {"y": Boxes(folder.boxes, folder.most)}


def _masked(path: Path, feeds: Sequence[Feed]) -> dict[str, Column | np.ndarray]:
    """The one input and the target, or targets, of a segmentation."""
    files, masks = masked_files(path)
    found: dict[str, Column | np.ndarray] = {}
    for feed in feeds:
        if feed.role == "input":
            found[feed.key] = Images(files, feed.shape[1:], Fit.STRETCHED)
        elif feed.classes and len(feed.shape) == 3:
            found[feed.key] = Masks(masks, feed.shape[1:], feed.classes, feed.ignore)
        elif len(feed.shape) == 4:
            found[feed.key] = Marks(masks, feed.shape[1:], _UNCOUNTED)
        else:
            raise UserError(f"{path}/masks are classes per pixel, which are no targets for this --loss and model; for "
                            "outputs that are images name the folders input and target")  # fmt: skip
    return found or {"y": np.zeros(len(files))}


def _paired(path: Path, feeds: Sequence[Feed]) -> dict[str, Column | np.ndarray]:
    """The one input and the one target of a network from images to images."""
    files = Pairs(path)
    found: dict[str, Column | np.ndarray] = {feed.key: Patches(files, feed.role, feed.shape[1:]) for feed in feeds}
    files.check({feed.role: feed.shape[1:] for feed in feeds})
    return found or {"y": np.zeros(len(files.files["input"]))}


def _find(arrays: Mapping[str, Column | np.ndarray], feed: Feed, feeds: Sequence[Feed], path: Path) -> Column:
    """The column of a feed, checked against what the feed wants."""
    alike = {other.key for other in feeds if other.role == feed.role}
    names = [feed.key, *([{"input": "x", "target": "y"}[feed.role]] if len(alike) == 1 else [])]
    name = next((name for name in names if name in arrays), None)
    if name is None:
        there = ", ".join(repr(name) for name in arrays) or "nothing"
        wanted = " or ".join(repr(name) for name in dict.fromkeys(names))
        raise UserError(f"{path} has no array {wanted} (the {feed.role} of the model); it has {there}")
    found = arrays[name]
    column = _column(found, feed) if isinstance(found, np.ndarray) else found
    if column.shape[1:] != feed.shape[1:] or not column.shape:
        expected = ", ".join(map(str, ("samples", *feed.shape[1:])))
        hint = f"; say --max-boxes {column.shape[1]}" if feed.boxes and column.shape[2:] == (5,) else ""
        raise UserError(f"{path}: {name!r} has shape {column.shape} where the model wants ({expected}){hint}")
    labels = feed.classes and not feed.boxes
    bytes_do = column.dtype == np.uint8 and (feed.role == "input" or not isinstance(column, Array))
    if column.dtype.kind not in ("iu" if labels else "f") and not bytes_do:
        what = "integer class indices" if labels else "floating-point numbers (convert with .astype('float32'))"
        raise UserError(f"{path}: {name!r} has dtype {column.dtype} where the model wants {what}")
    return column


def _column(array: np.ndarray, feed: Feed) -> Column:
    """An array, seen as the feed wants it as far as that is possible."""
    sample = feed.shape[1:]
    if feed.boxes and array.dtype.kind == "f" and array.shape[2:] == sample[1:] and array.shape[1] <= sample[0]:
        return Boxes([boxes[boxes[:, 0] != NOTHING[0]] for boxes in array], sample[0])
    if feed.role == "target" and (fits(array.shape[1:], sample, feed.classes) or _is_deeper(array.shape[1:], sample)):
        array = array.reshape(len(array), *sample)
    if feed.classes:
        return Array(array, Kind.MASK if array.ndim == 3 else Kind.OTHER)
    return Array(array, Kind.IMAGE if array.ndim == 4 else Kind.OTHER)


def fits(shape: tuple[int, ...], sample: tuple[int, ...], classes: int) -> bool:
    """Whether a target has the shape that is wanted of a sample. Where it is numbers and not classes, dimensions of one
    may be there or not: one number is [] or [1]."""
    if classes:
        return shape == sample
    return [size for size in shape if size != 1] == [size for size in sample if size != 1]


def _is_deeper(shape: tuple[int, ...], sample: tuple[int, ...]) -> bool:
    """Whether an output of more than four dimensions, which is kept with its last ones as one, has this shape."""
    last = len(sample) - 1
    return len(shape) > last + 1 > 1 and shape[:last] == sample[:last] and math.prod(shape[last:]) == sample[last]


def _counts(arrays: Mapping[str, Column | np.ndarray]) -> dict[str, int]:
    """Samples per array, for a node that reads none of them and yet must know how long an epoch is."""
    shapes = {name: arrays[name].shape for name in arrays}
    return {name: shape[0] for name, shape in shapes.items() if shape}


def _check(column: Column, feed: Feed, path: Path, augmentation: Augmentation) -> None:
    """Files that can't be read, and values that make no sense."""
    if isinstance(column, Boxes):
        column.check(feed.classes, path)
    elif isinstance(column, Images | Masks | Marks):
        column.check()
    elif isinstance(column, Array):
        if feed.classes:
            _check_classes(column, feed, path)
        elif augmentation.colours and column.kind is Kind.IMAGE and column.dtype != np.uint8:
            raise UserError(
                f"{path}: --augment can change the colours of images and of uint8 arrays, and {feed.key!r} is "
                f"{column.dtype}: leave colours as they are, or store bytes"
            )


def _check_classes(column: Array, feed: Feed, path: Path) -> None:
    rows = max(1, _CHECKED_at_once // max(1, math.prod(column.shape[1:])))
    for start in range(0, column.shape[0], rows):
        part = column.copy(slice(start, start + rows))
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
