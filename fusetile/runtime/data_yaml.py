"""data.yaml of a YOLO dataset: where the images are, and what the classes are called. Of YAML no more than that needs:

path: ../digits       # the root, absolute or seen from this file; without it, this file's folder
train: images/train   # a folder, or a .txt with an image in each line; or several: [a, b], or lines with a dash
val: images/val
names: [cat, dog]     # or lines with a dash, or with numbers: `0: cat`

Other entries are skipped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fusetile.errors import UserError
from fusetile.runtime.images import image_files

Part = Literal["train", "val"]
"""Of a dataset: what is trained on, or what is held back."""
SUFFIXES = frozenset({".yaml", ".yml"})
_COMMENTED = re.compile(r"""((?:'[^']*'|"[^"]*"|(?<=\S)#|[^#])*)(?:#.*)?""")
_ENTRY = re.compile(r"""(['"]?)([^\s'":]+)\1\s*:(?:\s+(.*))?""")
_ITEM = re.compile(r"""(?:-\s+)?(?:(\d+)\s*:\s+)?(['"]?)(.+?)\2""")
_BRACKETS = {"[": "]", "{": "}"}


@dataclass(frozen=True, slots=True)
class _Entry:
    """The number of its line, and its value: what is after the colon, then the lines that belong to it."""

    line: int
    value: list[str]


class DataYaml:
    """A file. Raises UserError if it can't be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._entries = _entries(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"can't read {path}: {error}") from error

    @property
    def names(self) -> list[str]:
        """Those of the classes; none if the file has none. Raises UserError for something else in their place."""
        return self._items("names") if "names" in self._entries else []

    def images(self, part: Part) -> list[Path]:
        """The files of a part. Raises UserError if there are none."""
        if part not in self._entries:
            raise UserError(f"{self.path} has no {part!r}: give a folder of images, as in '{part}: images/{part}'")
        return [image for item in self._items(part) for image in self._images(self._place(part, item), part)]

    def _images(self, place: Path, part: Part) -> list[Path]:
        """In a folder, or in a list, whose lines are paths seen from its folder."""
        if place.is_dir():
            found = image_files(place)
        elif place.suffix == ".txt":
            found = _listed(place)
        else:
            raise self._error(part, f"{place} is neither a folder of images nor a .txt with an image in each line")
        if not found:
            raise self._error(part, f"there is no image in {place}")
        return found

    def _place(self, part: Part, item: str) -> Path:
        """Where an item of a part is. Some writers begin with ../ where they mean the root."""
        root, here = Path(*self._items("path")[:1] if "path" in self._entries else ()), self.path.parent
        roots = dict.fromkeys((here / root, root))  # or as it is seen from where the command was given
        places = [each / way for each in roots for way in (item, item.removeprefix("../"))]
        for place in places:
            if place.exists():
                return place
        raise self._error(part, f"there is no {places[0]}")

    def _items(self, key: str) -> list[str]:
        """The value of an entry: one or several."""
        (first, *more) = self._entries[key].value
        if closing := _BRACKETS.get(first[:1]):
            inside, end, _ = " ".join([first[1:], *more]).partition(closing)
            items = [item.strip() for item in inside.split(",")] if end else [""]
            items = items[:-1] if len(items) > 1 and not items[-1] else items  # after a last comma
        else:
            items = [first, *more] if first else more
        found = [_ITEM.fullmatch(item) for item in items]
        numbers = [item[1] for item in found if item and item[1]]
        if not items or not all(found) or numbers not in ([], [str(i) for i in range(len(items))]):
            raise self._error(
                key, "give one; or several [in, brackets], or in lines with a dash, or with numbers from 0 on"
            )
        return [item[3] for item in found if item]

    def _error(self, key: str, what: str) -> UserError:
        return UserError(f"{self.path}, line {self._entries[key].line} ({key}): {what}")


def _listed(path: Path) -> list[Path]:
    """The images that a .txt names."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        image = path.parent / line.strip()
        if line.strip():
            found.append(image)
            if not image.is_file():
                raise UserError(f"{path}, line {number}: there is no {image}")
    return found


def _entries(path: Path) -> dict[str, _Entry]:
    found: dict[str, _Entry] = {}
    last = _Entry(0, [])
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        match = _COMMENTED.fullmatch(line)
        bare = (match[1] if match else line).rstrip()
        if not bare or bare == "---":
            continue
        if bare[0] in " \t-]}":
            last.value.append(bare.strip())
        elif entry := _ENTRY.fullmatch(bare):
            last = found[entry[2]] = _Entry(number, [(entry[3] or "").strip()])
        else:
            raise UserError(f"{path}, line {number}: {line!r} is not like 'key: value'")
    return {key: entry for key, entry in found.items() if entry.value != [""]}
