"""Splits by simple rules: what plans were before they were searched for, and what the search is held against.

single        everything on the first device
batch         samples over all devices (data parallel)
grid:RxC      rows over R and columns over C; behind the last layer whose map is large enough, channels
channel       output channels over all devices
mixed         samples if there are enough of them, else tiles, until weights outweigh feature maps; then channels
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import prod

from fusetile.cluster import Cluster
from fusetile.errors import UserError
from fusetile.graph import FORWARD, Graph, Op
from fusetile.passes.tile import Split

PLANS = "auto, single, batch, grid:RxC, channel, random:SEED or the path of a plan.json"


def rule_splits(graph: Graph, plan: str, cluster: Cluster) -> dict[str, Split]:
    """A split for every forward op. Raises UserError if `plan` names no rule or does not fit the cluster."""
    nodes = len(cluster.nodes)
    everyone = tuple(range(nodes))
    single = Split((), (0,))
    channel = Split((("k", nodes),), everyone)
    batch = Split((("n", nodes),), everyone)
    layers = [op for op in graph.ops.values() if op.phase == FORWARD]
    grid = re.fullmatch(r"grid:(\d+)x(\d+)", plan)
    if plan == "single":
        return {op.name: single for op in layers}
    if plan in ("batch", "channel"):
        return {op.name: batch if plan == "batch" else channel for op in layers}
    if grid:
        rows, columns = int(grid[1]), int(grid[2])
        if rows * columns == 0 or rows * columns > nodes:
            raise UserError(f"--plan {plan}: {rows} x {columns} tiles need as many nodes; the cluster has {nodes}")
        tiles = Split((("h", rows), ("w", columns)), everyone[: rows * columns])
        return _front_and_tail(graph, layers, tiles, channel, until=lambda op: _too_small(graph, op, rows, columns))
    if plan == "mixed":
        front = batch if graph.tensors[graph.inputs[0]].shape[0] >= nodes else _square_grid(nodes)
        return _front_and_tail(graph, layers, front, channel, until=lambda op: _weight_heavy(graph, op))
    raise UserError(f"--plan {plan!r}: choose {PLANS}")


def _square_grid(nodes: int) -> Split:
    rows = max(r for r in range(1, nodes + 1) if nodes % r == 0 and r * r <= nodes)
    return Split((("h", nodes // rows), ("w", rows)), tuple(range(nodes)))


def _front_and_tail(
    graph: Graph, layers: Sequence[Op], front: Split, tail: Split, *, until: Callable[[Op], bool]
) -> dict[str, Split]:
    """`front` for every layer up to the first for which `until` holds, and `tail` for it and all that depends on it."""
    producers = graph.producers()
    behind: set[str] = set()
    for op in layers:
        above = {producers[name].name for name in op.inputs if name in producers}
        if above & behind or until(op):
            behind.add(op.name)
    return {op.name: tail if op.name in behind else front for op in layers}


def _too_small(graph: Graph, op: Op, rows: int, columns: int) -> bool:
    shape = graph.tensors[op.inputs[0]].shape
    return (len(shape) == 4 and (shape[2] < rows or shape[3] < columns)) or op.kind in ("Reshape", "Gemm")


def _weight_heavy(graph: Graph, op: Op) -> bool:
    """Whether a layer has more weights than its output has elements per sample."""
    weights = sum(prod(graph.tensors[name].shape) for name in op.inputs if graph.tensors[name].kind == "filter")
    return op.kind in ("Conv", "Gemm") and weights > prod(graph.tensors[op.outputs[0]].shape)
