"""Choose a split for every layer: the plan.

    single        everything on the first device
    batch         samples over all devices (data parallel)
    grid:RxC      rows over R and columns over C; behind the last layer whose map is large enough, channels
    channel       output channels over all devices
    auto          the best that fusetile.planner finds
    random:SEED   any split of any op, forward or backward: for tests
    FILE          the plan of an earlier compilation, from its plan.json

What the rules are stands in rules.py; how a split places ops, in place.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fusetile.box import Box, empty
from fusetile.cluster import Cluster
from fusetile.errors import UserError
from fusetile.graph import UPDATE, Graph
from fusetile.ops import Domain, domain_of
from fusetile.passes.group import Halo
from fusetile.passes.place import place, place_updates
from fusetile.passes.rules import rule_splits
from fusetile.passes.tile import Split, tile
from fusetile.plan import Placement, Plan
from fusetile.planner.choose import best_plan


def assign(
    graph: Graph,
    *,
    plan: str,
    cluster: Cluster,
    block: int,
    halo: Halo = "auto",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """A placement for every op; `halo` is what `group` will be told. Raises UserError if `plan` is not one or does not
    fit the cluster."""
    if plan.endswith(".json"):
        return _read_plan(graph, Path(plan), len(cluster.nodes))
    if plan.startswith("random:") and plan[7:].isdecimal():
        return _random_plan(graph, int(plan[7:]), cluster, block)
    if plan == "auto" and len(cluster.nodes) > 1:
        return best_plan(graph, cluster=cluster, block=block, halo=halo, on_progress=on_progress)
    rule = "single" if plan == "auto" else plan  # one device leaves no choice
    return place(graph, rule_splits(graph, rule, cluster), speeds=cluster.speeds, block=block)


def _read_plan(graph: Graph, path: Path, nodes: int) -> Plan:
    try:
        ops = json.loads(path.read_text())["ops"]
        placements = {op["name"]: Placement(_boxes(op["compute"], nodes), _boxes(op["own"], nodes)) for op in ops}
    except OSError as error:
        raise UserError(f"--plan {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--plan {path}: not a plan.json of fusetile for {nodes} node(s) ({error})") from None
    for op in graph.ops.values():
        axes = len(domain_of(graph, op).axes)
        if op.name not in placements or any(len(box) not in (0, axes) for box in placements[op.name].own):
            raise UserError(
                f"--plan {path}: it was made for another model or other options: no place for op {op.name!r}"
            )
    return Plan(nodes, placements, settled=True)


def _boxes(items: list[list[list[int]] | None], nodes: int) -> tuple[Box, ...]:
    rank = max((len(item) for item in items if item), default=0)  # nothing anywhere: what is not computed again
    if len(items) != nodes:
        raise ValueError(f"it is for {len(items)} nodes")
    return tuple(tuple((int(a), int(b)) for a, b in item) if item else empty(rank) for item in items)


# -- random ----------------------------------------------------------------------------------------------------------


def _random_plan(graph: Graph, seed: int, cluster: Cluster, block: int) -> Plan:
    rng = np.random.default_rng(seed)
    placements: dict[str, Placement] = {}
    for op in graph.ops.values():
        if op.phase != UPDATE:
            domain = domain_of(graph, op)
            split = _random_split(domain, rng, len(cluster.nodes))
            placements[op.name] = tile(domain, split=split, speeds=cluster.speeds, block=block)
    updates = place_updates(graph, placements, speeds=cluster.speeds, block=block)
    return Plan(len(cluster.nodes), placements | updates)


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
