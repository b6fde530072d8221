"""Convolution kernels against PyTorch (oneDNN), one thread: `python -m benchmarks.kernels [--target avx2] [PATTERN]`.

Prints, per layer and phase, GFLOP/s and the ratio of our time to PyTorch's, and medians of the ratios. Runs alternate
and each side's best counts, so that other work on the computer disturbs little. PyTorch gets the better of its two
memory layouts and, for avx2, no wider registers; its own layout conversions inside an operator count, as ours do (the
transposed weights of the input gradient). Needs torch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusetile.box import volume, whole
from fusetile.codegen.build import build_library
from fusetile.codegen.calls import Lowered
from fusetile.codegen.lower import lower
from fusetile.codegen.targets import Target, target_named
from fusetile.graph import Graph
from fusetile.ops import domain_of
from fusetile.program import Buffer, Call
from fusetile.runtime.native import Library
from fusetile.runtime.storage import make_arena, pack, unpack


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution: images, channels in and out, size of the map and of the window, stride, dilation. With size 0, a
    fully connected layer."""

    n: int
    c: int
    k: int
    size: int = 0
    window: int = 1
    stride: int = 1
    dilation: int = 1

    @property
    def pad(self) -> int:
        return self.dilation * (self.window // 2)

    def __str__(self) -> str:
        if not self.size:
            return f"{self.n}x{self.c}->{self.k}"
        extra = f" s{self.stride}" * (self.stride > 1) + f" d{self.dilation}" * (self.dilation > 1)
        return f"{self.n}x{self.c}->{self.k} @{self.size} {self.window}x{self.window}{extra}"


LAYERS = (
    Layer(1, 3, 32, 208, 3),
    Layer(1, 32, 64, 104, 3),
    Layer(1, 64, 128, 52, 3),
    Layer(1, 128, 256, 26, 3),
    Layer(1, 256, 512, 13, 3),
    Layer(1, 256, 128, 26, 1),
    Layer(1, 512, 256, 13, 1),
    Layer(1, 64, 256, 56, 1),
    Layer(4, 256, 512, 13, 3),
    Layer(1, 3, 64, 224, 7, 2),
    Layer(1, 64, 128, 56, 3, 2),
    Layer(1, 256, 512, 28, 1, 2),
    Layer(8, 512, 512, 7, 3),
    Layer(8, 512, 512, 4, 3),
    Layer(1, 16, 16, 104, 3),
    Layer(8, 16, 32, 32, 3),
    Layer(1, 48, 80, 35, 3),
    Layer(1, 64, 64, 27, 5),
    Layer(1, 64, 64, 52, 3, 1, 2),
    Layer(4, 1, 6, 28, 5),
    Layer(1, 4096, 4096),
    Layer(16, 512, 1000),
    Layer(64, 4096, 1024),
)
PHASES = ("", "InputGrad", "WeightGrad")


@dataclass
class Task:
    """One phase of a layer: what to run here, and what PyTorch does."""

    layer: Layer
    phase: str
    flops: float
    buffers: list[Buffer]
    values: dict[str, np.ndarray]
    lowered: Lowered
    torch_runs: list[Callable[[], torch.Tensor]]


def operands(layer: Layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random x, w and dy."""
    torch.manual_seed(0)
    if not layer.size:
        return torch.randn(layer.n, layer.c), torch.randn(layer.k, layer.c), torch.randn(layer.n, layer.k)
    x = torch.randn(layer.n, layer.c, layer.size, layer.size)
    w = torch.randn(layer.k, layer.c, layer.window, layer.window) * 0.1
    return x, w, torch.randn_like(torch.nn.functional.conv2d(x, w, None, layer.stride, layer.pad, layer.dilation))


def torch_runs(layer: Layer, phase: str) -> list[Callable[[], torch.Tensor]]:
    """The phase in PyTorch, for each memory layout."""
    x, w, dy = operands(layer)
    if not layer.size:
        runs = {
            "": lambda: torch.nn.functional.linear(x, w),
            "InputGrad": lambda: dy @ w,
            "WeightGrad": lambda: dy.T @ x,
        }
        return [runs[phase]]
    window = ((layer.stride,) * 2, (layer.pad,) * 2, (layer.dilation,) * 2)

    def run(layout: torch.memory_format) -> Callable[[], torch.Tensor]:
        a, b, g = (value.contiguous(memory_format=layout) for value in (x, w, dy))
        if not phase:
            return lambda: torch.nn.functional.conv2d(a, b, None, *window)
        which = int(phase == "WeightGrad")
        mask = [which == 0, which == 1, False]
        return lambda: torch.ops.aten.convolution_backward(g, a, b, None, *window, False, (0, 0), 1, mask)[which]

    return [run(torch.contiguous_format), run(torch.channels_last)]


def task(layer: Layer, phase: str, target: Target, block: int) -> Task:
    """One phase of a layer on random data."""
    x, w, dy = operands(layer)
    inputs = {"": (x, w), "InputGrad": (dy, w), "WeightGrad": (x, dy)}[phase]
    attrs: dict[str, Any] = {}
    if layer.size:
        attrs = {"strides": (layer.stride,) * 2, "dilations": (layer.dilation,) * 2, "pads": (layer.pad,) * 4}
    attrs |= {"": {}, "InputGrad": {"input_shape": x.shape}, "WeightGrad": {"kernel_shape": w.shape[2:]}}[phase]
    graph, names = Graph(), []
    for i, value in enumerate(inputs):
        kind: Any = "filter" if value is w else "map"
        names.append(graph.add_tensor(f"x{i}", tuple(value.shape), "float32", kind))
    (result,) = graph.add(f"{'Conv' if layer.size else 'Gemm'}{phase}", names, attrs=attrs, outputs=["y"])
    op = graph.producers()[result]
    domain = domain_of(graph, op)
    buffers = []
    for i, name in enumerate((*names, result)):
        tensor = graph.tensors[name]
        few = tensor.kind == "filter" or (name == names[0] and phase != "InputGrad")
        lanes = (block if tensor.kind == "filter" else 1, min(block, tensor.shape[1]) if few else block)
        border = (0, 0)
        if name in names and tensor.kind == "map" and layer.size:
            reach = domain.reach(domain.box, i)
            wide = [max(0, -a, b - size) for (a, b), size in zip(reach, tensor.shape, strict=True)]
            border = (wide[2], wide[3])
        buffers.append(Buffer(name, whole(tensor.shape), block=lanes, border=border))
    lowered = lower(op, domain, domain.box, buffers[:-1], buffers[-1:], target=target)
    flops = 2.0 * w.numel() * dy.numel() / layer.k
    values = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return Task(layer, phase, flops, [*buffers, *lowered.scratch], values, lowered, torch_runs(layer, phase))


def prepare(task: Task, library: Library) -> tuple[Callable[[], None], Callable[[], np.ndarray]]:
    """Fill an arena; returns what runs the calls and what reads the result."""
    placed, size = {}, 0
    for buffer in task.buffers:
        placed[buffer.name] = replace(buffer, offset_bytes=size)
        size += -(-buffer.size_bytes // 64) * 64
    arena = make_arena(size)
    for name, value in task.values.items():
        assert volume(placed[name].box) == value.size
        pack(arena, placed[name], placed[name].box, value)
    calls = [
        Call(
            call.kernel.symbol,
            call.split,
            tuple(placed[p.buffer].offset_bytes + p.offset_bytes for p in call.pointers),
            call.ints,
            call.floats,
        )
        for call in task.lowered.calls
    ]
    segment = library.segment(calls, arena)
    return segment, lambda: unpack(arena, placed["y"], placed["y"].box)


def measure(runs: list[Callable[[], Any]], seconds: float) -> list[float]:
    """Least seconds of each, measured in turns."""
    repeats = []
    for run in runs:
        run()
        start = time.perf_counter()
        run()
        repeats.append(max(1, round(0.001 / (time.perf_counter() - start + 1e-9))))
    times: list[list[float]] = [[] for _ in runs]
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[0]) < 5:
        for run, repeat, found in zip(runs, repeats, times, strict=True):
            start = time.perf_counter()
            for _ in range(repeat):
                run()
            found.append((time.perf_counter() - start) / repeat)
    return [min(found) for found in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="host", help="host, avx2 or avx512")
    parser.add_argument("--block", type=int, default=0, help="channel block (default: the target's)")
    parser.add_argument("--seconds", type=float, default=0.15, help="per layer and phase")
    parser.add_argument("pattern", nargs="?", default="", help="only layers whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = target_named(options.target)
    if target.name == "avx2":  # read when oneDNN and MKL are first used
        os.environ.update(ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2")
    chosen = [layer for layer in LAYERS if options.pattern in str(layer)]
    block = options.block or target.block
    todo = [task(layer, phase, target, block) for layer in chosen for phase in PHASES]
    kernels = {call.kernel.symbol: call.kernel for one in todo for call in one.lowered.calls}
    ratios: dict[str, list[float]] = {phase: [] for phase in PHASES}
    print(f"{target.name}, channel block {block}, {len(kernels)} kernels; GFLOP/s, PyTorch's, ratio of the times")
    print(f"{'layer':24} {'forward':>21} {'input gradient':>21} {'weight gradient':>21}")
    with tempfile.TemporaryDirectory() as directory:
        path = build_library(kernels.values(), target, Path(directory))
        with Library(path, threads=1) as library:
            for one in todo:
                if one.phase == PHASES[0]:
                    print(f"{one.layer!s:24}", end="", flush=True)
                run, result = prepare(one, library)
                ours, *theirs = measure([run, *one.torch_runs], options.seconds)
                expected = one.torch_runs[0]().numpy()
                error = float(np.abs(result() - expected).max() / np.abs(expected).max())
                if error > 1e-4:
                    raise SystemExit(f"{one.layer} {one.phase}: wrong by {error:.0e}")
                ratios[one.phase].append(ours / min(theirs))
                rates = f"{one.flops / ours / 1e9:.1f} {one.flops / min(theirs) / 1e9:6.1f}"
                last = "\n" if one.phase == PHASES[-1] else ""
                print(f" {rates:>15} {ratios[one.phase][-1]:5.2f}", end=last, flush=True)
    print(f"{'median':24}" + "".join(f" {statistics.median(found):21.2f}" for found in ratios.values()))


if __name__ == "__main__":
    main()
