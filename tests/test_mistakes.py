"""Mistakes in models, data, clusters and options: one clear message with status 2, and nothing is written."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from fusetile.cli import joined
from fusetile.options import Training
from fusetile.passes.differentiate import BoxOptions
from tests.commands import NODE, SHAPE, fusetile, names, refused

# -- the model ------------------------------------------------------------------------------------------------------


def unsupported(model: bytes) -> bytes:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("NonZero", ["x"], ["y"], name="odd")], "g", [x], [y])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    return bytes(made.SerializeToString())


@pytest.mark.parametrize(
    ("change", "saying"),
    [
        (lambda model: b"PK\x03\x04 this is something else", "broken.onnx.*not an ONNX model"),
        (lambda model: b"", "broken.onnx.*empty"),
        (lambda model: model[: len(model) // 2], "broken.onnx.*(damaged|cut off)"),
        (unsupported, "NonZero.*'odd'.*Supported ops.*Conv"),
    ],
    ids=["another file", "empty", "truncated", "unsupported op"],
)
def test_bad_models(
    here: Path, capfd: pytest.CaptureFixture[str], change: Callable[[bytes], bytes], saying: str
) -> None:
    Path("broken.onnx").write_bytes(change(Path("model.onnx").read_bytes()))
    refused(capfd, "compile", "broken.onnx", "--nodes", 2, "-o", "build", saying=saying)
    refused(capfd, "train", "broken.onnx", "--data", "data.npz", "-o", "out", saying=saying)


def test_a_model_that_is_not_there(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, "compile", "nosuch.onnx", "--nodes", 2, "-o", "build", saying="nosuch.onnx.*No such file")


# -- the data -------------------------------------------------------------------------------------------------------

X = np.zeros(SHAPE, np.float32)
Y = np.arange(8) % 5


@pytest.mark.parametrize(
    ("arrays", "saying"),
    [
        ({"x": X}, "bad.npz has no array 'y'.*'x'"),
        ({"x": X[:, 0], "y": Y}, r"'x' has shape \(8, 16, 16\).*\(samples, 1, 16, 16\)"),
        ({"x": X, "y": Y + 1}, "'y' has class 5 at sample 4.*5 classes, 0 to 4"),
        ({"x": X[:3], "y": Y[:3]}, "3 samples, fewer than one step of 4"),
    ],
)
def test_bad_data(here: Path, capfd: pytest.CaptureFixture[str], arrays: dict[str, np.ndarray], saying: str) -> None:
    """All that may be wrong with data is in runtime/test_data.py."""
    np.savez("bad.npz", allow_pickle=True, **arrays)
    given = ("--data", "bad.npz", "--batch", 4, "--nodes", 2, "--plan", "batch")
    refused(capfd, "train", "model.onnx", *given, "-o", "out", saying=saying)


def test_data_that_is_no_data(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("text.npz").write_text("x = 1")
    for data, saying in (("nosuch.npz", "nosuch.npz"), ("empty", "no .npy"), ("text.npz", "text.npz")):
        refused(capfd, "train", "model.onnx", "--data", data, "--batch", 4, "-o", "out", saying=saying)


# -- the cluster ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "saying"),
    [
        ("", r"no \[\[node\]\]"),
        ("[[node]\n", "not a TOML file"),
        (NODE + "colour = 'red'\n", "unknown key 'colour'"),
        (NODE.replace("127.0.0.1:7300", "127.0.0.1"), "host:port"),
        (NODE.replace("host", "pi9"), "unknown device 'pi9'.*pi3"),
        (NODE.replace('name = "a"\n', ""), "name is missing"),
        (NODE.replace('"a"', '"../a"'), "names a folder"),
        (NODE + NODE, "two nodes have the name 'a'"),
        (NODE + "cores = 0\n", "cores = 0"),
        (NODE + 'memory = "lots"\n', "memory = 'lots'"),
        (NODE + '[link]\nrate = "fast"\n', "rate = 'fast'"),
    ],
)
def test_bad_clusters(here: Path, capfd: pytest.CaptureFixture[str], text: str, saying: str) -> None:
    Path("cluster.toml").write_text(text)
    refused(capfd, "compile", "model.onnx", "--cluster", "cluster.toml", "-o", "build", saying=saying)


def test_a_device_without_enough_memory(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("cluster.toml").write_text(NODE + 'memory = "20KB"\n')
    given = ("--cluster", "cluster.toml", "--batch", 4)
    refused(capfd, "compile", "model.onnx", *given, "-o", "build", saying="'?a'?.*memory")


# -- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        (("--plan", "everything"), "--plan 'everything'.*grid:RxC"),
        (("--plan", "grid:9x9"), "--plan grid:9x9.*the cluster has 2"),
        (("--plan", "grid:0x2"), "--plan grid:0x2"),
        (("--plan", "random:dice"), "--plan 'random:dice'"),
        (("--plan", "nosuch/plan.json"), "nosuch/plan.json"),
        (("--stop-after", "lunch"), "--stop-after 'lunch'.*fuse"),
        (("--lr", "-1"), "--lr -1"),
        (("--lr", "nan"), "--lr nan"),
        (("--loss", "yolov2", "--anchors", "1,2", "3,0"), "--anchors '1,2 3,0'.*pairs of numbers above 0"),
        (("--loss", "yolov2", "--lambdas", "1,2"), "--lambdas 1,2.*four numbers"),
        (("--loss", "mse", "--loss-model", "loss.onnx"), "--loss-model loss.onnx.*leave out --loss mse"),
        (("--loss-weights", "1,2"), "2 numbers for the losses of 1 output"),
        (("--target", "pi9"), "unknown device 'pi9'"),
        (("--cluster", "cluster.toml"), "--cluster.*--nodes"),
    ],
)
def test_bad_options(here: Path, capfd: pytest.CaptureFixture[str], options: tuple[str, ...], saying: str) -> None:
    given = ("--nodes", 2, "--batch", 4, *options)
    refused(capfd, "compile", "model.onnx", *given, "-o", "build", saying=saying)


@pytest.mark.parametrize("plan", ["everything", "grid:2x1", "grid:0x1", "random:dice"])
def test_plans_for_a_single_node(here: Path, capfd: pytest.CaptureFixture[str], plan: str) -> None:
    refused(capfd, "compile", "model.onnx", "--nodes", 1, "--plan", plan, "-o", "build", saying=f"--plan '?{plan}")


def test_paths_are_looked_at_before_the_model_is(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, "train", "nosuch.onnx", "--data", "nosuch.npz", "-o", "out", saying="--data nosuch.npz")
    refused(capfd, "train", "nosuch.onnx", "--data", "data.npz", "-o", "model.onnx", saying="-o model.onnx.*a file")
    for options, saying in (
        (("--log", "none/x"), "to the folder none"),
        (("--augment", "flop"), "there is no 'flop'"),
        (("--resume",), "--resume: there is no checkpoint of all nodes in out/checkpoints"),
    ):
        given = ("nosuch.onnx", "--data", "data.npz", *options, "-o", "out")
        refused(capfd, "train", *given, saying=saying)


def test_data_are_looked_at_before_the_plan_is_made(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("a plan was made")

    monkeypatch.setattr("fusetile.pipeline.assign", never)
    np.savez("short.npz", x=X[:3], y=Y[:3])
    for data, option, saying in (
        ("data.npz", ("--mean", "1,2"), "--mean: 2 numbers for the 1 channels of 'x'"),
        ("data.npz", ("--augment", "colour"), "colours of images and of uint8 arrays"),
        ("short.npz", (), "3 samples, fewer than one step of 4"),
    ):
        refused(capfd, "train", "model.onnx", "--data", data, "--batch", 4, *option, "-o", "out", saying=saying)


@pytest.mark.parametrize(
    "arguments",
    [
        ("compile", "model.onnx", "--nodes", 2),
        ("compile", "model.onnx", "--nodes", 0, "-o", "build"),
        ("compile", "model.onnx", "--nodes", 2, "--loss", "hinge", "-o", "build"),
        ("compile", "model.onnx", "--nodes", 2, "--batch", "four", "-o", "build"),
        ("train", "model.onnx", "-o", "out"),
        ("conpile", "model.onnx"),
    ],
)
def test_usage(here: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[object, ...]) -> None:
    assert fusetile(*arguments) == 2
    assert "Error" in capfd.readouterr().err
    assert names(here) == ["data.npz", "model.onnx"]


def test_anchors_need_no_quotes() -> None:
    words = ["train", "--anchors", "1,2", "3.5,4", "5,6", "model.onnx", "--mean", "1,2", "-o", "out"]
    assert joined(words) == ["train", "--anchors", "1,2 3.5,4 5,6", *words[5:]]
    boxes = Training(loss="yolov2", anchors="1,2 3.5,4", lambdas="1,5,1,1", max_boxes=7).boxes
    assert boxes == BoxOptions(anchors=(1, 2, 3.5, 4), factors=(1, 5, 1, 1), most=7)


def test_steps_and_epochs(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ("--data", "data.npz", "--steps", 1, "--epochs", 1)
    refused(capfd, "train", "model.onnx", *given, "-o", "out", saying="--steps or --epochs")


# -- where results go -----------------------------------------------------------------------------------------------


def test_what_is_not_a_build_is_never_overwritten(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("photos").mkdir()
    Path("photos/one.jpg").write_text("precious")
    refused(capfd, "compile", "nosuch.onnx", "--nodes", 1, "-o", "photos", saying="photos.*not a build")
    refused(capfd, "compile", "nosuch.onnx", "--nodes", 1, "-o", "data.npz", saying="data.npz.*not a build")
    refused(capfd, "compile", "nosuch.onnx", "--nodes", 1, "-o", "data.npz/build", saying="data.npz")
    given = ("--data", "data.npz", "-o", "model.onnx/out")
    refused(capfd, "train", "nosuch.onnx", *given, saying="-o model.onnx/out: there is a file")
    assert Path("photos/one.jpg").read_text() == "precious"


def test_logs_that_cannot_be_written(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for option in ("--log", "--save-gradients"):
        given = ("--data", "data.npz", "--batch", 4, option, "nosuch/file")
        refused(capfd, "train", "model.onnx", *given, "-o", "out", saying="nosuch")


def test_a_compilation_that_is_cut_short_leaves_nothing(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def fill(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    given = ("compile", "model.onnx", "--nodes", 1, "--batch", 4, "--plan", "single", "-o", "build")
    monkeypatch.setattr("fusetile.bundle.build_library", stop)
    assert fusetile(*given) == 128 + signal.SIGTERM and names(here) == ["data.npz", "model.onnx"]
    monkeypatch.setattr("fusetile.bundle.build_library", fill)
    refused(capfd, *given, saying="can't write build: No space left on device")


def test_a_failed_compilation_keeps_the_earlier_build(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fusetile("compile", "model.onnx", "--nodes", 1, "--batch", 4, "-o", "build") == 0
    before = {path: path.read_bytes() for path in Path("build").rglob("*") if path.is_file()}
    refused(capfd, "compile", "model.onnx", "--nodes", 2, "--plan", "grid:9x9", "-o", "build", saying="9 x 9")
    assert {path: path.read_bytes() for path in Path("build").rglob("*") if path.is_file()} == before
    assert fusetile("compile", "model.onnx", "--nodes", 2, "--batch", 4, "-o", "build") == 0
    assert names(Path("build/nodes")) == ["node0", "node1"]
