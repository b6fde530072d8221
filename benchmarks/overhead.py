"""What Python costs in a training step: `python -m benchmarks.overhead [--layers 150]`.

A network of many small layers, so that kernels are short, is trained by a real node in this process. Printed are the
milliseconds from step to step (data, kernels, loss, log), those inside native calls, and the part that is left: median
of many steps.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx

from fusetile.cluster import local_cluster
from fusetile.options import Training
from fusetile.pipeline import compile_model
from fusetile.runtime import node
from fusetile.runtime.native import Segment
from fusetile.runtime.progress import Progress
from models.builder import Builder

CLASSES, BATCH = 10, 4
WARM_UP = 10


def main() -> None:
    """Read the command line, measure, print."""
    lines = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lines.add_argument("--layers", type=int, default=150, help="convolutions, each with BatchNorm and ReLU")
    lines.add_argument("--channels", type=int, default=16)
    lines.add_argument("--size", type=int, default=16, help="height and width of the maps")
    lines.add_argument("--steps", type=int, default=200)
    lines.add_argument("--threads", type=int, default=1)
    options = lines.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx.save(network(options.layers, options.channels, options.size), folder / "model.onnx")
        build = compile_model(
            folder / "model.onnx",
            cluster=local_cluster(1),
            training=Training(batch=BATCH, learning_rate=1e-3),
            build=folder / "build",
        )
        random = np.random.default_rng(0)
        x = random.standard_normal((64, 3, options.size, options.size), np.float32)
        np.savez(folder / "data.npz", x=x, y=random.integers(0, CLASSES, 64))
        steps, native = measure(build / "nodes/node0", folder, options.steps, options.threads)
    whole, inside = np.median(steps[WARM_UP:]), np.median(native[WARM_UP:])
    rest = np.median((steps - native)[WARM_UP:])
    print(f"{options.layers} layers: step {whole * 1e3:.3f} ms, native {inside * 1e3:.3f} ms, rest {rest * 1e3:.3f} ms")
    print(f"Python's part: {rest / whole:.1%}")


def network(layers: int, channels: int, size: int) -> onnx.ModelProto:
    """Convolutions on maps that stay of one size, with a shortcut around every other one."""
    net = Builder("small-layers", channels=3, size=size, batch=None, seed=0)
    x = "x"
    for i in range(layers):
        y = net.relu(f"relu{i}", net.batch_norm(f"bn{i}", net.conv(f"conv{i}", x, channels, bias=False)))
        x = net.add(f"add{i}", x, y) if i % 2 else y
    return net.model(net.linear("fc", net.flatten("flatten", net.global_average_pool("pool", x)), CLASSES))


def measure(bundle: Path, folder: Path, steps: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds from step to step, and those of native calls among them."""
    ends, native = [], []
    inside = 0.0
    run, step = Segment.__call__, Progress.step

    def timed_run(segment: Segment, *part: int) -> None:
        nonlocal inside
        start = time.perf_counter()
        run(segment, *part)
        inside += time.perf_counter() - start

    def noted_step(progress: Progress, *record: Any) -> None:
        nonlocal inside
        step(progress, *record)
        ends.append(time.perf_counter())
        native.append(inside)
        inside = 0.0

    command = [str(bundle), "--data", str(folder / "data.npz"), "--steps", str(steps), "--threads", str(threads)]
    command += ["--quiet", "--log", str(folder / "log.jsonl")]
    with patch.object(Segment, "__call__", timed_run), patch.object(Progress, "step", noted_step):
        if node.main(command):
            raise SystemExit("the node failed")
    return np.diff(ends), np.array(native[1:])


if __name__ == "__main__":
    main()
