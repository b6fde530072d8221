"""Predicted speedups of plans: what the planner finds, beside data parallel training and uniform grids.

python -m benchmarks.plans            the table: model, batch, nodes; seconds, speedups, gap, planning time
python -m benchmarks.plans --memory   arenas of the fastest plan and under caps, beside one device that keeps all
python -m benchmarks.plans --mixed    2 Pi 4 and 2 Pi 3: parts in proportion to speed against equal parts
python -m benchmarks.plans --curve    speedup against the speed of kernels, at 100 Mbit/s and 1 Gbit/s, fp32 and fp16

All times are the simulation's, for profiles of devices that are estimates (fusetile/cluster.py).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path

import onnx
from rich.console import Console
from rich.table import Table

from fusetile.cluster import Cluster, Link, Node, local_cluster
from fusetile.device import PROFILES
from fusetile.errors import DoesNotFit
from fusetile.graph import Graph
from fusetile.onnx_import import import_onnx
from fusetile.ops import row
from fusetile.options import Loss, Training
from fusetile.passes.communicate import communicate
from fusetile.passes.fit import INTERPRETER_bytes
from fusetile.passes.group import group
from fusetile.passes.place import place
from fusetile.passes.rematerialize import cheap, rematerialize
from fusetile.passes.rules import rule_splits
from fusetile.passes.schedule import schedule
from fusetile.pipeline import lay_out, plan_graph, training_graph
from fusetile.plan import Estimate, Plan
from fusetile.planner.choose import best_plan
from fusetile.planner.simulate import simulate
from fusetile.trace import Trace
from models import darknet19, densenet121, mobilenetv2, resnet18, resnet50, unet, vgg16, yolov2

BLOCK = 8
MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], Loss]] = {
    "yolov2-16": (yolov2.build, "mse"),
    "yolov2-25": (lambda: yolov2.build(layers=len(yolov2.LAYERS), classes=425), "mse"),
    "vgg16": (vgg16.build, "cross-entropy"),
    "unet": (unet.build, "cross-entropy"),
    "resnet18": (resnet18.build, "cross-entropy"),
    "resnet50": (resnet50.build, "cross-entropy"),
    "densenet121": (densenet121.build, "cross-entropy"),
    "mobilenetv2": (mobilenetv2.build, "cross-entropy"),
    "darknet19": (darknet19.build, "cross-entropy"),
}


def planned_graph(build: Callable[[], onnx.ModelProto], loss: Loss, batch: int) -> Graph:
    """The graph that is planned."""
    whole = training_graph(_forward(build, batch), training=Training(batch=batch, loss=loss), trace=Trace())
    return rematerialize(whole, cheap(whole))


def _forward(build: Callable[[], onnx.ModelProto], batch: int) -> Graph:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(build(), path)
        return import_onnx(path, batch=batch)


def single(graph: Graph, cluster: Cluster) -> float:
    """Seconds of a step on the first device of a cluster."""
    alone = Cluster(cluster.nodes[:1], cluster.link)
    plan = place(graph, rule_splits(graph, "single", alone), speeds=alone.speeds, block=BLOCK)
    plan = group(graph, plan, cluster=alone)
    communication = communicate(graph, plan, block=BLOCK)
    return simulate(communication, schedule(graph, plan, communication, cluster=alone), alone).seconds


def planned(graph: Graph, cluster: Cluster) -> tuple[Plan, Estimate, float]:
    """The planner's plan, what it expects, and the processor seconds that it took."""
    start = time.process_time()
    plan = best_plan(graph, cluster=cluster, block=BLOCK)
    assert plan.estimate is not None
    return plan, plan.estimate, time.process_time() - start


def of_devices(
    nodes: int, *, cores: int = 4, core_flops: float = 0.0, rate: float = 94e6, kind: str = "pi3"
) -> Cluster:
    """Equal devices on a link of so many bits per second."""
    cluster = local_cluster(nodes, target="pi3")
    device = replace(PROFILES["pi3"], cores=cores, core_flops=core_flops or PROFILES["pi3"].core_flops)
    return Cluster(tuple(replace(node, device=device) for node in cluster.nodes), Link(rate / 8, 0.3e-3))


