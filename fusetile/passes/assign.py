"""Choose a split for every layer: the plan.

    single        everything on the first device
    batch         samples over all devices (data parallel)
    grid:RxC      rows over R and columns over C; behind the last layer whose map is large enough, channels
    channel       output channels over all devices
    auto          samples if there are enough of them, else tiles, until weights outweigh feature maps; then channels
    random:SEED   any split of any op, forward or backward: for tests
    FILE          the plan of an earlier compilation, from its plan.json

Updates follow the parameters: every device updates a shard of what it holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np

from fusetile.box import Box, empty, hull, intersect, volume, whole
from fusetile.cluster import Cluster
from fusetile.errors import UserError
from fusetile.graph import FORWARD, UPDATE, Graph, Op
from fusetile.ops import Domain, domain_of, row
from fusetile.passes.tile import Split, shard, tile
from fusetile.plan import Placement, Plan

PLANS = "auto, single, batch, grid:RxC, channel, random:SEED or the path of a plan.json"


def assign(graph: Graph, *, plan: str, cluster: Cluster, block: int) -> Plan:
    """A placement for every op. Raises UserError if `plan` is not one or does not fit the cluster."""
    nodes = len(cluster.nodes)
    if plan.endswith(".json"):
        return _read_plan(graph, Path(plan), nodes)
    placements: dict[str, Placement] = {}
    rng = _random(plan)
    if rng is None:
        splits = _splits(graph, plan, cluster)
    for op in graph.ops.values():
        if op.phase == UPDATE:
            continue
        domain = domain_of(graph, op)
        split = splits[op.layer] if rng is None else _random_split(domain, rng, nodes)
        placements[op.name] = tile(domain, split=split, speeds=cluster.speeds, block=block)
    updates = [op for op in graph.ops.values() if op.phase == UPDATE]
    for turns, op in enumerate(updates):
        placements[op.name] = _place_update(graph, op, placements, cluster.speeds, block, turns)
    return Plan(nodes, placements)


# -- splits by rule --------------------------------------------------------------------------------------------------


def _splits(graph: Graph, plan: str, cluster: Cluster) -> dict[str, Split]:
    nodes = len(cluster.nodes)
    everyone = tuple(range(nodes))
    single = Split((), (0,))
    channel = Split((("k", nodes),), everyone)
    batch = Split((("n", nodes),), everyone)
    layers = [op for op in graph.ops.values() if op.phase == FORWARD]
    grid = re.fullmatch(r"grid:(\d+)x(\d+)", plan)
    if plan == "single" or nodes == 1:
        return {op.name: single for op in layers}
    if plan in ("batch", "channel"):
        return {op.name: batch if plan == "batch" else channel for op in layers}
    if grid:
        rows, columns = int(grid[1]), int(grid[2])
        if rows * columns == 0 or rows * columns > nodes:
            raise UserError(f"--plan {plan}: {rows} x {columns} tiles need as many nodes; the cluster has {nodes}")
        tiles = Split((("h", rows), ("w", columns)), everyone[: rows * columns])
        return _front_and_tail(graph, layers, tiles, channel, until=lambda op: _too_small(graph, op, rows, columns))
    if plan == "auto":
        front = batch if graph.tensors[graph.inputs[0]].shape[0] >= nodes else _square_grid(nodes)
        return _front_and_tail(graph, layers, front, channel, until=lambda op: _weight_heavy(graph, op))
    raise UserError(f"--plan {plan!r}: choose {PLANS}")


def _square_grid(nodes: int) -> Split:
    rows = max(r for r in range(1, nodes + 1) if nodes % r == 0 and r * r <= nodes)
    return Split((("h", nodes // rows), ("w", rows)), tuple(range(nodes)))


def _front_and_tail(
    graph: Graph, layers: Sequence[Op], front: Split, tail: Split, *, until: object
) -> dict[str, Split]:
    """`front` for every layer up to the first for which `until` holds, and `tail` for it and all that depends on it."""
    assert callable(until)
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


def _read_plan(graph: Graph, path: Path, nodes: int) -> Plan:
    try:
        ops = json.loads(path.read_text())["ops"]
        placements = {op["name"]: Placement(*(_boxes(op[key], nodes) for key in ("compute", "own"))) for op in ops}
    except OSError as error:
        raise UserError(f"--plan {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--plan {path}: not a plan.json of fusetile for {nodes} node(s) ({error})") from None
    for op in graph.ops.values():
        axes = len(domain_of(graph, op).axes)
        if op.name not in placements or any(len(box) != axes for box in placements[op.name].own):
            raise UserError(
                f"--plan {path}: it was made for another model or other options: no place for op {op.name!r}"
            )
    return Plan(nodes, placements, settled=True)


def _boxes(items: list[list[list[int]] | None], nodes: int) -> tuple[Box, ...]:
    rank = max(len(item) for item in items if item)
    if len(items) != nodes:
        raise ValueError(f"it is for {len(items)} nodes")
    return tuple(tuple((int(a), int(b)) for a, b in item) if item else empty(rank) for item in items)


# -- updates ---------------------------------------------------------------------------------------------------------


def _place_update(
    graph: Graph, op: Op, placements: dict[str, Placement], speeds: Sequence[float], block: int, turns: int
) -> Placement:
    """Shards of a parameter: each distinct box of it that devices need is cut among the devices that need it."""
    domain = domain_of(graph, op)
    everything = whole(graph.tensors[op.outputs[0]].shape)
    needs = _needs(graph, op, placements, len(speeds))
    held = {box for box in needs if volume(box)}
    apart = all(a == b or volume(intersect(a, b)) == 0 for a in held for b in held)
    if not apart or sum(map(volume, held)) != volume(everything):
        needs, held = [everything] * len(speeds), {everything}
    own = [empty(len(domain.axes))] * len(speeds)
    for box in sorted(held):
        holders = [device for device, need in enumerate(needs) if need == box]
        turn = turns % len(holders)  # small parameters are owned by one device each: not always by the same
        for device, piece in shard(box, holders=holders[turn:] + holders[:turn], speeds=speeds, block=block).items():
            own[device] = piece[: len(domain.axes)]
    return Placement(tuple(own), tuple(own))


def _needs(graph: Graph, op: Op, placements: dict[str, Placement], nodes: int) -> list[Box]:
    """Per device, the box of the updated parameter that its forward and backward ops read."""
    _, position = row(op.kind).in_place[0]
    parameter = op.inputs[position]
    boxes: list[list[Box]] = [[empty(len(graph.tensors[parameter].shape))] for _ in range(nodes)]
    readers = [reader for reader in graph.consumers()[parameter] if reader.phase != UPDATE]
    for reader in readers:
        domain = domain_of(graph, reader)
        for device, box in enumerate(placements[reader.name].compute):
            if volume(box):
                boxes[device] += [domain.need(box, i) for i, name in enumerate(reader.inputs) if name == parameter]
    return [hull(found) for found in boxes]


# -- random ----------------------------------------------------------------------------------------------------------


def _random(plan: str) -> np.random.Generator | None:
    match = re.fullmatch(r"random:(\d+)", plan)
    return np.random.default_rng(int(match[1])) if match else None


def _random_split(domain: Domain, rng: np.random.Generator, nodes: int) -> Split:
    """Up to two axes, any number of parts, any devices in any order; reductions are cut as well."""
    names = [axis.name for axis in domain.axes]
    rng.shuffle(names)
    parts, used = [], 1
    for name in names[: rng.integers(1, 3)]:
        count = int(rng.integers(1, nodes // used + 1))
        parts.append((name, count))
        used *= count
    devices = rng.permutation(nodes)[:used]
    return Split(tuple(parts), tuple(int(device) for device in devices))
