"""Training data: what is read, and what is said about data that do not fit."""

from __future__ import annotations

import errno
import threading
import time
from dataclasses import replace
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusetile.box import Box
from fusetile.errors import UserError
from fusetile.philox import permutation
from fusetile.program import Buffer, Feed, Program
from fusetile.rates import Rates
from fusetile.runtime.augment import SAME, Change
from fusetile.runtime.data import Data
from fusetile.runtime.images import Fit, Images
from fusetile.runtime.samples import Scaling
from fusetile.runtime.storage import make_arena, unpack
from tests.runtime import toy

X = np.random.default_rng(0).random((10, 3, 5, 4)).astype(np.float32)
Y = np.arange(10) % 4
BOX: Box = ((1, 4), (0, 3), (1, 4), (0, 4))


def program(*feeds: Feed, batch: int = 4) -> Program:
    image = Buffer("x", BOX, block=(1, 3), border=(1, 1), offset_bytes=0)
    label = Buffer("y", ((1, 4),), "int32", offset_bytes=4096)
    default = (
        Feed("input", "image", (batch, 3, 5, 4), image),
        Feed("target", "y", (batch,), label, classes=4),
        Feed("learning_rate", "", (), Buffer("rate", (), offset_bytes=4160)),
        Feed("step", "", (), Buffer("step", (), "int32", offset_bytes=4224)),
    )
    return replace(
        toy.program(0, ("h:1",)), batch=batch, feeds=feeds or default, arena_bytes=5000, rates=Rates(learning_rate=0.5)
    )


def save(path: Path, kind: str, **arrays: np.ndarray) -> Path:
    """The arrays as an .npz, a compressed one, or a folder."""
    if kind == "folder":
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
    else:
        (np.savez_compressed if kind == "compressed" else np.savez)(path.with_suffix(".npz"), **arrays)
        path = path.with_suffix(".npz")
    return path


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_a_file_that_was_read_takes_no_memory(tmp_path: Path, kind: str) -> None:
    """Eight samples of 4 MB, one after another."""
    targets = np.zeros((8, 2 << 20), np.float16)
    label = Buffer("y", ((0, 1), (0, 2 << 20)), offset_bytes=0)
    made = program(Feed("target", "y", (1, 2 << 20), label), batch=1)
    data = Data(save(tmp_path / "d", kind, y=targets), made, shuffle=False)
    mapped = []
    for step in range(1, 9):
        data._read(step)
        status = Path("/proc/self/status").read_text().splitlines()
        mapped.append(int(next(line for line in status if "RssFile" in line).split()[1]))
    assert mapped[-1] - mapped[0] < 3_000, mapped
    data.close()


@pytest.mark.parametrize("kind", ["npz", "compressed", "folder"])
@pytest.mark.parametrize("name", ["image", "x"])
def test_boxes_of_the_shuffled_batch_are_read(tmp_path: Path, kind: str, name: str) -> None:
    made = program()
    data = Data(save(tmp_path / "d", kind, **{name: X, "y": Y}), made, shuffle=True)
    assert data.steps_per_epoch == 2 and data.count == 10
    arena = make_arena(made.arena_bytes)
    for step, (epoch, position) in {1: (0, 0), 2: (0, 4), 5: (2, 0), 3: (1, 0)}.items():
        data.fill(arena, step, total=9)
        rows = permutation(seed=3, epoch=epoch, count=10)[position : position + 4][1:4]
        np.testing.assert_array_equal(unpack(arena, made.feeds[0].buffer, BOX), X[rows][:, :, 1:4])
        np.testing.assert_array_equal(unpack(arena, made.feeds[1].buffer, ((1, 4),)), Y[rows])
        assert unpack(arena, made.feeds[2].buffer, ()) == np.float32(0.5)
        assert unpack(arena, made.feeds[3].buffer, ()) == step


@pytest.mark.parametrize("shape", [(10,), (10, 1), (10, 1, 1)])
def test_targets_of_one_number(tmp_path: Path, shape: tuple[int, ...]) -> None:
    target = Feed("target", "y", (4, 1), Buffer("y", ((0, 4), (0, 1)), offset_bytes=4096))
    path = save(tmp_path / "d", "npz", image=X, y=X[:, 0, 0, 0].reshape(shape))
    _, targets = Data(path, program(program().feeds[0], target), shuffle=False)._read(1)
    np.testing.assert_array_equal(targets, X[:4, 0, 0, :1])


