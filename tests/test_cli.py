"""The commands at work: what they write and say."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fusetile.local import free_ports
from models import lenet
from tests.commands import NODE, fusetile, losses, names, refused, save


def test_explain(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fusetile("compile", "model.onnx", "--nodes", 2, "--batch", 4, "-o", "build") == 0
    capsys.readouterr()
    assert fusetile("explain", "build") == 0
    said = capsys.readouterr().out
    for word in (
        "node0",
        "node1",
        "arena",
        "forward",
        "backward",
        "Conv",
        "conv1",
        "Critical path",
        "on node0 alone",
        "memory",
    ):
        assert word in said, word
    assert fusetile("explain", "--json", "build") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan == json.loads(Path("build/plan.json").read_text())
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
