"""Convolution kernels against PyTorch (oneDNN), one thread: `python -m benchmarks.kernels [--target avx2] [PATTERN]`.

Prints, per layer, batch and phase, GFLOP/s, PyTorch's, and how many times as fast ours are; then the median and the
least of both groups of layers: 3x3 convolutions of stride 1, for which there is Winograd, and all others. Runs
alternate and each side's best counts, so that other work on the computer disturbs little. PyTorch gets the better of
its two memory layouts (with --compile also torch.compile's choice, which needs a C++ compiler) and, for avx2, no wider
registers; its own layout conversions inside an operator count, as ours do (the transposed weights of the input
gradient). Every result is checked against PyTorch's. Needs torch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusetile.box import volume, whole
from fusetile.codegen.build import build_library
from fusetile.codegen.calls import Lowered
from fusetile.codegen.job import Job
from fusetile.codegen.lower import lower
from fusetile.codegen.targets import Target, target_named
from fusetile.graph import Graph
from fusetile.ops import domain_of
from fusetile.program import Buffer
from fusetile.runtime.native import Library
from fusetile.runtime.storage import make_arena, pack, unpack


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution: channels in and out, size of the input map and of the window, stride, dilation, groups, images.
    With size 0, a fully connected layer. `transposed`: a transposed convolution, without padding."""

    c: int
    k: int
    size: int = 0
    window: int = 1
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    transposed: bool = False
    n: int = 1

    @property
    def pad(self) -> int:
        return 0 if self.transposed else self.dilation * (self.window // 2)

    @property
    def attrs(self) -> dict[str, Any]:
        if not self.size:
            return {}
        window: dict[str, Any] = {"strides": (self.stride,) * 2, "dilations": (self.dilation,) * 2}
        return {**window, "pads": (self.pad,) * 4, **({"groups": self.groups} if self.groups > 1 else {})}

    def __str__(self) -> str:
        if not self.size:
            return f"{self.n}x{self.c}->{self.k}"
        extra = f" s{self.stride}" * (self.stride > 1) + f" d{self.dilation}" * (self.dilation > 1)
        extra += f" g{self.groups}" * (self.groups > 1) + " up" * self.transposed
        return f"{self.n}x{self.c}->{self.k} @{self.size} {self.window}x{self.window}{extra}"


WINOGRAD = (
    Layer(32, 64, 208, 3),
    Layer(64, 128, 104, 3),
    Layer(128, 256, 52, 3),
    Layer(256, 512, 26, 3),
    Layer(512, 1024, 13, 3),
)
OTHERS = (
    Layer(256, 128, 52),
    Layer(512, 256, 26),
    Layer(160, 960, 7),
    Layer(2048, 512, 7),
    Layer(3, 32, 416, 3),
    Layer(3, 64, 224, 7, 2),
    Layer(64, 128, 56, 3, 2),
    Layer(144, 144, 56, 3, groups=144),
    Layer(144, 144, 56, 3, 2, groups=144),
    Layer(192, 192, 28, 3, groups=192),
    Layer(192, 192, 28, 3, 2, groups=192),
    Layer(128, 128, 56, 3, groups=32),
    Layer(256, 256, 28, 3, groups=8),
    Layer(64, 64, 52, 3, 1, 2),
    Layer(512, 4096),
    Layer(512, 256, 32, 2, 2, transposed=True),
    Layer(128, 64, 64, 2, 2, transposed=True),
)
GROUPS = {"3x3, stride 1": WINOGRAD, "others": OTHERS}
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
    k, c = (layer.c, layer.k) if layer.transposed else (layer.k, layer.c)
    w = torch.randn(k, c // layer.groups, layer.window, layer.window) * 0.1
    if layer.transposed:
        return x, w, torch.randn_like(torch.nn.functional.conv_transpose2d(x, w, None, layer.stride))
    y = torch.nn.functional.conv2d(x, w, None, layer.stride, layer.pad, layer.dilation, layer.groups)
    return x, w, torch.randn_like(y)


def torch_runs(layer: Layer, phase: str, *, compiled: bool) -> list[Callable[[], torch.Tensor]]:
    """The phase in PyTorch, for each memory layout."""
    x, w, dy = operands(layer)
    if not layer.size:
        runs: dict[str, Callable[[], torch.Tensor]] = {
            "": lambda: torch.nn.functional.linear(x, w),
            "InputGrad": lambda: dy @ w,
            "WeightGrad": lambda: dy.T @ x,
        }
        return [runs[phase]]
    window = ((layer.stride,) * 2, (layer.pad,) * 2, (layer.dilation,) * 2, layer.transposed, (0, 0), layer.groups)

    def forward(a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.convolution(a, b, None, *window)

    def backward(a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        which = int(phase == "WeightGrad")
        mask = [which == 0, which == 1, False]
        return torch.ops.aten.convolution_backward(g, a, b, None, *window, mask)[which]

    def run(function: Callable[..., torch.Tensor], layout: torch.memory_format) -> Callable[[], torch.Tensor]:
        arrays = [value.contiguous(memory_format=layout) for value in (x, w, dy)]
        return lambda: function(*arrays)

    function = backward if phase else forward
    layouts = (torch.contiguous_format, torch.channels_last)
    found = [run(function, layout) for layout in layouts]
    return found + [run(torch.compile(function, dynamic=False), layout) for layout in layouts if compiled]


def task(layer: Layer, phase: str, target: Target, block: int, *, compiled: bool) -> Task:
    """One phase of a layer on random data."""
    x, w, dy = operands(layer)
    kind, inputs = phase, {"": (x, w), "InputGrad": (dy, w), "WeightGrad": (x, dy)}[phase]
    if layer.transposed:  # the roles of input and output are swapped
        kind = {"": "InputGrad", "InputGrad": ""}.get(phase, phase)
        inputs = inputs[::-1] if phase == "WeightGrad" else inputs
        x = dy
    attrs = {
        **layer.attrs,
        **{"": {}, "InputGrad": {"input_shape": x.shape}, "WeightGrad": {"kernel_shape": w.shape[2:]}}[kind],
    }
    graph, names = Graph(), []
    for i, value in enumerate(inputs):
        label: Any = "filter" if value is w else "map"
        names.append(graph.add_tensor(f"x{i}", tuple(value.shape), "float32", label))
    (result,) = graph.add(f"{'Conv' if layer.size else 'Gemm'}{kind}", names, attrs=attrs, outputs=["y"])
    op = graph.producers()[result]
    domain = domain_of(graph, op)
    buffers = []
    for i, name in enumerate((*names, result)):
        tensor = graph.tensors[name]
        few = tensor.kind == "filter" or (name == names[0] and kind != "InputGrad")
        lanes = (block if tensor.kind == "filter" else 1, min(block, tensor.shape[1]) if few else block)
        border = (0, 0)
        if name in names and tensor.kind == "map" and layer.size:
            reach = domain.reach(domain.box, i)
            wide = [max(0, -a, b - size) for (a, b), size in zip(reach, tensor.shape, strict=True)]
            border = (wide[2], wide[3])
        buffers.append(Buffer(name, whole(tensor.shape), block=lanes, border=border))
    lowered = lower(Job(op, domain, domain.box, buffers[:-1], buffers[-1:], target))
    positions = layer.n * (layer.size**2 if layer.transposed else dy[0, 0].numel())
    values = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    runs = torch_runs(layer, phase, compiled=compiled)
    return Task(layer, phase, 2.0 * w.numel() * positions, [*buffers, *lowered.scratch], values, lowered, runs)


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
    offsets = {name: buffer.offset_bytes for name, buffer in placed.items()}
    segment = library.segment([call.placed(offsets) for call in task.lowered.calls], arena)
    return segment, lambda: unpack(arena, placed["y"], placed["y"].box)


def measure(runs: list[Callable[[], Any]], seconds: float) -> list[float]:
    """Least seconds of each, measured in turns; of the thread's own time, so that preemption does not count."""

    def once(run: Callable[[], Any], repeat: int) -> float:
        start = time.thread_time()
        for _ in range(repeat):
            run()
        return (time.thread_time() - start) / repeat

    repeats = []
    for run in runs:
        run()
        repeats.append(max(1, round(0.001 / (once(run, 1) + 1e-9))))
    times: list[list[float]] = [[] for _ in runs]
    stop = time.thread_time() + seconds
    while time.thread_time() < stop or len(times[0]) < 5:
        for run, repeat, found in zip(runs, repeats, times, strict=True):
            found.append(once(run, repeat))
    return [min(found) for found in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="host", help="host, avx2 or avx512")
    parser.add_argument("--block", type=int, default=0, help="channel block (default: the target's)")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4], help="images (default: 1 4)")
    parser.add_argument("--seconds", type=float, default=0.3, help="per layer and phase")
    parser.add_argument("--compile", action="store_true", help="try torch.compile as well")
    parser.add_argument("pattern", nargs="?", default="", help="only layers whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = target_named(options.target)
    if target.name == "avx2":  # read when oneDNN and MKL are first used
        os.environ.update(ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2")
    block = options.block or target.block
    print(f"{target.name}, channel block {block}; GFLOP/s, PyTorch's, how many times as fast")
    for group, layers in GROUPS.items():
        batches = [replace(layer, n=n) for layer in layers for n in options.batch]
        chosen = [layer for layer in batches if options.pattern in str(layer)]
        if chosen:
            speedups = table(group, chosen, target, block, options)
            every = [value for found in speedups.values() for value in found]
            print(f"{group}: median {statistics.median(every):.2f}, least {min(every):.2f}\n")


def table(
    group: str, layers: Sequence[Layer], target: Target, block: int, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Measure and print all phases of some layers; returns how many times as fast as PyTorch each is."""
    speedups: dict[str, list[float]] = {phase: [] for phase in PHASES}
    print(f"{group:32} {'forward':>21} {'input gradient':>21} {'weight gradient':>21}")
    for layer in layers:
        print(f"{layer!s:32}", end="", flush=True)
        todo = [task(layer, phase, target, block, compiled=options.compile) for phase in PHASES]
        kernels = {call.kernel.symbol: call.kernel for one in todo for call in one.lowered.calls}
        with tempfile.TemporaryDirectory() as directory:
            path = build_library(kernels.values(), target, Path(directory))
            with Library(path, threads=1) as library:
                for one in todo:
                    ours, theirs = race(one, library, options.seconds)
                    speedups[one.phase].append(theirs / ours)
                    rates = f"{one.flops / ours / 1e9:.1f} {one.flops / theirs / 1e9:6.1f}"
                    print(f" {rates:>15} {theirs / ours:5.2f}", end="", flush=True)
        print()
    for name, of in (("median", statistics.median), ("least", min)):
        print(f"{name:32}" + "".join(f" {of(found):21.2f}" for found in speedups.values()))
    return speedups


def race(task: Task, library: Library, seconds: float) -> tuple[float, float]:
    """Seconds of our kernels and of PyTorch's best; refuses wrong results."""
    run, result = prepare(task, library)
    ours, *theirs = measure([run, *task.torch_runs], seconds)
    expected = task.torch_runs[0]().numpy()
    error = float(np.abs(result() - expected).max() / np.abs(expected).max())
    if error > 1e-4:
        raise SystemExit(f"{task.layer} {task.phase}: wrong by {error:.0e}")
    return ours, min(theirs)


if __name__ == "__main__":
    main()
