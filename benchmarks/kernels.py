"""Convolution kernels against PyTorch (oneDNN), one thread: `python -m benchmarks.kernels [--target avx2] [PATTERN]`.

Prints, per layer and phase, GFLOP/s and the ratio of our time to PyTorch's: medians of runs that alternate. PyTorch gets
the better of its two memory layouts and, for avx2, no wider registers; its own layout conversions inside an operator count, as ours do (the transposed
weights of the input gradient). Needs torch.
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
from rich.console import Console
from rich.table import Table

from fusetile.box import volume, whole
from fusetile.codegen.build import build_library
from fusetile.codegen.calls import Lowered
from fusetile.codegen.lower import lower
from fusetile.codegen.targets import target_named
from fusetile.graph import Graph
from fusetile.ops import domain_of
from fusetile.program import Buffer, Call
from fusetile.runtime.native import Library
from fusetile.runtime.storage import make_arena, pack, unpack


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution: images, channels in and out, size of the map, of the window, stride, padding."""

    n: int
    c: int
    k: int
    size: int
    window: int
    stride: int = 1
    dilation: int = 1

    @property
    def pad(self) -> int:
        return self.dilation * (self.window // 2)

    def __str__(self) -> str:
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
    Layer(16, 256, 1000, 1, 1),
)
PHASES = ("Conv", "ConvInputGrad", "ConvWeightGrad")


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


def tasks(layer: Layer, target: Any, block: int) -> list[Task]:
    """The three phases of a layer on random data."""
    torch.manual_seed(0)
    x = torch.randn(layer.n, layer.c, layer.size, layer.size)
    w = torch.randn(layer.k, layer.c, layer.window, layer.window) * 0.1
    strides, dilations, pads = ((v, v) for v in (layer.stride, layer.dilation, layer.pad))
    y = torch.nn.functional.conv2d(x, w, None, strides, pads, dilations)
    dy = torch.randn_like(y)
    flops = 2.0 * layer.c * layer.window**2 * y.numel()

    def torch_run(phase: str, layout: torch.memory_format) -> Callable[[], torch.Tensor]:
        a, b, g = (value.contiguous(memory_format=layout) for value in (x, w, dy))
        if phase == "Conv":
            return lambda: torch.nn.functional.conv2d(a, b, None, strides, pads, dilations)
        which = int(phase == "ConvWeightGrad")
        mask = [which == 0, which == 1, False]
        backward = torch.ops.aten.convolution_backward
        return lambda: backward(g, a, b, None, strides, pads, dilations, False, (0, 0), 1, mask)[which]

    found = []
    operands = {"Conv": (x, w), "ConvInputGrad": (dy, w), "ConvWeightGrad": (x, dy)}
    for phase in PHASES:
        graph, names, filters = Graph(), [], (1,) if phase != "ConvWeightGrad" else ()
        for i, value in enumerate(operands[phase]):
            kind: Any = "filter" if i in filters else "map"
            names.append(graph.add_tensor(f"x{i}", tuple(value.shape), "float32", kind))
        attrs = {"strides": strides, "dilations": dilations, "pads": (*pads, *pads)}
        attrs |= {"ConvInputGrad": {"input_shape": x.shape}, "ConvWeightGrad": {"kernel_shape": w.shape[2:]}}.get(
            phase, {}
        )
        (result,) = graph.add(phase, names, attrs=attrs, outputs=["y"])
        op = graph.producers()[result]
        domain = domain_of(graph, op)
        buffers = []
        for i, name in enumerate((*names, result)):
            tensor = graph.tensors[name]
            lanes = (block, min(tensor.shape[1], block)) if tensor.kind == "filter" else (1, block)
            border = (0, 0)
            if i < len(names) and tensor.kind == "map":
                reach = domain.reach(domain.box, i)
                wide = [max(0, -a, b - size) for (a, b), size in zip(reach, tensor.shape, strict=True)]
                border = (wide[2], wide[3])
                lanes = (1, min(block, tensor.shape[1])) if phase != "ConvInputGrad" else lanes
            buffers.append(Buffer(name, whole(tensor.shape), block=lanes, border=border))
        lowered = lower(op, domain, domain.box, buffers[:-1], buffers[-1:], target=target)
        values = {name: value.numpy() for name, value in zip(names, operands[phase], strict=True)}
        runs = [torch_run(phase, layout) for layout in (torch.contiguous_format, torch.channels_last)]
        found.append(Task(layer, phase, flops, [*buffers, *lowered.scratch], values, lowered, runs))
    return found


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
    """Median seconds of each, measured in turns."""
    repeats = []
    for run in runs:
        run()
        start = time.perf_counter()
        run()
        repeats.append(max(1, round(0.002 / (time.perf_counter() - start + 1e-9))))
    times: list[list[float]] = [[] for _ in runs]
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[0]) < 5:
        for run, repeat, found in zip(runs, repeats, times, strict=True):
            start = time.perf_counter()
            for _ in range(repeat):
                run()
            found.append((time.perf_counter() - start) / repeat)
    return [statistics.median(found) for found in times]


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
    todo = [task for layer in chosen for task in tasks(layer, target, options.block or target.block)]
    kernels = {call.kernel.symbol: call.kernel for task in todo for call in task.lowered.calls}
    table = Table("layer", *(f"{phase}: GFLOP/s, PyTorch, ratio" for phase in PHASES), title=f"{len(kernels)} kernels")
    ratios: dict[str, list[float]] = {phase: [] for phase in PHASES}
    with tempfile.TemporaryDirectory() as directory:
        path = build_library(kernels.values(), target, Path(directory))
        with Library(path, threads=1) as library:
            cells: dict[Layer, list[str]] = {}
            for task in todo:
                run, result = prepare(task, library)
                ours, *theirs = measure([run, *task.torch_runs], options.seconds)
                expected = task.torch_runs[0]().numpy()
                error = float(np.abs(result() - expected).max() / np.abs(expected).max())
                ratio = ours / min(theirs)
                ratios[task.phase].append(ratio)
                note = f" WRONG {error:.0e}" if error > 1e-4 else ""
                text = f"{task.flops / ours / 1e9:6.1f} {task.flops / min(theirs) / 1e9:6.1f} {ratio:5.2f}{note}"
                cells.setdefault(task.layer, []).append(text)
    for layer, row in cells.items():
        table.add_row(str(layer), *row)
    medians = [f"median ratio {statistics.median(ratios[phase]):.2f}" for phase in PHASES]
    table.add_row("", *medians)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
