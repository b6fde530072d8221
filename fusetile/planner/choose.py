"""`--plan auto`: search the analytic model, play the most promising plans and those of the rules, take the fastest.

The search minimises (1 - l) A + l N for many l: whatever l is, its minimum is a lower bound of max(A, N) over all plans
that are made of the candidates (Lagrangian duality), and the minimisers are plans to consider.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fusetile.cluster import Cluster
from fusetile.graph import Graph
from fusetile.passes.communicate import communicate
from fusetile.passes.group import group
from fusetile.passes.place import place
from fusetile.passes.rules import rule_splits
from fusetile.passes.schedule import schedule
from fusetile.passes.tile import Split
from fusetile.plan import Estimate, Plan
from fusetile.planner.candidates import Candidate, candidates_of
from fusetile.planner.memory import needed_bytes
from fusetile.planner.model import Model, model_of
from fusetile.planner.search import minimise
from fusetile.planner.simulate import step_seconds
from fusetile.planner.units import Unit, units_of

WEIGHTS = tuple(float(weight) for weight in np.linspace(0, 1, 21))
EMPHASES = tuple((waiting, busy) for waiting in (1.0, 1.5, 2.5) for busy in (0.0, 0.15, 0.3, 0.6, 1.0))
PLAYED = 8
"""Plans of the search that are simulated."""


@dataclass(frozen=True, slots=True)
class Played:
    """A plan that was simulated; `lacking_bytes`: by how much it exceeds a device's memory."""

    name: str
    plan: Plan
    seconds: float
    lacking_bytes: int


def best_plan(graph: Graph, *, cluster: Cluster, block: int) -> Plan:
    """The plan with the shortest simulated step among those that fit into the devices' memory (if none does, the one
    that lacks least), with its estimate. `graph` must be in topological order."""
    units = units_of(graph)
    candidates = [candidates_of(graph, unit, speeds=cluster.speeds, block=block) for unit in units]
    model = model_of(graph, units, candidates, cluster=cluster, block=block)
    bound, choices = _search(model, cluster)
    played = [_play(graph, name, splits, cluster, block) for name, splits in _rules(graph, cluster)]
    for choice in choices[:PLAYED]:
        played.append(_play(graph, "auto", _splits(units, candidates, choice), cluster, block))
    best = min(played, key=lambda result: (result.lacking_bytes, result.seconds))
    return replace(best.plan, estimate=_estimate(best, played, bound, model.seconds(choices[0])))


def _search(model: Model, cluster: Cluster) -> tuple[float, list[tuple[int, ...]]]:
    """A lower bound of max(A, N), and distinct choices, the best by the model first."""
    bound, choices = 0.0, []
    for weight in WEIGHTS:
        sums = model.weighed(weight)
        found = minimise(sums.nodes, sums.edges)
        bound = max(bound, found.bound)
        choices.append(found.choice)
    for waiting, busy in EMPHASES:
        sums = model.mixed(waiting, busy)
        choices.append(minimise(sums.nodes, sums.edges).choice)
    return bound, sorted(dict.fromkeys(choices), key=model.seconds)


def _rules(graph: Graph, cluster: Cluster) -> Iterator[tuple[str, dict[str, Split]]]:
    nodes = len(cluster.nodes)
    names = ["single"]
    if nodes > 1:
        grids = [f"grid:{rows}x{nodes // rows}" for rows in range(1, nodes + 1) if nodes % rows == 0]
        names += ["batch", "channel", "mixed", *grids]
    for name in names:
        yield name, rule_splits(graph, name, cluster)


def _splits(
    units: Sequence[Unit], candidates: Sequence[Sequence[Candidate]], choice: Sequence[int]
) -> dict[str, Split]:
    splits: dict[str, Split] = {}
    for unit, found, index in zip(units, candidates, choice, strict=True):
        splits[unit.head.name] = found[index].head
        splits |= {op.name: found[index].followers for op in unit.followers}
    return splits


def _play(graph: Graph, name: str, splits: dict[str, Split], cluster: Cluster, block: int) -> Played:
    """Through the passes that follow, and through the simulation."""
    plan = place(graph, splits, speeds=cluster.speeds, block=block)
    grown = group(graph, plan, cluster=cluster)
    communication = communicate(graph, grown, block=block)
    order = schedule(graph, grown, communication)
    lacking = [
        needed - node.device.memory_bytes
        for needed, node in zip(
            needed_bytes(graph, grown, communication, order, block=block), cluster.nodes, strict=True
        )
    ]
    seconds = float(step_seconds(graph, grown, communication, order, cluster))
    return Played(name, plan, seconds, max(0, *lacking))


def _estimate(best: Played, played: Sequence[Played], bound: float, objective: float) -> Estimate:
    others: dict[str, float] = {}
    for result in played:
        family = result.name.split(":")[0]
        others[family] = min(result.seconds, others.get(family, result.seconds))
    return Estimate(best.name, best.seconds, objective, bound, others)
