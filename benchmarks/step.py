"""A whole training step on one device against PyTorch: `python -m benchmarks.step [--threads 1] [PATTERN]`.

Prints, per network and batch, the median seconds of a step (forward, loss, backward, SGD with momentum) of a real
fusetile node and of PyTorch (the better of its two memory layouts, eager), the ratio of the two, and the peak resident
memory of both processes. Each side runs alone, in a process of its own. Needs torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fusetile.cluster import local_cluster
from fusetile.compile import compile_model
from fusetile.options import Training

WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Case:
    """A network of models/, the size of its images, and the loss it is trained with."""

    model: str
    size: int
    loss: str
    classes: int = 10


CASES = (
    Case("lenet", 28, "cross-entropy"),
    Case("vgg_small", 32, "cross-entropy"),
    Case("resnet18", 224, "cross-entropy", 1000),
    Case("yolov2", 416, "mse"),
)
BATCHES = (1, 4)


def main() -> None:
    """Every case and batch whose name contains the pattern."""
    lines = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lines.add_argument("pattern", nargs="?", default="")
    lines.add_argument("--threads", type=int, default=1)
    lines.add_argument("--steps", type=int, default=10)
    lines.add_argument("--peer", help=argparse.SUPPRESS)
    options = lines.parse_args()
    if options.peer:
        print(json.dumps(pytorch_step(**json.loads(options.peer))))
        return
    print(f"{'network':24} {'fusetile':>10} {'PyTorch':>10} {'ratio':>6} {'fusetile':>9} {'PyTorch':>9}")
    for case in CASES:
        for batch in BATCHES:
            name = f"{case.model}@{case.size} batch {batch}"
            if options.pattern in name:
                ours, theirs = measure(case, batch, options.threads, options.steps)
                ratio = ours[0] / theirs[0]
                seconds = f"{ours[0]:9.4f}s {theirs[0]:9.4f}s {ratio:6.2f}"
                print(f"{name:24} {seconds} {ours[1]:6.0f} MB {theirs[1]:6.0f} MB", flush=True)


def measure(case: Case, batch: int, threads: int, steps: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """(median seconds, peak MB) of fusetile and of PyTorch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data, log = folder / "model.onnx", folder / "data.npz", folder / "log.jsonl"
        wanted = ["--size", str(case.size), "-o", str(model)]
        wanted += [] if case.model == "yolov2" else ["--classes", str(case.classes)]
        subprocess.run([sys.executable, "-m", f"models.{case.model}", *wanted], check=True, stdout=subprocess.DEVNULL)
        training = Training(loss=case.loss, batch=batch, learning_rate=1e-4)
        compile_model(model, cluster=local_cluster(1), training=training, build=folder / "build")
        feeds = json.loads((folder / "build/nodes/node0/program.json").read_text())["feeds"]
        shapes = {feed["role"]: feed["shape"] for feed in feeds}
        random = np.random.default_rng(0)
        x = random.standard_normal(shapes["input"], np.float32)
        y = random.standard_normal(shapes["target"], np.float32)
        np.savez(data, x=x, y=y if case.loss == "mse" else random.integers(0, case.classes, batch))
        command = ["fusetile.runtime.node", str(folder / "build/nodes/node0"), "--data", str(data), "--quiet"]
        command += ["--steps", str(steps + WARM_UP), "--threads", str(threads), "--log", str(log)]
        _, ours_mb = run_measured(command)
        seconds = [json.loads(line)["seconds"] for line in log.read_text().splitlines()][WARM_UP:]
        peer = {"case": case.model, "shape": x.shape, "target": y.shape, "threads": threads, "steps": steps}
        peer |= {"loss": case.loss, "classes": case.classes}
        results = [
            run_measured(["benchmarks.step", "--peer", json.dumps({**peer, "channels_last": last})])
            for last in (False, True)
        ]
    best, mb = min((json.loads(text), mb) for text, mb in results)
    return (statistics.median(seconds), ours_mb), (best, mb)


# The kernel's own record of a process's peak starts with that of the process it was forked from; this one does not.
MEASURED = """
import pathlib, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print(next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
"""


def run_measured(arguments: list[str]) -> tuple[str, float]:
    """Standard output and the peak resident memory (MB) of a Python module run as a process."""
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments[0]} ended with status {done.returncode}")
    *lines, peak = done.stdout.splitlines()
    return "\n".join(lines), int(peak.split()[1]) / 1e3


# -- the peer ----------------------------------------------------------------------------------------------------------


def pytorch_step(
    *,
    case: str,
    shape: list[int],
    target: list[int],
    threads: int,
    steps: int,
    loss: str,
    classes: int,
    channels_last: bool,
) -> float:
    """Median seconds of a step."""
    import torch

    torch.set_num_threads(threads)
    x = torch.randn(shape)
    y = torch.randn(target) if loss == "mse" else torch.randint(0, classes, (shape[0],))
    network = torch_network(case, shape[1], classes)
    network(x)  # gives lazy layers their sizes
    if channels_last:
        network, x = network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    function = torch.nn.functional.mse_loss if loss == "mse" else torch.nn.functional.cross_entropy
    times = []
    for _ in range(steps + WARM_UP):
        start = time.perf_counter()
        optimizer.zero_grad()
        function(network(x), y).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def torch_network(case: str, channels: int, classes: int) -> Any:
    """The same layers as in models/."""
    from torch import nn

    def conv(c: int, k: int, window: int = 3, stride: int = 1, act: Any = None) -> list[Any]:
        layers = [nn.Conv2d(c, k, window, stride, window // 2, bias=False), nn.BatchNorm2d(k)]
        return layers + ([act] if act else [])

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self, c: int, k: int, stride: int) -> None:
            super().__init__()
            self.main = nn.Sequential(*conv(c, k, 3, stride, nn.ReLU()), *conv(k, k))
            self.skip = nn.Sequential(*(conv(c, k, 1, stride) if stride > 1 else []))

        def forward(self, x: Any) -> Any:
            return nn.functional.relu(self.main(x) + self.skip(x))

    layers: list[Any] = []
    match case:
        case "lenet":
            layers = [nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5)]
            layers += [nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(120), nn.ReLU()]
            layers += [nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)]
        case "resnet18":
            layers = [*conv(channels, 64, 7, 2, nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
            widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
            layers += [Block(c, k, 1 if c == k else 2) for c, k in pairwise(widths)]
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)]
        case "yolov2" | "vgg_small":
            act = nn.LeakyReLU(0.1) if case == "yolov2" else nn.ReLU()
            yolov2 = [32, 0, 64, 0, 128, -64, 128, 0, 256, -128, 256, 0, 512, -256, 512, -256]
            plan = yolov2 if case == "yolov2" else [16, 16, 0, 32, 32, 0, 64, 64, 0]
            for k in plan:
                layers += conv(channels, abs(k), 3 if k > 0 else 1, 1, act) if k else [nn.MaxPool2d(2)]
                channels = abs(k) or channels
            if case == "vgg_small":
                layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(*layers)


if __name__ == "__main__":
    main()
