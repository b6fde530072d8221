"""The commands: what they write and say, and one clear message with status 2 for every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fusetile.cli import joined
from fusetile.local import free_ports
from fusetile.options import Training
from fusetile.passes.differentiate import BoxOptions
from models import lenet
from tests.commands import fusetile, images, losses, save

SHAPE = (8, 1, 16, 16)  # of the images in the data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its data and a build for two nodes of this machine."""
    folder = tmp_path_factory.mktemp("prepared")
    save(lenet.build(size=16, classes=5, width=0.5), folder / "model.onnx")
    images(folder / "data.npz", shape=SHAPE)
    assert fusetile("compile", folder / "model.onnx", "--nodes", 2, "--batch", 4, "-o", folder / "build") == 0
    return folder


@pytest.fixture
def here(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the model and the data."""
    for name in ("model.onnx", "data.npz"):
        shutil.copy(prepared / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(capfd: pytest.CaptureFixture[str], *arguments: object, saying: str) -> None:
    """The command ends with status 2, one line on stderr that matches, and leaves no new file behind."""
    before = names(Path())
    capfd.readouterr()
    status = fusetile(*arguments)
    error = capfd.readouterr().err
    assert status == 2, error
    assert re.fullmatch(r"fusetile: error: .+\n", error), error
    assert re.search(saying, error), error
    assert names(Path()) == before


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
        ({"y": Y}, "bad.npz has no array 'x'.*'y'"),
        ({"x": X}, "bad.npz has no array 'y'.*'x'"),
        ({"x": X[:, :, 1:], "y": Y}, r"'x' has shape \(8, 1, 15, 16\).*\(samples, 1, 16, 16\)"),
        ({"x": X[:, 0], "y": Y}, r"'x' has shape \(8, 16, 16\)"),
        ({"x": X, "y": Y[:, None]}, r"'y' has shape \(8, 1\)"),
        ({"x": X.astype(np.int64), "y": Y}, "'x' has dtype int64.*floating-point"),
        ({"x": X, "y": Y.astype(np.float32)}, "'y' has dtype float32.*integer"),
        ({"x": X, "y": Y + 1}, "'y' has class 5 at sample 4.*5 classes, 0 to 4"),
        ({"x": X, "y": Y - 1}, "'y' has class -1 at sample 0"),
        ({"x": X, "y": Y[:7]}, "different numbers of samples"),
        ({"x": X[:3], "y": Y[:3]}, "3 samples, fewer than one step of 4"),
    ],
)
def test_bad_data(here: Path, capfd: pytest.CaptureFixture[str], arrays: dict[str, np.ndarray], saying: str) -> None:
    np.savez("bad.npz", allow_pickle=True, **arrays)
    given = ("--data", "bad.npz", "--batch", 4, "--nodes", 2, "--plan", "batch")
    refused(capfd, "train", "model.onnx", *given, "-o", "out", saying=saying)


def test_data_that_is_no_data(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("text.npz").write_text("x = 1")
    for data, saying in (("nosuch.npz", "nosuch.npz"), ("empty", "no .npy"), ("text.npz", "text.npz")):
        refused(capfd, "train", "model.onnx", "--data", data, "--batch", 4, "-o", "out", saying=saying)


# -- the cluster ----------------------------------------------------------------------------------------------------

NODE = '[[node]]\nname = "a"\naddress = "127.0.0.1:7300"\ndevice = "host"\n'


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


def test_a_failed_compilation_keeps_the_earlier_build(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fusetile("compile", "model.onnx", "--nodes", 1, "--batch", 4, "-o", "build") == 0
    before = {path: path.read_bytes() for path in Path("build").rglob("*") if path.is_file()}
    refused(capfd, "compile", "model.onnx", "--nodes", 2, "--plan", "grid:9x9", "-o", "build", saying="9 x 9")
    assert {path: path.read_bytes() for path in Path("build").rglob("*") if path.is_file()} == before
    assert fusetile("compile", "model.onnx", "--nodes", 2, "--batch", 4, "-o", "build") == 0
    assert names(Path("build/nodes")) == ["node0", "node1"]


# -- explain, export, looking inside --------------------------------------------------------------------------------


def test_explain(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fusetile("explain", prepared / "build") == 0
    said = capsys.readouterr().out
    for word in ("node0", "node1", "arena", "forward", "backward", "Conv", "conv1"):
        assert word in said, word
    assert fusetile("explain", "--json", prepared / "build") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan == json.loads((prepared / "build" / "plan.json").read_text())
    assert [node["name"] for node in plan["nodes"]] == ["node0", "node1"]


def test_explain_what_is_no_build(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(capfd, "explain", "nosuch", saying="nosuch/plan.json.*fusetile compile")
    Path("old").mkdir()
    for text, saying in (("{", "not a plan"), ('{"schema": 99999}', "compile again"), ("[]", "plan")):
        Path("old/plan.json").write_text(text)
        refused(capfd, "explain", "old", saying=saying)


def test_dump_stop_and_verbose(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("compile", "model.onnx", "--nodes", 2, "--batch", 4, "-o", "build")
    assert fusetile(*given, "--dump", "dump", "--stop-after", "fuse", "--verbose") == 0
    said = capsys.readouterr().out
    assert "Stopped after fuse" in said and "differentiate" in said
    assert not Path("build").exists()
    texts = [path.name for path in sorted(Path("dump").glob("*.txt"))]
    assert texts[0] == "00-import_onnx.txt" and texts[-1].endswith("-fuse.txt")
    assert {path.stem for path in Path("dump").glob("*.dot")} == {Path(name).stem for name in texts}
    assert "ConvWeightGrad" in (Path("dump") / texts[-1]).read_text()


def start_nodes(build: Path, data: Path, *options: str) -> list[subprocess.Popen[str]]:
    """A process per node of a build."""
    command = [sys.executable, "-m", "fusetile.runtime.node"]
    own = ["--data", str(data), "--quiet", *options]
    return [
        subprocess.Popen([*command, str(folder), *own], stderr=subprocess.PIPE, text=True)
        for folder in sorted((build / "nodes").iterdir())
    ]


def ends(nodes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    try:
        said = [node.communicate(timeout=60)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, text) for node, text in zip(nodes, said, strict=True)]


def compile_at(ports: list[int], *options: object, build: str = "build") -> Path:
    """A build of the model here for nodes of this machine at these ports."""
    nodes = [NODE.replace('"a"', f'"n{i}"').replace("7300", str(port)) for i, port in enumerate(ports)]
    Path("cluster.toml").write_text("".join(nodes))
    given = ("--cluster", "cluster.toml", "--batch", 4, *options)
    assert fusetile("compile", "model.onnx", *given, "-o", build) == 0
    return Path(build)


def test_compile_run_export(here: Path, ports: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    build = compile_at(ports, "--plan", "batch")
    refused(capfd, "export", build / "nodes" / "n0", "-o", "trained.onnx", saying="no trained.safetensors")
    assert ends(start_nodes(build, Path("data.npz"), "--steps", "3")) == [(0, "")] * 2
    assert fusetile("export", build / "nodes" / "n0", "-o", "trained.onnx") == 0
    assert fusetile("export", build / "nodes" / "n0" / "run", "-o", "again.onnx") == 0
    assert Path("trained.onnx").read_bytes() == Path("again.onnx").read_bytes()
    onnx.checker.check_model(onnx.load("trained.onnx"), full_check=True)
    given = ("--data", "data.npz", "--batch", 4, "--steps", 3, "--nodes", 2, "--plan", "batch")
    assert fusetile("train", "model.onnx", *given, "-o", "out") == 0
    assert Path("out/trained.onnx").read_bytes() == Path("trained.onnx").read_bytes()
    save(lenet.build(size=16, classes=5, width=0.5, seed=1), Path("model.onnx"))  # another model of the same shapes
    assert fusetile("export", "out", "-o", "new.onnx") == 0  # that of the run, whatever model.onnx is by now
    assert Path("new.onnx").read_bytes() == Path("trained.onnx").read_bytes()


@pytest.fixture
def ports() -> list[int]:
    return free_ports(2)


def test_a_port_in_use(here: Path, ports: list[int]) -> None:
    build = compile_at(ports)
    with socket.create_server(("127.0.0.1", ports[0])):
        nodes = start_nodes(build, Path("data.npz"), "--connect-timeout", "1")
        status, said = ends(nodes)[0]
    assert status == 2 and f"127.0.0.1:{ports[0]}" in said and "in use" in said and said.count("\n") == 1


def test_bundles_of_different_plans(here: Path, ports: list[int]) -> None:
    build = compile_at(ports, "--plan", "batch")
    other = compile_at(ports, "--plan", "channel", build="other")
    shutil.rmtree(build / "nodes" / "n1")
    shutil.copytree(other / "nodes" / "n1", build / "nodes" / "n1")
    for status, said in ends(start_nodes(build, Path("data.npz"))):
        assert status == 2 and "plan" in said and "'n0'" in said and "'n1'" in said


def test_a_finished_log_is_one_object_per_step(here: Path) -> None:
    given = ("--data", "data.npz", "--batch", 4, "--epochs", 2, "--log", "log.jsonl")
    assert fusetile("train", "model.onnx", *given, "-o", "out") == 0
    records: list[dict[str, Any]] = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record["samples"] == 4 and record["seconds"] > 0 for record in records)
    assert all(np.isfinite(losses(Path("log.jsonl"))))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_leaves_nothing(here: Path, number: signal.Signals) -> None:
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # also where the tests run in the background
    command = f"import signal, sys; {heard}; from fusetile.cli import main; main(sys.argv[1:])"
    given = ("--data", "data.npz", "--batch", "4", "--nodes", "2", "--steps", "1000000", "--log", "log.jsonl")
    environment = os.environ | {"TMPDIR": str(here)}
    process = subprocess.Popen(
        [sys.executable, "-c", command, "train", "model.onnx", *given, "-o", "out"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 60
        while not Path("log.jsonl").exists() or len(Path("log.jsonl").read_text().splitlines()) < 3:
            assert time.monotonic() < end and process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=20)
        assert process.returncode == 128 + number
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)  # no process of the group is left
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert names(here) == ["data.npz", "log.jsonl", "model.onnx"]


def test_a_killed_process_leaves_no_folder(tmp_path: Path) -> None:
    command = "import time; from fusetile.local import temporary_folder as made\nwith made(): print(1); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-uc", command], env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() and names(tmp_path)
    process.kill()
    process.communicate()
    end = time.monotonic() + 20
    while names(tmp_path) and time.monotonic() < end:
        time.sleep(0.02)
    assert not names(tmp_path)