def speedups(names: list[str], batches: list[int], counts: list[int], console: Console) -> None:
    """The table of all models."""
    table = Table(
        *("model", "batch", "nodes", "one core", "one device", "auto", "batch", "grid", "x core", "x device"),
        *("x best rule", "gap", "planning"),
    )
    for name in names:
        build, loss = MODELS[name]
        for batch in batches:
            graph = planned_graph(build, loss, batch)
            core, one = single(graph, of_devices(1, cores=1)), single(graph, of_devices(1))
            for nodes in counts:
                cluster = of_devices(nodes)
                _, estimate, planning = planned(graph, cluster)
                auto = estimate.step_seconds
                rules = [estimate.others[rule] for rule in ("batch", "grid")]
                table.add_row(
                    *(name, str(batch), str(nodes)),
                    *(f"{seconds:.2f}" for seconds in (core, one, auto, *rules)),
                    *(f"{core / auto:.1f}", f"{one / auto:.2f}", f"{min(rules) / auto:.2f}"),
                    *(f"{100 * estimate.gap:.1f} %", f"{planning:.0f} s"),
                )
                console.print(table.columns[0].header, name, batch, nodes, f"{one / auto:.2f}", style="dim")
    console.print(table)


def memory(names: list[str], batches: list[int], counts: list[int], less: list[float], console: Console) -> None:
    """Arenas, with the kernels' scratch, that the programs would have; beside one device that keeps everything as
    Darknet does ("framework", see `_framework_bytes`), and one with fusetile's kernels that computes nothing twice: if
    no values share memory ("all values"), and if those do that are not needed at the same time ("arena of one"). Where
    there is so many times less memory than the last of these, what it costs."""
    table = Table(
        *("model", "batch", "nodes", "framework", "all values", "arena of one", "cap", "arena", "x less", "step"),
        *("computed again", ""),
    )
    for name, batch, nodes in product(names, batches, counts):
        build, loss = MODELS[name]
        alone = _framework_bytes(_forward(build, batch)), *_keeping_bytes(build, loss, batch)
        for times in (0.0, *less):
            room = alone[-1] / times if times else 0.0
            cluster, training = of_devices(nodes), Training(batch=batch, loss=loss)
            told = ""
            try:
                found = plan_graph(
                    _forward(build, batch), cluster=_capped(cluster, room), training=training, trace=Trace()
                ).description
            except DoesNotFit as error:
                told = str(error)
                table.add_row(name, str(batch), str(nodes), *map(_mb, alone), _mb(room), *[""] * 4, told)
                continue
            arena, recomputed = max(node["arena_bytes"] for node in found["nodes"]), found["recomputed"]
            table.add_row(
                *(name, str(batch), str(nodes), *map(_mb, alone), _mb(room) if room else "none"),
                *(_mb(arena), ", ".join(f"{one / arena:.1f}" for one in alone), f"{found['step_seconds']:.2f} s"),
                *(f"{recomputed['maps']} maps, {recomputed['seconds']:.2f} s", told),
            )
            console.print(name, batch, nodes, _mb(room), _mb(arena), f"{found['step_seconds']:.2f} s", style="dim")
    console.print(table)


def _framework_bytes(forward: Graph) -> int:
    """Of one device that keeps everything: every map of the model (a convolution's result, its normalized and its
    activated form), a gradient for each that is not made in place, and of the weights also gradients and momenta. That
    is what Darknet allocates for a layer: x, x_norm, output and delta."""
    floats = 3 * sum(prod(forward.tensors[name].shape) for name in forward.parameters)
    for op in forward.ops.values():
        in_place = row(op.kind).expression or row(op.kind).overwrites
        maps = (prod(forward.tensors[name].shape) for name in op.outputs if len(forward.tensors[name].shape) == 4)
        floats += sum(maps) * (1 if in_place else 2)
    return 4 * floats


