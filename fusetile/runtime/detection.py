"""A folder of images with boxes in YOLO's format: FOLDER/images/1.jpg with FOLDER/labels/1.txt, or both in one folder;
or FOLDER/images/train with FOLDER/labels/train, when the former is given; or what a data.yaml says. Pictures need
Pillow.

Each line of a .txt is an object: its class (0, 1, ...), then its centre's x and y, its width and its height, as parts
of the image's width and height. An image without objects has an empty file. The names of the classes, if there are
any, are the lines of classes.txt, or `names` in data.yaml.

A sample's boxes are an array [most, 5] of float32, rows of (class, centre x, centre y, width, height), of which those
after the last object are (-1, 0, 0, 0, 0); an array 'y' in an .npz is the same. Pictures are stretched to the model's
size, which boxes do not notice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fusetile.errors import UserError
from fusetile.runtime.augment import SAME, Change
from fusetile.runtime.data_yaml import SUFFIXES, DataYaml, Part
from fusetile.runtime.images import ImageFolder, image_files

NOTHING = (-1.0, 0.0, 0.0, 0.0, 0.0)
"""The row of no object."""
_OVER = 1e-3  # of a picture: what rounding may add to the size of a box


class Detection:
    """The pictures, their boxes, and the names of the classes, if there are any. Raises UserError for a folder, or a
    data.yaml, that can't be used."""

    def __init__(self, path: Path, part: Part = "train") -> None:
        self.path, self.files, self.names = path, *_found(path, part)
        labels = {folder: _labels_of(folder) for folder in {file.parent for file in self.files}}
        self.texts = [labels[file.parent] / f"{file.stem}.txt" for file in self.files]
        self.boxes = [np.array([box for _, box in _read(*pair)], np.float32) for pair in self._pairs()]
        if not self.most:
            raise UserError(f"{self.texts[0].parent}: there is no box in any of the {len(self.texts)} .txt files")

    @classmethod
    def is_one(cls, path: Path) -> bool:
        """Whether there are labels beside the images of this folder, or images right in it and nothing else to use."""
        if (path / "images").is_dir() and (path / "labels").is_dir():
            return True
        if path.is_file():
            return path.suffix in SUFFIXES
        return (
            path.is_dir() and bool(image_files(path)) and not ImageFolder.is_one(path) and not any(path.glob("*.npy"))
        )

    @property
    def most(self) -> int:
        """Boxes in the picture that has most."""
        return max(map(len, self.boxes))

    def targets(self, most: int, classes: int) -> Boxes:
        """The boxes as an array [samples, most, 5]. Raises UserError if a picture has more, or one of another class."""
        if self.names and len(self.names) != classes:
            raise UserError(f"{self.path} has {len(self.names)} names of classes, the model {classes} classes")
        for text, boxes in zip(self.texts, self.boxes, strict=True):
            if len(boxes) > most:
                raise UserError(
                    f"{text} has {len(boxes)} boxes, and the model room for {most}: say --max-boxes {self.most}"
                )
            if len(boxes) and boxes[:, 0].max() >= classes:
                line, box = next(each for each in _read(text, text) if each[1][0] >= classes)
                raise UserError(f"{text}, line {line}: class {box[0]:.0f}; the model has 0 to {classes - 1}")
        return Boxes(self.boxes, most)

    def _pairs(self) -> Iterator[tuple[Path, Path]]:
        return zip(self.texts, self.files, strict=True)


