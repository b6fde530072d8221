"""Layers of several ops, or without Winograd, against eager PyTorch: `python -m benchmarks.modules [PATTERN]`.

Prints, per layer, milliseconds forward and backward of ours and of PyTorch on one thread, and how many times as fast
ours are. Each layer is exported and imported as a part of a network would be; what is counted are the kernels of the
layer's own nodes, as a step runs them, copies into other layouts included. In front of every input stands a product
with a weight, so that the layer has input gradients; neither that nor the loss counts, on both sides. The least of
several runs, whose turns alternate. Needs torch.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.profile import profile
from fusetile.cluster import local_cluster
from fusetile.options import Training
from fusetile.pipeline import imported, plan_graph, write_planned
from fusetile.runtime.node import load_program
from fusetile.trace import Trace

LAYER = "/layer"  # in the names of the nodes that count


@dataclass(frozen=True, slots=True)
class Layer:
    """A module of some inputs, and their shapes; the first dimension is the batch."""

    name: str
    module: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


class LayerNormChannels(nn.LayerNorm):
    """Over the channels of a map, as ConvNeXt has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """softmax(q k^T) v of all heads of a transformer, with the projections around it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images, tokens, width = x.shape
        qkv = self.qkv(x).reshape(images, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = ((q * (width // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(images, tokens, width))


def _function(function: Callable[..., torch.Tensor]) -> Callable[[], nn.Module]:
    return functools.partial(Function, function)


def _layer(kind: Callable[..., nn.Module], *arguments: object, **options: object) -> Callable[[], nn.Module]:
    return functools.partial(kind, *arguments, **options)


def _shuffled(x: torch.Tensor) -> torch.Tensor:
    """The channels of two groups by turns."""
    images, channels, *sides = x.shape
    return x.reshape(images, 2, channels // 2, *sides).transpose(1, 2).reshape(x.shape)


def _pooled(move: nn.Module) -> Callable[[], nn.Module]:
    """A move of elements in front of pooling: alone it would become part of what follows the layer."""
    return _layer(nn.Sequential, move, nn.MaxPool2d(2))


def _resize(mode: str) -> Callable[[], nn.Module]:
    return _layer(nn.Upsample, scale_factor=2.0, mode=mode)


LAYERS = (
    Layer("q k^T, 8 heads of 196", _function(lambda q, k: q @ k.transpose(-2, -1)), ((2, 8, 196, 64),) * 2),
    Layer("w v, 8 heads of 196", _function(torch.matmul), ((2, 8, 196, 196), (2, 8, 196, 64))),
    Layer("[16, 400, 32] @ [16, 32, 400]", _function(torch.matmul), ((16, 400, 32), (16, 32, 400))),
    Layer("softmax, 8 heads of 196", _layer(nn.Softmax, -1), ((2, 8, 196, 196),)),
    Layer("softmax, 64 windows of 49", _layer(nn.Softmax, -1), ((64, 3, 49, 49),)),
    Layer("LayerNorm [2, 196, 384]", _layer(nn.LayerNorm, 384), ((2, 196, 384),)),
    Layer("LayerNorm channels 96 @56", _layer(LayerNormChannels, 96), ((2, 96, 56, 56),)),
    Layer("InstanceNorm 64 @56", _layer(nn.InstanceNorm2d, 64, affine=True), ((2, 64, 56, 56),)),
    Layer("GroupNorm 8 of 64 @56", _layer(nn.GroupNorm, 8, 64), ((2, 64, 56, 56),)),
    Layer("BatchNorm 64 @56", _layer(nn.BatchNorm2d, 64), ((2, 64, 56, 56),)),
    Layer("Gelu 96 @56", _layer(nn.GELU), ((2, 96, 56, 56),)),
    Layer("SiLU 96 @56", _layer(nn.SiLU), ((2, 96, 56, 56),)),
    Layer("channel shuffle 232 @28, pool", _pooled(Function(_shuffled)), ((2, 232, 28, 28),)),
    Layer("pixel shuffle 256 @28, pool", _pooled(nn.PixelShuffle(2)), ((2, 256, 28, 28),)),
    Layer("space to depth 64 @56, pool", _pooled(nn.PixelUnshuffle(2)), ((2, 64, 56, 56),)),
    Layer("nearest x2 64 @28", _resize("nearest"), ((2, 64, 28, 28),)),
    Layer("bilinear x2 64 @28", _resize("bilinear"), ((2, 64, 28, 28),)),
    Layer("ConvTranspose k4 s2 128->64 @28", _layer(nn.ConvTranspose2d, 128, 64, 4, 2, 1), ((2, 128, 28, 28),)),
    Layer("depthwise 7x7 96 @56", _layer(nn.Conv2d, 96, 96, 7, padding=3, groups=96), ((2, 96, 56, 56),)),
    Layer("depthwise 7x7 384 @14", _layer(nn.Conv2d, 384, 384, 7, padding=3, groups=384), ((2, 384, 14, 14),)),
    Layer("attention of 196 x 384, 6 heads", _layer(Attention, 384, 6), ((2, 196, 384),)),
    Layer("attention of 196 x 512, 8 heads", _layer(Attention, 512, 8), ((2, 196, 512),)),
    Layer("attention of 400 x 128, 2 heads", _layer(Attention, 128, 2), ((2, 400, 128),)),
    Layer("attention of 1024 x 32, 1 head", _layer(Attention, 32, 1), ((2, 1024, 32),)),
    Layer("attention, 64 windows of 49 x 96, 3 heads", _layer(Attention, 96, 3), ((64, 49, 96),)),
)


class Fronted(nn.Module):
    """A layer behind products with weights."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer.module()
        self.front = nn.ParameterList([torch.ones(1, *shape[1:]) for shape in layer.shapes])

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        shaped = (x.reshape(-1, *weight.shape[1:]) for x, weight in zip(inputs, self.front, strict=True))
        y: torch.Tensor = self.layer(*(x * weight for x, weight in zip(shaped, self.front, strict=True)))
        return y


