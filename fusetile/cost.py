"""What an op costs: operations, bytes, and the seconds that a device is predicted to take for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusetile.box import Box, volume
from fusetile.cluster import Cluster, Node
from fusetile.device import Device
from fusetile.graph import Graph, Op
from fusetile.ops import domain_of, row
from fusetile.plan import Plan

FEW_channels = 8


@dataclass(frozen=True, slots=True)
class Cost:
    """Floating-point operations, and bytes read and written; `kind` is the op's, see `kind_of`."""

    kind: str
    flops: float
    traffic_bytes: float


def cost_of(graph: Graph, op: Op, box: Box) -> Cost:
    """The cost of a box of an op's iterations."""
    domain = domain_of(graph, op)
    inputs = [graph.tensors[name] for name in op.inputs]
    moved = sum(
        np.dtype(graph.tensors[name].dtype).itemsize * volume(touched)
        for name, touched in [
            *((name, domain.need(box, i)) for i, name in enumerate(op.inputs)),
            *((name, domain.output(box, i)) for i, name in enumerate(op.outputs)),
        ]
        if volume(box)
    )
    return Cost(kind_of(graph, op), volume(box) * row(op.kind).flops(op.attrs, inputs), moved)


def kind_of(graph: Graph, op: Op) -> str:
    """Ops of one kind run on like kernels, and take like times for like work: the kernel's family, of convolutions also
    what its speed depends on: `conv_weight_grad 3x3`."""
    family = row(op.kind).kernel
    if not is_convolution(family):
        return family
    weights = graph.tensors[op.outputs[0] if family == "conv_weight_grad" else op.inputs[1]].shape
    if op.attrs.get("groups", 1) > 1:
        sort = "grouped"
    elif min(weights[:2]) < FEW_channels:
        sort = "few"
    elif weights[2:] == (1, 1):
        sort = "1x1"
    elif weights[2:] == (3, 3) and set(op.attrs.get("strides", (1, 1))) == {1}:
        sort = "3x3"
    else:
        sort = "other"
    return f"{family} {sort}"


def is_convolution(kind: str) -> bool:
    """Whether ops of a kind are convolutions, dense layers or their gradients: what most of a step goes into."""
    return kind.startswith("conv")


def seconds_on(cost: Cost, node: Node) -> float:
    """What a device is predicted to take."""
    return float(node.speed(cost.kind).seconds(cost.flops, cost.traffic_bytes))


def op_seconds(graph: Graph, plan: Plan, cluster: Cluster) -> dict[str, tuple[float, ...]]:
    """What every device takes for its part of every op."""
    found = {}
    for op in graph.ops.values():
        known: dict[tuple[Box, Device], float] = {}
        for box, node in zip(plan.placements[op.name].compute, cluster.nodes, strict=True):
            if (box, node.device) not in known:
                known[box, node.device] = seconds_on(cost_of(graph, op, box), node)
        found[op.name] = tuple(
            known[box, node.device] for box, node in zip(plan.placements[op.name].compute, cluster.nodes, strict=True)
        )
    return found
