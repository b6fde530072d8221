"""Augmentation: drawn by sample and epoch, the same in every part of an image, consistent for all of a sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fusetile.errors import UserError
from fusetile.runtime.augment import SAME, Augmentation, Change, picked, resampled
from fusetile.runtime.data import Data
from fusetile.runtime.detection import Boxes
from tests.runtime.test_data import X, Y, program, save

WHOLE = slice(None)
ALL = Augmentation.parse("flip,crop=0.5,colour,hue=0.1")
IMAGE = np.random.default_rng(1).integers(0, 256, (3, 20, 30), dtype=np.uint8)


def test_options() -> None:
    assert Augmentation.parse("") == Augmentation() and not Augmentation().colours
    found = Augmentation.parse("crop=0.25, flip,colour")
    assert (found.crop, found.flip, found.brightness, found.saturation, found.hue) == (0.25, 0.5, 0.4, 0.4, 0)
    assert Augmentation.parse(found.text) == found
    for text, message in (
        ("flop", "there is no 'flop'; choose of flip, crop"),
        ("crop=1", "--augment crop=1: .* from 0 to 0.9"),
        ("flip=x", "strength of flip"),
        ("hue=-0.1", "from 0 to 0.5"),
    ):
        with pytest.raises(UserError, match=message):
            Augmentation.parse(text)


def test_changes_are_those_of_sample_and_epoch() -> None:
    """In whatever batch a sample comes; another one in each epoch; over many samples as strong as was said."""
    some, other = ALL.changes([7, 3, 9], seed=5, epoch=2), ALL.changes([3], seed=5, epoch=2)
    assert some[1] == other[0]
    for seed, epoch in ((5, 3), (6, 2)):
        assert ALL.changes([3], seed=seed, epoch=epoch) != other
    many = ALL.changes(range(2000), seed=0, epoch=0)
    assert 0.46 < np.mean([change.flip for change in many]) < 0.54
    for values, low, high in (
        ([change.scale[0] for change in many], 0.5, 1),
        ([change.at[1] for change in many], 0, 1),
        ([change.contrast for change in many], 0.6, 1.4),
        ([change.hue for change in many], -0.1, 0.1),
    ):
        spread = (high - low) / 100
        assert low <= min(values) < low + spread and high - spread < max(values) <= high
        assert abs(np.mean(values) - (low + high) / 2) < 2 * spread


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_parts_are_those_of_the_whole(dtype: type) -> None:
    image = IMAGE.astype(dtype)
    for change in ALL.changes(range(6), seed=1, epoch=1):
        whole = resampled(image, change, WHOLE, WHOLE)
        part = resampled(image, change, slice(3, 11), slice(17, 30))
        np.testing.assert_array_equal(part, whole[:, 3:11, 17:30])
        if dtype == np.uint8:
            np.testing.assert_array_equal(change.colours(part), change.colours(whole)[:, 3:11, 17:30])
            mask = picked(image[0], change, slice(3, 11), slice(17, 30))
            np.testing.assert_array_equal(mask, picked(image[0], change, WHOLE, WHOLE)[3:11, 17:30])


def test_windows() -> None:
    """Of an image whose values are its places: what is where afterwards."""
    change = Change(scale=(0.5, 0.25), at=(1.0, 0.0), flip=True)
    assert change.window((40, 20), (40, 20)) == (20, 0, 40, 5)
    places = np.stack(np.meshgrid(np.arange(0.5, 40), np.arange(0.5, 20))).astype(np.float32)  # x, y of the pixels
    x, y = resampled(places, change, WHOLE, WHOLE)
    np.testing.assert_allclose(x[0, 1:], 40 - (np.arange(1, 40) + 0.5) / 2, atol=1e-5)
    np.testing.assert_allclose(y[2:, 0], (np.arange(2, 20) + 0.5) / 4, atol=1e-5)
    np.testing.assert_array_equal(picked(places[0].astype(int), change, WHOLE, WHOLE)[0, :4], [39, 39, 38, 38])
    np.testing.assert_array_equal(resampled(places, SAME, WHOLE, WHOLE), places)
    np.testing.assert_array_equal(resampled(places, Change(flip=True), WHOLE, WHOLE), places[:, :, ::-1])


def test_windows_are_within_the_image() -> None:
    """Pillow refuses those that are not, be it by a rounding error."""
    for width in range(40, 1400, 7):
        size = width, width * 3 // 4 + 5
        for side in (33, 224, 416):
            part = min(size[0] / side, size[1] / side)
            for change in (SAME, Change(at=(1.0, 1.0), scale=(0.7, 0.9))):
                left, top, right, bottom = change.window(size, (side * part, side * part))
                assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_boxes_go_with_the_pixels() -> None:
    """A box around a bright rectangle is around it afterwards, or what is in the window of it."""
    image, box = np.zeros((1, 200, 300), np.float32), np.float32([[4, 0.5, 0.4, 0.2, 0.3]])
    image[:, 50:110, 120:180] = 1
    for change in ALL.changes(range(8), seed=3, epoch=0):
        pixels = np.argwhere(resampled(image, change, WHOLE, WHOLE)[0] > 0.5)
        found = change.boxes(box)
        if not len(found):
            left, top, right, bottom = change.window((300, 200), (300, 200))
            seen = max(0, min(right, 180) - max(left, 120)) * max(0, min(bottom, 110) - max(top, 50))
            assert seen < 0.2 * 60 * 60 + 1
            continue
        low, high = pixels.min(0) / (200, 300), (pixels.max(0) + 1) / (200, 300)
        np.testing.assert_allclose(found[0, 1:3], ((low + high) / 2)[::-1], atol=0.01)
        np.testing.assert_allclose(found[0, 3:], (high - low)[::-1], atol=0.015)
        assert found[0, 0] == 4
    (row,) = Boxes([box], 2).read(np.array([0]), (slice(0, 2), slice(0, 5)), [Change(flip=True)])
    np.testing.assert_allclose(row, [(4, 0.5, 0.4, 0.2, 0.3), (-1, 0, 0, 0, 0)], atol=1e-6)


def test_colours() -> None:
    """Against the same in floating point, done one after the other, where nothing is cut off."""
    values = IMAGE // 4 + 96
    numbers = values / 255
    change = Change(brightness=1.1, contrast=0.8, saturation=0.5)
    grey = np.tensordot([0.299, 0.587, 0.114], numbers, 1)
    expected = ((grey + (numbers - grey) * 0.5) * 1.1 * 0.8 + 0.5 * 0.2) * 255
    assert np.abs(change.colours(values) - expected).max() <= 0.51
    turned = Change(hue=1 / 3).colours(values).astype(float)
    np.testing.assert_allclose(
        np.tensordot([0.299, 0.587, 0.114], turned, 1), grey * 255, atol=1
    )  # as bright as before
    assert np.abs(turned - values).max() > 10
    np.testing.assert_array_equal(Change(hue=1.0).colours(values), values)
    assert Change(brightness=1.5).colours(np.full((1, 1, 1), 200, np.uint8)).item() == 255


def test_training_data_are_changed(tmp_path: Path) -> None:
    """Inputs, classes per pixel, and not other targets; boxes of a batch are those of the whole."""
    x = (X * 255).astype(np.uint8)
    masks = x[:, 0] % 3
    made = program()
    pixels = replace(made.feeds[1], shape=(4, 5, 4), classes=3)
    pixels = replace(pixels, buffer=replace(pixels.buffer, box=((1, 4), (0, 5), (1, 3))))
    made = replace(made, feeds=(made.feeds[0], pixels))
    path = save(tmp_path / "d", "npz", x=x, y=masks)
    image, mask = Data(path, made, shuffle=True, augmentation=ALL)._read(4)
    plain = Data(path, made, shuffle=True)
    rows = plain.rows(4)[1:4]
    for row, found, classes in zip(rows, image, mask, strict=True):
        (change,) = ALL.changes([row], seed=made.seed, epoch=1)
        assert change != SAME
        expected = change.colours(resampled(x[row], change, WHOLE, WHOLE)) / np.float32(255)
        np.testing.assert_allclose(found, expected[:, 1:4], rtol=1e-6)
        np.testing.assert_array_equal(classes, picked(masks[row], change, WHOLE, WHOLE)[:, 1:3])
    np.testing.assert_array_equal(plain._read(4)[1], masks[rows][:, :, 1:3])
    save(tmp_path / "e", "npz", x=X, y=Y)
    with pytest.raises(UserError, match="colours of images and of uint8 arrays, and 'image' is float32"):
        Data(tmp_path / "e.npz", program(), shuffle=True, augmentation=ALL)
