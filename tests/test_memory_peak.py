"""The memory that is promised when a model is compiled is what a node's process takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from fusetile.cluster import local_cluster
from fusetile.options import Training
from fusetile.passes.fit import INTERPRETER_bytes
from fusetile.pipeline import compile_model
from models import darknet19, lenet, mobilenetv2, resnet18, unet, vgg16, vgg_small, yolov2
from tests.commands import save

pytestmark = pytest.mark.usefixtures("unguarded")

# A process's own record of its peak starts with that of the process it was forked from; this one's does not.
MEASURED = """
import pathlib, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print(next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
"""
SLACK_bytes = 8_000_000  # program, kernels, a batch of data, what numpy takes for a while


def peak_bytes(*arguments: str) -> int:
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], stdout=subprocess.PIPE, text=True)
    return int(done.stdout.splitlines()[-1].split()[1]) * 1024


NETWORKS: dict[str, tuple[Callable[[], onnx.ModelProto], str, int]] = {
    "darknet19": (lambda: darknet19.build(size=160, width=0.5, classes=5), "cross-entropy", 4),
    "lenet": (lambda: lenet.build(size=84, classes=5), "cross-entropy", 40),
    "mobilenetv2": (lambda: mobilenetv2.build(size=160, width=0.5, classes=5), "cross-entropy", 4),
    "resnet18": (lambda: resnet18.build(size=128, width=0.5, classes=5), "cross-entropy", 4),
    "unet": (lambda: unet.build(size=96, width=0.25), "cross-entropy", 4),
    "vgg16": (lambda: vgg16.build(size=96, width=0.25, classes=5), "cross-entropy", 4),
    "vgg_small": (lambda: vgg_small.build(size=160, classes=5), "cross-entropy", 4),
    "yolov2": (lambda: yolov2.build(size=208, width=0.5), "mse", 4),
}


def data_for(bundle: Path, path: Path) -> Path:
    """One batch of random numbers of the shapes and kinds that a program is fed."""
    random = np.random.default_rng(0)
    arrays = {}
    for feed in json.loads((bundle / "program.json").read_text())["feeds"]:
        if feed["classes"]:
            arrays["y"] = random.integers(0, feed["classes"], feed["shape"])
        else:
            arrays["x" if feed["role"] == "input" else "y"] = random.standard_normal(feed["shape"], np.float32)
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("name", NETWORKS)
def test_a_node_takes_its_arena_and_a_python(name: str, tmp_path: Path) -> None:
    make, loss, batch = NETWORKS[name]
    model, training = save(make(), tmp_path / "m.onnx"), Training(batch=batch, loss=loss, learning_rate=1e-6)
    build = compile_model(model, cluster=local_cluster(1), training=training, build=tmp_path / "build")
    (node,) = json.loads((build / "plan.json").read_text())["nodes"]
    bundle = build / "nodes" / "node0"
    command = ["fusetile.runtime.node", str(bundle), "--data", str(data_for(bundle, tmp_path / "data.npz"))]
    python = peak_bytes("fusetile.runtime.node", "--help")
    taken = peak_bytes(*command, "--quiet", "--steps", "2", "--threads", "1") - python
    assert node["arena_bytes"] > 2.5 * SLACK_bytes
    assert 0.95 * node["arena_bytes"] < taken < 1.05 * node["arena_bytes"] + SLACK_bytes
    assert taken + python < node["arena_bytes"] + INTERPRETER_bytes