class Boxes:
    """Looks like an array [samples, most, 5] of float32; `boxes` are those [n, 5] of each sample."""

    dtype, ndim = np.dtype(np.float32), 3

    def __init__(self, boxes: Sequence[np.ndarray], most: int) -> None:
        self._ends = np.cumsum([0, *map(len, boxes)])
        self._rows = np.concatenate([each.reshape(-1, 5) for each in boxes])
        self.shape = (len(boxes), most, 5)

    def read(self, rows: np.ndarray, inside: tuple[slice, ...], changes: Sequence[Change]) -> np.ndarray:
        """A box of some samples."""
        found = np.tile(np.array(NOTHING, np.float32), (len(rows), self.shape[1], 1))
        for filled, row, change in zip(found, rows, changes, strict=True):
            boxes = self._rows[self._ends[row] : self._ends[row + 1]]
            boxes = boxes if change == SAME else change.boxes(boxes)
            filled[: len(boxes)] = boxes
        return found[(slice(None), *inside)]

    def check(self, classes: int, path: Path) -> None:
        """Raises UserError for boxes that are none."""
        kinds, sizes = self._rows[:, 0], self._rows[:, 1:]
        good = (kinds >= 0) & (kinds < classes) & (kinds % 1 == 0) & ((sizes >= 0) & (sizes <= 1 + _OVER)).all(1)
        good &= (sizes[:, 2:] > 0).all(1)
        for row in np.flatnonzero(~good)[:1].tolist():
            sample = int(np.searchsorted(self._ends, row, "right")) - 1
            raise UserError(
                f"{path}: box {row - self._ends[sample]} of sample {sample} is {self._rows[row].tolist()}; give class "
                f"(0 to {classes - 1}, or -1 for no box), centre x, centre y, width and height, as parts of the image "
                "from 0 to 1, sizes above 0"
            )


def _found(path: Path, part: Part) -> tuple[list[Path], list[str]]:
    """The pictures, and the names of the classes."""
    if path.is_file():
        dataset = DataYaml(path)
        return dataset.images(part), dataset.names
    pictures = path / "images" if (path / "images").is_dir() and (path / "labels").is_dir() else path
    files = image_files(pictures)
    if not files:
        inner = [each for each in (path / "data.yaml",) if each.is_file()]
        inner += [each for each in sorted(pictures.iterdir()) if each.is_dir() and image_files(each)]
        raise UserError(f"there is no image in {pictures}" + (f"; say --data {inner[0]}" if inner else ""))
    return files, _names(path, _labels_of(pictures))


def _labels_of(pictures: Path) -> Path:
    """Where the labels of a folder's pictures are: in a folder beside it or above it, or in it."""
    for parts in (pictures.parts, pictures.absolute().parts):
        for i in (i for i in reversed(range(len(parts))) if parts[i] == "images"):
            beside = Path(*parts[:i], "labels", *parts[i + 1 :])
            if beside.is_dir():
                return beside
    return pictures


def _read(text: Path, picture: Path) -> Iterator[tuple[int, list[float]]]:
    """The lines of a .txt: their numbers, and class, centre x and y, width and height of the part of each box that is
    in the picture."""
    try:
        lines = text.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(
            f"{picture} has no labels: there is no {text}; an image without objects has an empty file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read {text} as labels: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, _box(line.split(), f"{text}, line {number}")


def _box(words: list[str], where: str) -> list[float]:
    form = "class, centre x, centre y, width, height"
    if len(words) != 5:
        raise UserError(f"{where} has {len(words)} fields where a box has 5: {form}")
    if not words[0].isdecimal():
        raise UserError(f"{where}: {words[0]!r} is no class, a whole number of at least 0, then {form[7:]}")
    try:
        x, y, width, height = map(float, words[1:])
    except ValueError:
        raise UserError(f"{where}: {' '.join(words[1:])!r} are not four numbers: {form[7:]}") from None
    if not (0 <= x <= 1 and 0 <= y <= 1 and 0 < width <= 1 + _OVER and 0 < height <= 1 + _OVER):
        raise UserError(
            f"{where}: {' '.join(words[1:])} are no {form[7:]} as parts of the picture (from 0 to 1, sizes above 0)"
        )
    (x, width), (y, height) = _within(x, width), _within(y, height)
    return [float(words[0]), x, y, width, height]


def _within(centre: float, size: float) -> tuple[float, float]:
    """What is from 0 to 1 of a range: its centre and size."""
    start, end = centre - size / 2, centre + size / 2
    if start >= 0 and end <= 1:
        return centre, size
    start, end = max(0.0, start), min(1.0, end)
    return (start + end) / 2, end - start


def _names(folder: Path, labels: Path) -> list[str]:
    """The names of the classes, if a file says them."""
    near = (folder, labels, folder.absolute().parent)
    for path in (each / "classes.txt" for each in near[:2]):
        if path.is_file():
            return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    files = (each / "data.yaml" for each in (near[0], near[2], near[2].parent))
    return next((DataYaml(path).names for path in files if path.is_file()), [])
