"""Folders of images with YOLO's .txt files: what is read, and what is said about lines that are no boxes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fusetile.errors import UserError
from fusetile.program import Buffer, Feed, Program
from fusetile.runtime.data import Data
from fusetile.runtime.detection import Detection
from fusetile.runtime.samples import most_boxes
from fusetile.runtime.storage import make_arena, unpack
from tests.runtime import toy

MOST = 3
NAMES = "names:\n  0: cat\n  1: 'big dog: 2'  # barks\n  2: emu"
NO_BOX = (-1.0, 0, 0, 0, 0)
TEXTS = {"a": "1 0.5 0.25 0.5 0.5\n\n 0 0.1 0.9 0.4 0.1\n", "b": "", "c": "2 0.5 0.5 1 1\r\n"}
TARGETS = np.float32(
    [
        [(1, 0.5, 0.25, 0.5, 0.5), (0, 0.15, 0.9, 0.3, 0.1), NO_BOX],  # what is beyond the left edge is cut off
        [NO_BOX, NO_BOX, NO_BOX],
        [(2, 0.5, 0.5, 1, 1), NO_BOX, NO_BOX],
    ]
)
BOX = ((0, 3), (0, MOST), (0, 5))


def program(*, most: int = MOST, classes: int = 3, batch: int = 3) -> Program:
    image = Buffer("x", ((0, batch), (0, 3), (1, 6), (0, 8)), offset_bytes=0)
    boxes = Buffer("y", ((0, batch), (0, most), (0, 5)), offset_bytes=4096)
    feeds = (
        Feed("input", "image", (batch, 3, 6, 8), image),
        Feed("target", "y", (batch, most, 5), boxes, classes=classes, boxes=True),
    )
    return replace(toy.program(0, ("h:1",)), batch=batch, feeds=feeds, arena_bytes=8192)


def scenes(folder: Path, layout: str = "beside") -> Path:
    """Three pictures of one colour each, the first twice as large as the model's, with the labels above."""
    image = pytest.importorskip("PIL.Image")
    pictures, labels = {
        "beside": (folder / "images", folder / "labels"),
        "together": (folder, folder),
        "deeper": (folder / "images" / "train", folder / "labels" / "train"),
        "yaml": (folder / "images" / "train", folder / "labels" / "train"),
    }[layout]
    for i, (name, text) in enumerate(TEXTS.items()):
        for each in (pictures, labels):
            each.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (8, 12) if i else (16, 6), (10 * i, 20, 30)).save(pictures / f"{name}.png")
        (labels / f"{name}.txt").write_text(text)
    if layout == "yaml":
        path = folder / "digits.yaml"
        path.write_text(f"path: .  # here\ntrain: images/train\nval: list.txt\n\n{NAMES}\ndownload: |\n  no: code\n")
        (folder / "list.txt").write_text("./images/train/b.png\n\nimages/train/c.png\n")
        return path
    return pictures if layout == "deeper" else folder


@pytest.mark.parametrize("layout", ["beside", "together", "deeper", "yaml"])
def test_images_and_boxes(tmp_path: Path, layout: str) -> None:
    folder, made = scenes(tmp_path / "d", layout), program()
    assert most_boxes(folder) == 2
    data, arena = Data(folder, made, shuffle=False), make_arena(made.arena_bytes)
    data.fill(arena, 1, total=1)
    pictures = unpack(arena, made.feeds[0].buffer, made.feeds[0].buffer.box)
    np.testing.assert_allclose(pictures[:, :, 2, 3], np.float32([[0, 20, 30], [10, 20, 30], [20, 20, 30]]) / 255)
    np.testing.assert_allclose(unpack(arena, made.feeds[1].buffer, BOX), TARGETS, atol=1e-6)
    data.close()


