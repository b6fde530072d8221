"""A whole training step on one device against other frameworks: `python -m benchmarks.step [PATTERN]`.

Prints, per network and batch, the seconds of a step (forward, loss, backward, SGD with momentum) of a real fusetile
node, the best peer's, which that is, the ratio of the two, and the peak resident memory of both processes. Peers are
PyTorch with its own memory layout, with channels_last, and with torch.compile (needs g++); with `--ort PYTHON` also
ONNX Runtime, whose training package lives in an environment of its own, which PYTHON is the interpreter of:

    python3.11 -m venv ort
    ort/bin/pip install onnxruntime-training==1.19.2 'onnx==1.16.2' 'numpy<2' cerberus torch
    python -m benchmarks.step --ort ort/bin/python

ONNX Runtime's SGD has no momentum, which makes its step a little cheaper. All sides take turns, some steps each, so
that a disturbance of the machine meets all of them; the figure is the fastest step. Needs torch. `--all` prints a line
for every peer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusetile.cluster import local_cluster
from fusetile.options import Loss, Training
from fusetile.pipeline import compile_model

WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Case:
    """A network of models/, the size of its images, and the loss it is trained with."""

    model: str
    size: int
    loss: Loss = "cross-entropy"


CASES = (
    Case("lenet", 28),
    Case("yolov2", 416, "mse"),
    Case("yolov2", 608, "mse"),
    Case("vgg16", 224),
    Case("resnet18", 224),
    Case("darknet19", 224),
    Case("mobilenetv2", 224),
    Case("unet", 256),
)
BATCHES = (1, 4)
TORCH = ("eager", "channels_last", "compile")


@dataclass(frozen=True, slots=True)
class Measured:
    """What one side needs for a step."""

    name: str
    seconds: float
    peak_MB: float


def main() -> None:
    """Every case and batch whose name contains the pattern."""
    lines = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lines.add_argument("pattern", nargs="?", default="", help="a part of the name, like resnet18 or 'batch 1'")
    lines.add_argument("--threads", type=int, default=1)
    lines.add_argument("--steps", type=int, default=5, help="of every side in a turn")
    lines.add_argument("--turns", type=int, default=3)
    lines.add_argument("--peers", nargs="*", default=TORCH, choices=TORCH, help="of PyTorch; default: all")
    lines.add_argument("--ort", metavar="PYTHON", help="an interpreter that has onnxruntime-training")
    lines.add_argument("--all", action="store_true", help="a line for every peer")
    options = lines.parse_args()
    print(f"{'network':26} {'fusetile':>9} {'best peer':>9} {'':14} {'ratio':>6} {'fusetile':>9} {'peer':>9}")
    for case in CASES:
        for batch in BATCHES:
            name = f"{case.model}@{case.size} batch {batch}"
            if options.pattern in name:
                ours, *peers = measure(case, batch, options)
                peers.sort(key=lambda peer: peer.seconds)
                for peer in peers if options.all else peers[:1]:
                    times = f"{ours.seconds:8.4f}s {peer.seconds:8.4f}s {peer.name:14}"
                    memory = f"{ours.peak_MB:6.0f} MB {peer.peak_MB:6.0f} MB"
                    print(f"{name:26} {times} {ours.seconds / peer.seconds:6.2f} {memory}", flush=True)


def measure(case: Case, batch: int, options: argparse.Namespace) -> list[Measured]:
    """fusetile, then the peers; one that can't train this network is told of and left out."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        bundle = prepare(case, batch, folder)
        runs = [(sys.executable, f"torch {peer}") for peer in options.peers]
        runs += [(options.ort, "onnxruntime")] if options.ort else []
        peers = [stack.enter_context(Peer(name, python, folder, case.loss, options.threads)) for python, name in runs]
        command = [sys.executable, "-m", "fusetile.runtime.node", str(bundle), "--data", str(folder / "data.npz")]
        command += ["--steps", str(options.steps + WARM_UP), "--threads", str(options.threads)]
        command += ["--quiet", "--log", str(folder / "log.jsonl")]
        seconds, peak_MB = [], 0.0
        for _ in range(options.turns):
            peak_MB = max(peak_MB, run_measured(command))
            log = (folder / "log.jsonl").read_text().splitlines()
            seconds += [json.loads(line)["seconds"] for line in log[WARM_UP:]]
            for peer in peers:
                peer.turn(options.steps)
        results = [peer.result() for peer in peers]
    return [Measured("fusetile", min(seconds), peak_MB), *(result for result in results if result)]


def prepare(case: Case, batch: int, folder: Path) -> Path:
    """Write the model, the data and the bundle, which is returned."""
    model = folder / "model.onnx"
    command = [sys.executable, "-m", f"models.{case.model}", "--size", str(case.size), "--batch", str(batch)]
    subprocess.run([*command, "-o", str(model)], check=True, stdout=subprocess.DEVNULL)
    training = Training(loss=case.loss, batch=batch, learning_rate=1e-4)
    compile_model(model, cluster=local_cluster(1), training=training, build=folder / "build")
    bundle = folder / "build/nodes/node0"
    feeds = {feed["role"]: feed for feed in json.loads((bundle / "program.json").read_text())["feeds"]}
    random = np.random.default_rng(0)
    x = random.standard_normal(feeds["input"]["shape"], np.float32)
    target = feeds["target"]
    if case.loss == "mse":
        y = random.standard_normal(target["shape"], np.float32)
    else:
        y = random.integers(0, target["classes"], target["shape"])
    np.savez(folder / "data.npz", x=x, y=y)
    return bundle


class Peer:
    """A process of benchmarks.peers, which waits for its turns."""

    def __init__(self, name: str, python: str, folder: Path, loss: str, threads: int) -> None:
        self.name, self._seconds = name, list[float]()
        command = [python, "-m", "benchmarks.peers", name.split()[-1], str(folder), loss, str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def turn(self, steps: int) -> None:
        """Let it do some steps; the first time it also gets ready."""
        answer = self._ask(f"{steps}\n")
        self._seconds += json.loads(answer) if answer else []

    def result(self) -> Measured | None:
        """None, and a line to say why, if it has failed."""
        peak = self._ask("peak\n")
        if peak:
            return Measured(self.name, min(self._seconds), json.loads(peak))
        _, errors = self._process.communicate()
        print(f"{self.name} fails: {(errors.strip().splitlines() or ['no message'])[-1]}", file=sys.stderr)
        return None

    def _ask(self, line: str) -> str:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            return ""
        return self._process.stdout.readline()


# The kernel's own record of a process's peak starts with that of the process it was forked from; this one does not.
MEASURED = """
import pathlib, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print(next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
"""


def run_measured(command: list[str]) -> float:
    """The peak resident memory (MB) of `python -m MODULE ...`, run as a process."""
    python, _, *arguments = command
    done = subprocess.run([python, "-c", MEASURED, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments[0]} ended with status {done.returncode}")
    return int(done.stdout.splitlines()[-1].split()[1]) / 1e3


if __name__ == "__main__":
    main()
