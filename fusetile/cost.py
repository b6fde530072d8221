"""What an op costs: operations, bytes, and the seconds that a device is predicted to take for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusetile.box import Box, volume
from fusetile.cluster import Cluster, Device, Node
from fusetile.graph import Graph, Op
from fusetile.ops import domain_of, row
from fusetile.plan import Plan


@dataclass(frozen=True, slots=True)
class Cost:
    """Floating-point operations, and bytes read and written."""

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
    return Cost(volume(box) * row(op.kind).flops(op.attrs, inputs), moved)


def seconds_on(cost: Cost, node: Node) -> float:
    """The larger of computing and moving: a roofline (Williams, Waterman, Patterson, 2009)."""
    return max(cost.flops / node.flops, cost.traffic_bytes / node.device.bandwidth)


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