def _keeping_bytes(build: Callable[[], onnx.ModelProto], loss: Loss, batch: int) -> tuple[int, int]:
    """Of one device that computes nothing twice: all values, and its arena."""
    alone, training = of_devices(1), Training(batch=batch, loss=loss)
    graph = training_graph(_forward(build, batch), training=training, trace=Trace())
    plan = place(graph, rule_splits(graph, "single", alone), speeds=alone.speeds, block=BLOCK)
    laid = lay_out(graph, plan, cluster=alone, training=training, trace=Trace())
    (memory,), (draft,) = laid.memories, laid.drafts
    return sum(memory.sizes_bytes.values()) - sum(draft.scratch_bytes.values()), memory.arena_bytes


def _capped(cluster: Cluster, room_bytes: float) -> Cluster:
    """Devices with so much memory for their arenas; 0 stands for what they have."""
    if not room_bytes:
        return cluster
    memory = int(room_bytes) + INTERPRETER_bytes
    nodes = (replace(node, device=replace(node.device, memory_bytes=memory)) for node in cluster.nodes)
    return replace(cluster, nodes=tuple(nodes))


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def mixed(batch: int, console: Console) -> None:
    """Unequal boxes against the best plan with equal ones, on the same unequal devices."""
    kinds = ("pi4", "pi4", "pi3", "pi3")
    nodes = tuple(Node(f"node{i}", f"127.0.0.1:{7300 + i}", PROFILES[kind]) for i, kind in enumerate(kinds))
    cluster = Cluster(nodes, Link(94e6 / 8, 0.3e-3))
    equal = Cluster(tuple(replace(node, device=PROFILES["pi3"]) for node in nodes), cluster.link)
    table = Table("model", "batch", "in proportion", "equal", "gain")
    for name in ("yolov2-16", "vgg16", "unet"):
        build, loss = MODELS[name]
        graph = planned_graph(build, loss, batch)
        _, estimate, _ = planned(graph, cluster)
        plan, _, _ = planned(graph, equal)
        communication = communicate(graph, plan, block=BLOCK)
        order = schedule(graph, plan, communication, cluster=cluster)
        others = simulate(communication, order, cluster).seconds
        gain = others / estimate.step_seconds
        table.add_row(name, str(batch), f"{estimate.step_seconds:.2f}", f"{others:.2f}", f"{gain:.2f}")
    console.print(table)


def curve(name: str, batches: list[int], nodes: int, console: Console) -> None:
    """Faster kernels make communication weigh more: step times and speedups, with float32 and float16 on the wire."""
    build, loss = MODELS[name]
    table = Table("GFLOP/s per core", "link", "batch", "one device", f"{nodes} devices", "speedup", "fp16", "speedup")
    for batch in batches:
        graph = planned_graph(build, loss, batch)
        for core_flops in (1e9, 1.5e9, 2e9, 3e9, 5e9, 7e9, 10e9):
            for rate, text in ((94e6, "100 Mbit/s"), (940e6, "1 Gbit/s")):
                cluster = of_devices(nodes, core_flops=core_flops, rate=rate)
                one = single(graph, cluster)
                steps = [planned(graph, cluster.with_wire(wire))[1].step_seconds for wire in ("fp32", "fp16")]
                found = [cell for step in steps for cell in (f"{step:.2f} s", f"{one / step:.2f}")]
                table.add_row(f"{core_flops / 1e9:.1f}", text, str(batch), f"{one:.2f} s", *found)
                console.print(f"{core_flops / 1e9:.1f} GFLOP/s, {text}, batch {batch}:", *found, style="dim")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted speedups of plans.")
    parser.add_argument("--models", nargs="+", default=["yolov2-16", "yolov2-25", "vgg16", "unet"], choices=MODELS)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--less", type=float, nargs="*", default=[], help="caps: a device's part of what one keeps")
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--curve", action="store_true")
    options = parser.parse_args()
    console = Console(width=150)
    if options.mixed:
        mixed(options.batch[0] if len(options.batch) == 1 else 4, console)
    elif options.memory:
        memory(options.models, options.batch, options.nodes, options.less, console)
    elif options.curve:
        curve(options.models[0], options.batch, options.nodes[-1], console)
    else:
        speedups(options.models, options.batch, options.nodes, console)


if __name__ == "__main__":
    main()
