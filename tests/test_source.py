"""One node has the data: losses, metrics and weights are the same bits as with the data on every node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusetile.runtime.node import main as runtime
from models import lenet
from tests.commands import fusetile, save


def test_the_source_sends_every_node_its_part(tmp_path: Path) -> None:
    """Bytes, changed in each epoch; batches of which two make a step; a validation whose last batch is not full."""
    model = save(lenet.build(size=14, width=0.5, classes=5), tmp_path / "model.onnx")
    random = np.random.default_rng(0)
    for name, count in (("train", 24), ("val", 7)):
        x = random.integers(0, 256, (count, 1, 14, 14), np.uint8)
        np.savez(tmp_path / name, x=x, y=random.integers(0, 5, count))
    data = ("--data", tmp_path / "train.npz", "--val", tmp_path / "val.npz", "--val-every", 2, "--mean", 0.4)
    run = ("--batch", 3, "--accumulate", 2, "--epochs", 2, "--lr", 0.02, "--augment", "flip,crop")
    logs: list[list[dict[str, Any]]] = []
    for more in ((), ("--source", "node2")):
        log, out = tmp_path / f"{len(logs)}.jsonl", tmp_path / f"out{len(logs)}"
        options = (*run, "--nodes", 4, "--plan", "grid:2x2", "--log", log, "-o", out, "--guard", *more)
        assert fusetile("train", model, *data, *options) == 0
        logs.append([json.loads(line) | {"seconds": 0} for line in log.read_text().splitlines()])
    assert logs[0] == logs[1] and len(logs[0]) == 8
    assert (tmp_path / "out0" / "best.onnx").read_bytes() == (tmp_path / "out1" / "best.onnx").read_bytes()
    assert (tmp_path / "out0" / "trained.onnx").read_bytes() == (tmp_path / "out1" / "trained.onnx").read_bytes()


def test_data_where_they_are_not_wanted_or_missing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = save(lenet.build(size=14, width=0.5, classes=5), tmp_path / "model.onnx")
    cluster = tmp_path / "cluster.toml"
    entry = '[[node]]\nname = "{0}"\naddress = "127.0.0.1:{1}"\ndevice = "host"\n'
    cluster.write_text('source = "b"\n' + entry.format("a", 7300) + entry.format("b", 7301))
    assert fusetile("compile", model, "--cluster", cluster, "--plan", "batch", "--batch", 2, "-o", tmp_path / "b") == 0
    assert runtime([str(tmp_path / "b" / "nodes" / "a"), "--data", "some.npz"]) == 2
    assert "--data some.npz: leave it out, the node of rank 1 is the source" in capfd.readouterr().err
    assert runtime([str(tmp_path / "b" / "nodes" / "b")]) == 2
    assert "--data DATA is missing" in capfd.readouterr().err
    assert fusetile("compile", model, "--nodes", 2, "--source", "c", "-o", tmp_path / "c") == 2
    assert "the source 'c' is none of the nodes: node0, node1" in capfd.readouterr().err
