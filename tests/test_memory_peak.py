"""The memory that is promised when a model is compiled is what a node's process takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from fusetile.cluster import local_cluster
from fusetile.options import Training
from fusetile.passes.fit import INTERPRETER_bytes
from fusetile.pipeline import compile_model
from models import darknet19, resnet18, vgg_small
from tests.commands import images, save

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


NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    "darknet19": lambda: darknet19.build(size=160, width=0.5, classes=5),
    "vgg_small": lambda: vgg_small.build(size=160, classes=5),
    "resnet18": lambda: resnet18.build(size=128, width=0.5, classes=5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_node_takes_its_arena_and_a_python(name: str, tmp_path: Path) -> None:
    model = NETWORKS[name]()
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim][1:]
    data = images(tmp_path / "data.npz", shape=(4, *shape), classes=5)
    training = Training(batch=4)
    build = compile_model(
        save(model, tmp_path / "m.onnx"), cluster=local_cluster(1), training=training, build=tmp_path / "build"
    )
    (node,) = json.loads((build / "plan.json").read_text())["nodes"]
    python = peak_bytes("fusetile.runtime.node", "--help")
    command = ["fusetile.runtime.node", str(build / "nodes" / "node0"), "--data", str(data), "--quiet", "--steps", "2"]
    taken = peak_bytes(*command, "--threads", "1") - python
    assert node["arena_bytes"] > 2.5 * SLACK_bytes
    assert 0.95 * node["arena_bytes"] < taken < 1.05 * node["arena_bytes"] + SLACK_bytes
    assert taken + python < node["arena_bytes"] + INTERPRETER_bytes
