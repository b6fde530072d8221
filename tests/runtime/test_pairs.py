"""Folders of images with masks, and of inputs with targets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fusetile.errors import UserError
from fusetile.program import Buffer, Feed, Program
from fusetile.runtime.augment import Augmentation, Change
from fusetile.runtime.data import Data
from tests.runtime import toy

RANDOM = np.random.default_rng(2)
NAMES = ("a", "b", "c")
COLOURS = RANDOM.integers(0, 256, 768, dtype=np.uint8).tolist()
Shape = tuple[int, ...]


def feed(role: str, sample: Shape, *, classes: int = 0, ignore: int | None = None) -> Feed:
    shape = (len(NAMES), *sample)
    key = {"input": "image", "target": "y"}[role]
    buffer = Buffer(key, tuple((0, size) for size in shape), "int32" if classes else "float32")
    return Feed(role, key, shape, buffer, classes, ignore)


def program(*feeds: Feed) -> Program:
    return replace(toy.program(0, ("h:1",)), batch=len(NAMES), feeds=feeds)


def write(folder: Path, values: np.ndarray, *, name: str = "png", palette: bool = False) -> None:
    """One image per sample, under the name of its place."""
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True)
    for stem, sample in zip(NAMES, values, strict=True):
        made = image.fromarray(sample)
        if palette:
            made.putpalette(COLOURS)
        made.save(folder / f"{stem}.{name}")


# -- masks -----------------------------------------------------------------------------------------------------------

SEEN = RANDOM.integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
MASKS = RANDOM.integers(0, 3, (3, 6, 8), dtype=np.uint8)
MASKS[1, 2, 3] = 255


def masked(folder: Path, *, palette: bool = True) -> Path:
    write(folder / "images", SEEN, name="bmp")
    write(folder / "masks", MASKS, palette=palette)
    return folder


def wants(*, classes: int = 3, ignore: int | None = 255, size: tuple[int, int] = (6, 8)) -> Program:
    return program(feed("input", (3, *size)), feed("target", size, classes=classes, ignore=ignore))


@pytest.mark.parametrize("palette", [True, False])
def test_images_and_masks(tmp_path: Path, palette: bool) -> None:
    images, masks = Data(masked(tmp_path / "d", palette=palette), wants(), shuffle=False)._read(1)
    np.testing.assert_array_equal(masks, MASKS)
    np.testing.assert_allclose(images, SEEN.transpose(0, 3, 1, 2) / np.float32(255), rtol=1e-6)


def test_masks_of_another_size_are_of_the_nearest_pixels(tmp_path: Path) -> None:
    images, masks = Data(masked(tmp_path / "d"), wants(size=(12, 4)), shuffle=False)._read(1)
    assert images is not None and images.shape == (3, 3, 12, 4)
    np.testing.assert_array_equal(masks, MASKS[:, np.arange(12) // 2][:, :, 1::2])


@pytest.mark.parametrize("channels", [1, 3])
def test_masks_for_losses_of_maps(tmp_path: Path, channels: int) -> None:
    """One channel: 1 where there is any class but 0; several: 1 where there is the channel's class."""
    made = feed("target", (channels, 6, 8))
    made = replace(made, buffer=replace(made.buffer, box=((0, 3), (channels // 2, channels), (1, 6), (0, 5))))
    _, found = Data(masked(tmp_path / "d"), program(feed("input", (3, 6, 8)), made), shuffle=False)._read(1)
    part = MASKS[:, None, 1:6, :5]
    expected = part > 0 if channels == 1 else part == np.array([1, 2]).reshape(2, 1, 1)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_masks_are_changed_like_their_images(tmp_path: Path) -> None:
    """Images whose pixels are those of the masks: after a change too, but for what is between two pixels."""
    stripes = np.repeat(RANDOM.integers(0, 2, (3, 8, 8), dtype=np.uint8), 8, 1).repeat(8, 2)
    write(tmp_path / "d" / "images", stripes * 200)
    write(tmp_path / "d" / "masks", stripes)
    made = program(feed("input", (1, 64, 64)), feed("target", (64, 64), classes=2))
    usual = Data(tmp_path / "d", made, shuffle=False, augmentation=Augmentation.parse("flip=1,crop=0.5"))
    for step in (1, 2):
        images, masks = usual._read(step)
        assert images is not None and masks is not None
        same = (images[:, 0] > 0.4) == (masks == 1)
        assert same.mean() > 0.97
        assert (masks == stripes[:, :, ::-1]).mean() < 0.8


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"images/b.bmp has no mask: there is no .*masks/b.png"),
        ("class", r"masks/b.png has class 255 at row 2, column 3; the model has 3 classes, 0 to 2; --ignore-index"),
        ("colours", r"masks/c.png is an image of kind PNG RGB; a mask is a grey or palette PNG"),
        ("cut", r"can't read .*masks/a.png as an image"),
        ("noise", r"can't read .*masks/a.png as an image"),
        ("loss", r"d/masks are classes per pixel, which are no targets for this --loss"),
        ("channels", r"masks/a.png has class 2 at row .*; the model has 2 classes"),
    ],
)
def test_masks_that_are_none(tmp_path: Path, what: str, message: str) -> None:
    folder, made = masked(tmp_path / "d"), wants(ignore=None if what == "class" else 255)
    masks = folder / "masks"
    if what == "missing":
        (masks / "b.png").unlink()
    if what == "colours":
        (masks / "c.png").unlink()
        write(tmp_path / "e", SEEN)
        (tmp_path / "e" / "c.png").rename(masks / "c.png")
    if what == "cut":
        (masks / "a.png").write_bytes((masks / "a.png").read_bytes()[:-40])
    if what == "noise":
        (masks / "a.png").write_bytes(b"no png")
    if what == "loss":
        made = program(made.feeds[0], feed("target", (3,)))
    if what == "channels":
        made = program(made.feeds[0], feed("target", (2, 6, 8)))
    with pytest.raises(UserError, match=message):
        Data(folder, made, shuffle=False)._read(1)


# -- inputs and targets ----------------------------------------------------------------------------------------------


def enlarged(folder: Path, *, small: tuple[int, int] = (10, 9)) -> np.ndarray:
    """Inputs [3,10,9,3] and targets with every pixel three times three times."""
    inputs = RANDOM.integers(0, 256, (3, *small, 3), dtype=np.uint8)
    write(folder / "input", inputs)
    write(folder / "target", inputs.repeat(3, 1).repeat(3, 2))
    return inputs


def test_patches_of_inputs_and_targets_are_of_the_same_place(tmp_path: Path) -> None:
    """Bytes become 0 to 1 on both sides, and --mean is for inputs only. Without a change it is the middle."""
    inputs = enlarged(tmp_path / "d").transpose(0, 3, 1, 2)
    made = program(feed("input", (3, 4, 5)), feed("target", (3, 12, 15)))
    small, large = Data(tmp_path / "d", made, shuffle=False)._read(1)
    np.testing.assert_allclose(small, inputs[:, :, 3:7, 2:7] / np.float32(255), rtol=1e-6)
    np.testing.assert_array_equal(small.repeat(3, 2).repeat(3, 3), large)
    augmented = Data(tmp_path / "d", made, shuffle=False, augmentation=Augmentation.parse("flip,crop,colour"))
    seen = set()
    for step in range(1, 7):
        small, large = augmented._read(step)
        np.testing.assert_array_equal(small.repeat(3, 2).repeat(3, 3), large)
        seen |= {patch.tobytes() for patch in small}
    assert len(seen) == 18


def test_the_places_of_patches(tmp_path: Path) -> None:
    inputs = enlarged(tmp_path / "d").transpose(0, 3, 1, 2)
    columns = Data(
        tmp_path / "d", program(feed("input", (3, 4, 5)), feed("target", (3, 12, 15))), shuffle=False
    )._columns
    whole, corner = (slice(None),) * 3, [Change(scale=(0.8, 0.7), at=(1.0, 0.0))]
    np.testing.assert_array_equal(columns["image"].read(np.array([2]), whole, corner)[0], inputs[2, :, :4, 4:])
    tripled = inputs[2, :, :4, 4:].repeat(3, 1).repeat(3, 2)
    np.testing.assert_array_equal(columns["y"].read(np.array([2]), whole, corner)[0], tripled)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"input/b.png has no target: there is no .*target/b.png"),
        ("small", r"input/a.png has 3x10 pixels, less than the model's 5x4"),
        ("other", r"target/c.png has 27x29 pixels and .*input/c.png 9x10: those of the first pair have 27x30 and 9x10"),
        ("factor", r"images of 9x10 have targets of 27x30, and the model makes 10x8 of 5x4"),
        ("flat", r"images have 1 or 3 channels, the model wants samples \(10,\)"),
    ],
)
def test_pairs_that_do_not_fit(tmp_path: Path, what: str, message: str) -> None:
    enlarged(tmp_path / "d", small=(10, 3) if what == "small" else (10, 9))
    target: Shape = {"factor": (3, 8, 10), "flat": (10,)}.get(what, (3, 12, 15))
    if what == "missing":
        (tmp_path / "d" / "target" / "b.png").unlink()
    if what == "other":
        image = pytest.importorskip("PIL.Image")
        image.new("RGB", (27, 29)).save(tmp_path / "d" / "target" / "c.png")
    with pytest.raises(UserError, match=message):
        Data(tmp_path / "d", program(feed("input", (3, 4, 5)), feed("target", target)), shuffle=False)