def test_in_order_and_fortran_and_other_floats(tmp_path: Path) -> None:
    made = program()
    data = Data(
        save(tmp_path / "d", "npz", image=np.asfortranarray(X.astype(np.float64)), y=Y.astype(np.uint8)),
        made,
        shuffle=False,
    )
    arena = make_arena(made.arena_bytes)
    data.fill(arena, 2, total=9)
    np.testing.assert_array_equal(unpack(arena, made.feeds[0].buffer, BOX), X[5:8, :, 1:4])


def test_uncompressed_arrays_are_mapped_not_loaded(tmp_path: Path) -> None:
    data = Data(save(tmp_path / "d", "npz", image=X, y=Y), program(), shuffle=False)
    assert all(isinstance(getattr(column, "mapping", None), mmap) for column in data._columns.values())


def test_a_node_without_feeds_counts_the_samples(tmp_path: Path) -> None:
    made = replace(program(), feeds=())
    assert Data(save(tmp_path / "d", "npz", image=X, y=Y), made, shuffle=True).count == 10


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": X}, r"has no array 'y' \(the target of the model\); it has 'image'"),
        ({"y": Y}, r"has no array 'image' or 'x' \(the input of the model\); it has 'y'"),
        ({"image": X[:, :2], "y": Y}, r"'image' has shape \(10, 2, 5, 4\) where the model wants \(samples, 3, 5, 4\)"),
        ({"image": X, "y": Y.reshape(10, 1)}, r"'y' has shape \(10, 1\) where the model wants \(samples\)"),
        ({"image": X.astype(np.int32), "y": Y}, "'image' has dtype int32 where the model wants floating-point"),
        ({"image": X, "y": Y.astype(np.float32)}, "'y' has dtype float32 where the model wants integer class"),
        ({"image": X, "y": Y + 1}, "'y' has class 4 at sample 3; the model has 4 classes, 0 to 3"),
        ({"image": X, "y": Y - 1}, "'y' has class -1 at sample 0"),
        ({"image": X, "y": Y[:9]}, "different numbers of samples .image: 10, y: 9"),
        ({"image": X[:3], "y": Y[:3]}, "has 3 samples, fewer than one step of 4"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Data(save(tmp_path / "d", "npz", **arrays), program(), shuffle=True)
    assert str(tmp_path / "d.npz") in str(caught.value) and caught.value.exit_status == 2


def test_a_wrong_pixel_is_named(tmp_path: Path) -> None:
    masks = np.zeros((10, 5, 4), np.int64)
    masks[6, 2, 3] = 9
    feed = Feed("target", "y", (4, 5, 4), Buffer("y", ((0, 4), (0, 5), (0, 4)), "int32", offset_bytes=0), classes=3)
    with pytest.raises(UserError, match=r"class 9 at sample 6, pixel \(2, 3\)"):
        Data(save(tmp_path / "d", "npz", y=masks), program(feed), shuffle=True)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "noise.npz").write_bytes(b"not a zip file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.npy").write_bytes(b"\x93NUMPY\x01")
    whole = save(tmp_path / "whole", "compressed", image=X, y=Y)
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:300])
    for name, message in {
        "missing.npz": "there is no data file",
        "noise.npz": "neither an .npz file nor a folder",
        "cut.npz": "cut.npz is cut off: copy it again",
        "empty": "no .npy files",
        "bad": "can't read .*x.npy",
    }.items():
        with pytest.raises(UserError, match=message):
            Data(tmp_path / name, program(), shuffle=True)


def test_a_member_that_holds_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", image=np.array([{}, 1], dtype=object), y=Y)
    with pytest.raises(UserError, match="can't read the array 'image'"):
        Data(tmp_path / "d.npz", program(), shuffle=True)


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_more_than_a_32_bit_system_can_map(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "data", kind, x=X, y=Y)
    monkeypatch.setattr("fusetile.runtime.arrays._ADDRESSABLE_bytes", X.nbytes - 1)
    with pytest.raises(UserError, match=r"data.* an array of 0.0 GB, .*-bit system can map .* fewer samples"):
        Data(path, program(), shuffle=False)


def test_no_room_to_map_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    path = save(tmp_path / "data", "npz", x=X, y=Y)
    monkeypatch.setattr("numpy.memmap", full)
    with pytest.raises(UserError, match="more than this 64-bit system can map"):
        Data(path, program(), shuffle=False)