def test_boxes_in_an_array_are_filled_up(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=np.zeros((3, 3, 6, 8), np.uint8), y=TARGETS[:, :2])
    assert most_boxes(path) == 2
    made = program()
    data, arena = Data(path, made, shuffle=False), make_arena(made.arena_bytes)
    data.fill(arena, 1, total=1)
    np.testing.assert_array_equal(unpack(arena, made.feeds[1].buffer, BOX), TARGETS)
    for wrong, message in ((2.5, "box 1 of sample 0 is"), (7, "give class .0 to 2")):
        np.savez(path, x=np.zeros((3, 3, 6, 8), np.uint8), y=np.where(TARGETS == 0, np.float32(wrong), TARGETS))
        with pytest.raises(UserError, match=message):
            Data(path, made, shuffle=False)
    np.savez(path, x=np.zeros((3, 3, 6, 8), np.uint8), y=TARGETS * np.float32([1, 1, 1, 0, 1]))
    with pytest.raises(UserError, match="sizes above 0"):
        Data(path, made, shuffle=False)
    np.savez(path, x=np.zeros((3, 3, 6, 8), np.uint8), y=np.tile(TARGETS, (1, 2, 1)))
    with pytest.raises(
        UserError, match=r"'y' has shape \(3, 6, 5\) where the model wants \(samples, 3, 5\); say --max-boxes 6"
    ):
        Data(path, made, shuffle=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.1", r"line 2 has 4 fields where a box has 5: class, centre x"),
        ("0 0.5 0.5 0.1 0.1 0.9", "line 2 has 6 fields"),
        ("cat 0.5 0.5 0.1 0.1", "line 2: 'cat' is no class"),
        ("-1 0.5 0.5 0.1 0.1", "line 2: '-1' is no class"),
        ("0 0,5 0.5 0.1 0.1", "line 2: '0,5 0.5 0.1 0.1' are not four numbers"),
        ("0 120 80 40 30", r"line 2: 120 80 40 30 are no .*from 0 to 1"),
        ("0 0.5 0.5 0 0.1", "sizes above 0"),
        ("0 nan 0.5 0.1 0.1", "line 2: nan"),
        ("3 0.5 0.5 0.1 0.1", "line 2: class 3; the model has 0 to 2"),
        ("\n".join(["0 0.5 0.5 0.1 0.1"] * 3), "a.txt has 4 boxes, and the model room for 3: say --max-boxes 4"),
    ],
)
def test_lines_that_are_no_boxes(tmp_path: Path, line: str, message: str) -> None:
    folder = scenes(tmp_path / "d")
    (folder / "labels" / "a.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(UserError, match=message) as caught:
        Data(folder, program(), shuffle=False)
    assert str(folder / "labels" / "a.txt") in str(caught.value)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    folder = scenes(tmp_path / "d")
    (folder / "labels" / "b.txt").unlink()
    with pytest.raises(UserError, match=r"images/b.png has no labels: .*labels/b.txt; .* an empty file"):
        Data(folder, program(), shuffle=False)
    (folder / "labels" / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"can't read .*b.txt"):
        Data(folder, program(), shuffle=False)
    for name in TEXTS:
        (folder / "labels" / f"{name}.txt").write_text("\n")
    with pytest.raises(UserError, match=r"labels: there is no box in any of the 3 \.txt files"):
        Data(folder, program(), shuffle=False)
    scenes(tmp_path / "e", "deeper")
    with pytest.raises(UserError, match=r"no image in .*e/images; say --data .*e/images/train"):
        Data(tmp_path / "e", program(), shuffle=False)
    (tmp_path / "e" / "data.yaml").write_text("train: images/train\n")
    with pytest.raises(UserError, match=r"no image in .*e/images; say --data .*e/data.yaml"):
        Data(tmp_path / "e", program(), shuffle=False)


def test_what_a_yaml_says(tmp_path: Path) -> None:
    path = scenes(tmp_path / "d", "yaml")
    held_back = Detection(path, "val")
    assert [file.name for file in held_back.files] == ["b.png", "c.png"] and held_back.names[1] == "big dog: 2"
    for train in ("[images/train, list.txt]", "\n- images/train\n- list.txt", "[\n  ../images/train,\n  list.txt,\n]"):
        path.write_text(f"train: {train}\n")
        assert len(Detection(path).files) == 5 and not Detection(path).names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a]\n", r"digits.yaml has no 'train': .* 'train: images/train'"),
        ("train:\n", r"digits.yaml has no 'train'"),
        ("\ntrain: images/none\n", r"digits.yaml, line 2 \(train\): there is no .*d/images/none"),
        ("train: images\n", r"line 1 \(train\): there is no image in .*d/images"),
        ("train: images/train/a.png\n", "neither a folder of images nor a .txt"),
        ("train: broken.txt\n", r"broken.txt, line 2: there is no .*d/nothing.png"),
        ("train: images/train\nnames:\n  1: cat\n", r"line 2 \(names\): give one; or several .* from 0 on"),
        ("train: images/train\nnames: [a, b\n", r"line 2 \(names\)"),
        ("train images\n", r"digits.yaml, line 1: 'train images' is not like 'key: value'"),
    ],
)
def test_yaml_that_says_something_else(tmp_path: Path, text: str, message: str) -> None:
    path = scenes(tmp_path / "d", "yaml")
    path.write_text(text)
    (tmp_path / "d" / "broken.txt").write_text("images/train/a.png\nnothing.png\n")
    with pytest.raises(UserError, match=message):
        Data(path, program(), shuffle=False)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.txt", "cat\nbig dog\n\nemu\n"),
        ("data.yaml", "nc: 3\nnames: [cat, 'big dog', \"emu\"]\nval: x\n"),
        ("data.yaml", "# of a set\nnames:\n  0: cat\n  1: big dog  # barks\n  2: emu\nval: x\n"),
        ("data.yaml", "names:\n- cat\n- big dog\n- 'emu'\nnc: 3\n"),
        ("data.yaml", "names: {0: cat,\n  1: big dog, 2: emu}"),
    ],
)
def test_names_of_classes(tmp_path: Path, file: str, text: str) -> None:
    folder = scenes(tmp_path / "d")
    (folder / file).write_text(text)
    assert Detection(folder).names == ["cat", "big dog", "emu"]
    with pytest.raises(UserError, match="has 3 names of classes, the model 4 classes"):
        Data(folder, program(classes=4), shuffle=False)