def ours(layer: Layer, folder: Path, runs: int) -> tuple[tuple[float, float], dict[str, float]]:
    """Milliseconds forward and backward, and those of every kernel."""
    model = folder / "model.onnx"
    inputs = tuple(torch.randn(*shape, *[1] * (4 - len(shape))) for shape in layer.shapes)
    names = [f"x{i}" for i in range(len(inputs))]
    options = {"dynamo": False, "opset_version": 17, "input_names": names, "do_constant_folding": False}
    torch.onnx.export(Fronted(layer).train(), inputs, str(model), training=torch.onnx.TrainingMode.TRAINING, **options)
    training = Training(loss="mse", batch=layer.shapes[0][0])
    graph = imported(model, training=training, trace=Trace())
    cluster = local_cluster(1)
    planned = plan_graph(graph, cluster=cluster, training=training, trace=Trace())
    write_planned(planned, folder / "build", model=model, cluster=cluster, training=training, trace=Trace())
    bundle = folder / "build/nodes/node0"
    ops = planned.laid.graph.ops
    found, kernels = {"forward": 0.0, "backward": 0.0}, dict[str, float]()
    for call, seconds in profile(load_program(bundle), bundle, 1, runs)[0]:
        op = ops.get(call.op)
        if op is None or op.phase not in found or LAYER not in op.origin:
            continue
        found[op.phase] += seconds * 1e3
        label = f"{op.phase} {op.kind} {call.kernel}"
        kernels[label] = kernels.get(label, 0.0) + seconds * 1e3
    return (found["forward"], found["backward"]), kernels


def theirs(layer: Layer, runs: int) -> tuple[float, float]:
    """The same of PyTorch."""
    module = layer.module().train()
    inputs = [torch.randn(shape, requires_grad=True) for shape in layer.shapes]
    wanted = [*inputs, *module.parameters()]
    dy = torch.randn_like(module(*inputs))
    best = [float("inf")] * 2
    for _ in range(runs):
        start = time.perf_counter()
        y = module(*inputs)
        middle = time.perf_counter()
        torch.autograd.grad(y, wanted, dy)
        end = time.perf_counter()
        best = [min(best[0], (middle - start) * 1e3), min(best[1], (end - middle) * 1e3)]
    return best[0], best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="", help="only layers whose name contains this")
    parser.add_argument("--runs", type=int, default=9, help="per turn, of two")
    parser.add_argument("--kernels", action="store_true", help="the milliseconds of every kernel as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'milliseconds':42} {'forward':>8} {'PyTorch':>8} {'':5} {'backward':>9} {'PyTorch':>8} {'':5} {'both':>6}")
    for layer in LAYERS:
        if options.pattern in layer.name:
            compare(layer, options.runs, kernels=options.kernels)


def compare(layer: Layer, runs: int, *, kernels: bool) -> None:
    """Print a layer's line."""
    with tempfile.TemporaryDirectory() as folder:
        turns = [(theirs(layer, runs), ours(layer, Path(folder), runs)) for _ in range(2)]
    forward, backward = (min(mine[i] for _, (mine, _) in turns) for i in (0, 1))
    forward_peer, backward_peer = (min(peer[i] for peer, _ in turns) for i in (0, 1))
    both = (forward_peer + backward_peer) / (forward + backward)
    cells = f"{forward:8.2f} {forward_peer:8.2f} {forward_peer / forward:5.2f}"
    cells += f" {backward:9.2f} {backward_peer:8.2f} {backward_peer / backward:5.2f} {both:6.2f}"
    print(f"{layer.name:42} {cells}", flush=True)
    if kernels:
        for label, milliseconds in sorted(turns[-1][1][1].items(), key=lambda item: -item[1]):
            print(f"    {milliseconds:8.3f}  {label}")


if __name__ == "__main__":
    main()