def image_folder(path: Path) -> dict[tuple[str, str], np.ndarray]:
    """Two classes, images [5,4] of three channels, losslessly."""
    image = pytest.importorskip("PIL.Image")
    made = {}
    random = np.random.default_rng(4)
    for name, files in (("cat", ("b.png", "a.png")), ("dog", ("1.bmp", "2.PNG", "3.png"))):
        (path / name).mkdir(parents=True)
        for file in files:
            made[name, file] = random.integers(0, 256, (5, 4, 3), dtype=np.uint8)
            image.fromarray(made[name, file]).save(path / name / file)
    (path / "dog" / "notes.txt").write_text("not an image")
    return made


def test_a_folder_of_images(tmp_path: Path) -> None:
    """Samples go by class and name; bytes are scaled per channel, also in a part of the channels."""
    made = image_folder(tmp_path / "d")
    mean, std = np.float32([0.5, 0.4, 0.3]), np.float32([0.2, 0.25, 0.5])
    wanted = program()
    feeds = tuple(replace(feed, classes=2 if feed.classes else 0) for feed in wanted.feeds)
    wanted = replace(wanted, feeds=feeds)
    data = Data(tmp_path / "d", wanted, shuffle=False, scaling=Scaling((0.5, 0.4, 0.3), (0.2, 0.25, 0.5)))
    arena = make_arena(wanted.arena_bytes)
    data.fill(arena, 1, total=3)
    order = [("cat", "a.png"), ("cat", "b.png"), ("dog", "1.bmp"), ("dog", "2.PNG")]
    pictures = np.stack([made[name] for name in order]).transpose(0, 3, 1, 2).astype(np.float32) / 255
    expected = (pictures - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)
    found = unpack(arena, wanted.feeds[0].buffer, BOX)
    np.testing.assert_allclose(found, expected[1:4, :, 1:4], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(unpack(arena, wanted.feeds[1].buffer, ((1, 4),)), [0, 1, 1])
    part = ((0, 1), (1, 3), (0, 5), (0, 4))
    scaled = Scaling((0.5, 0.4, 0.3)).apply((pictures[:1, 1:3] * 255).astype(np.uint8), part)
    np.testing.assert_allclose(scaled, pictures[:1, 1:3] - mean[1:].reshape(2, 1, 1), atol=1e-6)


def test_images_of_another_size_are_fitted(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "a").mkdir()
    image.new("L", (40, 10), 255).save(tmp_path / "a" / "1.png")
    whole = (slice(None),) * 3
    (values,) = Images([tmp_path / "a" / "1.png"], (3, 5, 4), Fit.CUT).read(np.array([0]), whole, [SAME])
    assert values.shape == (3, 5, 4) and (values == 255).all()


def test_a_folder_of_data_sets_is_none(tmp_path: Path) -> None:
    image_folder(tmp_path / "d" / "train")
    with pytest.raises(UserError, match=r"d has no images itself, nor arrays; say --data .*d/train"):
        Data(tmp_path / "d", program(), shuffle=False)
    (tmp_path / "d" / "train").rename(tmp_path / "d" / "images")
    with pytest.raises(UserError, match=r"no \.npy files"):
        Data(tmp_path / "d", program(), shuffle=False)


@pytest.mark.parametrize("what", ["damaged", "cut", "empty", "classes", "channels", "std"])
def test_folders_that_can_not_be_used(tmp_path: Path, what: str) -> None:
    image_folder(tmp_path)
    scaling = Scaling()
    made = program(*(replace(feed, classes=feed.classes and 2 + 2 * (what == "classes")) for feed in program().feeds))
    message = {
        "damaged": "can't read .*cat/a.png as an image .cannot identify",
        "cut": "can't read .*cat/b.png as an image .*truncated",
        "empty": "emu: there is no image",
        "classes": "has 2 classes, the model 4",
        "channels": "1 or 3 channels",
        "std": "--std: 2 numbers for the 3 channels",
    }[what]
    if what == "damaged":
        (tmp_path / "cat" / "a.png").write_bytes(b"no png")
    if what == "cut":
        (tmp_path / "cat" / "b.png").write_bytes((tmp_path / "cat" / "b.png").read_bytes()[:-30])
    if what == "empty":
        (tmp_path / "emu").mkdir()
    if what == "channels":
        box = ((0, 4), (0, 2), (0, 5), (0, 4))
        made = program(Feed("input", "image", (4, 2, 5, 4), Buffer("x", box, block=(1, 2), offset_bytes=0)))
    if what == "std":
        scaling = Scaling(std=(1.0, 2.0))
    with pytest.raises(UserError, match=message):
        Data(tmp_path, made, shuffle=False, scaling=scaling)


def test_what_takes_long_is_read_ahead(tmp_path: Path) -> None:
    """In the background, while the step before computes; the same values in any order of steps."""
    made = program()
    data = Data(save(tmp_path / "d", "npz", x=X, y=Y), made, shuffle=False)
    column, threads, next_is_read = data._columns["image"], [], threading.Event()

    class Slow:
        shape, dtype = column.shape, column.dtype

        def read(self, rows: np.ndarray, *arguments: Any) -> np.ndarray:
            threads.append(threading.current_thread().name)
            time.sleep(0.002)
            if 5 in rows:
                next_is_read.set()
            return column.read(rows, *arguments)

    data._columns["image"] = Slow()
    arena = make_arena(made.arena_bytes)
    for step in (1, 2, 1, 2, 2):
        data.fill(arena, step, total=9)
        if step == 1:
            assert next_is_read.wait(10)  # before anybody asked for it
        np.testing.assert_array_equal(unpack(arena, made.feeds[0].buffer, BOX), X[4 * step - 3 : 4 * step, :, 1:4])
    assert threads[0] == "MainThread" and threads[1].startswith("data")
    data.close()


def test_labels_that_are_an_input_are_read_as_they_are(tmp_path: Path) -> None:
    """Of a model that has the loss in it."""
    label = Buffer("t", ((1, 4),), "int32", offset_bytes=4096)
    made = program(program().feeds[0], Feed("input", "t", (4,), label, classes=4, ignore=-100))
    labels = np.where(Y == 1, -100, Y)
    data = Data(
        save(tmp_path / "d", "npz", image=X, t=labels), made, shuffle=False, scaling=Scaling((0.5,) * 3, (2.0,))
    )
    arena = make_arena(made.arena_bytes)
    data.fill(arena, 1, total=9)
    np.testing.assert_array_equal(unpack(arena, label, ((1, 4),)), labels[1:4])


def test_a_target_of_five_dimensions_has_its_last_ones_as_one(tmp_path: Path) -> None:
    label = Buffer("y", ((0, 2), (0, 3), (0, 4), (0, 10)), offset_bytes=0)
    made = program(Feed("target", "y", (2, 3, 4, 10), label), batch=2)
    y = np.arange(4 * 3 * 4 * 5 * 2, dtype=np.float32).reshape(4, 3, 4, 5, 2)
    data = Data(save(tmp_path / "d", "folder", y=y), made, shuffle=False)
    np.testing.assert_array_equal(data._read(1)[0], y[:2].reshape(2, 3, 4, 10))
    with pytest.raises(UserError, match=r"'y' has shape \(4, 3, 4, 2, 2\) where the model wants"):
        Data(save(tmp_path / "e", "folder", y=y[:, :, :, :2]), made, shuffle=False)


def test_of_a_large_photograph_no_more_is_decoded_than_is_needed(tmp_path: Path) -> None:
    """As a JPEG can be, at an eighth of its size; what comes of it is what comes of all pixels, also in a window."""
    image = pytest.importorskip("PIL.Image")
    waves = np.sin(np.arange(800) / 40)[:, None] * np.cos(np.arange(1200) / 60)
    image.fromarray((127.5 + 127 * waves).astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    decoded = []
    whole, changes = (slice(None),) * 3, [SAME, Change(scale=(0.6, 0.5), at=(0.9, 0.1), flip=True)]
    for path in (tmp_path / "a.jpg", tmp_path / "a.png"):
        column = Images([path], (1, 40, 60), Fit.CUT)
        decoded.append(column.read(np.array([0, 0]), whole, changes).astype(int))
    assert np.abs(decoded[0] - decoded[1]).max() <= 4 and decoded[0].std() > 50
    seen: list[tuple[int, int]] = []
    window = Images._window
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            Images, "_window", lambda self, size, change: (seen.append(size), window(self, size, change))[1]
        )
        Images([tmp_path / "a.jpg"], (1, 40, 60), Fit.CUT).read(np.array([0, 0]), whole, changes)
    assert seen == [(150, 100), (300, 200)]
