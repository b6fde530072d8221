"""`--plan auto`: search the analytic model, play the most promising plans and those of the rules, improve the fastest.

The search minimises (1 - l) A + l N for many l: whatever l is, its minimum is a lower bound of max(A, N) over all plans
that are made of the candidates (Lagrangian duality). The minimisers are plans to consider, and so are those that small
changes lead to from them; branch and bound looks for better ones between them, and raises the bound. If the fastest
plan does not fit into the devices' memory, a device's bytes get a price in the search; and plans are compared with the
time that computing maps again takes until they fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np

from fusetile.cluster import Cluster
from fusetile.graph import Graph
from fusetile.passes.fit import room_bytes
from fusetile.passes.group import Halo
from fusetile.passes.rules import rule_splits
from fusetile.plan import Estimate, Plan
from fusetile.planner.close_in import close_in
from fusetile.planner.descend import descend
from fusetile.planner.improve import improve
from fusetile.planner.model import Model
from fusetile.planner.play import Played, Player, Splits
from fusetile.planner.search import minimise
from fusetile.planner.space import Choice, Space, space_of

WEIGHTS = tuple(float(weight) for weight in np.linspace(0, 1, 21))
EMPHASES = tuple((waiting, busy) for waiting in (1.0, 1.5, 2.5) for busy in (0.0, 0.15, 0.3, 0.6, 1.0))
PLAYED = 13
"""Plans of the search that are simulated."""
BEHIND = 3
"""The fastest of them are also simulated with halos that travel behind the rest of a convolution."""
PRICES = (0.1, 0.3, 1.0, 3.0)
"""What all the memory of a device costs if the fastest plan does not fit, in steps."""


def best_plan(
    graph: Graph,
    *,
    cluster: Cluster,
    block: int,
    halo: Halo = "auto",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """The plan with the shortest simulated step among those that fit into the devices' memory (if none does, the one
    that lacks least), with its estimate. `graph` must be in topological order."""
    space = space_of(graph, cluster=cluster, block=block)
    bound, choices = _search(space.model)
    player = Player(graph, cluster=cluster, block=block, halo=halo)
    plans = [
        *_rules(graph, cluster),
        *(("auto", space.splits(choice)) for choice in choices[: player.affordable(PLAYED)]),
    ]
    for done, (name, splits) in enumerate(plans):
        on_progress(done, len(plans))
        player.play(name, splits)
    for played in sorted(player.played, key=lambda played: played.seconds)[:BEHIND]:
        player.play(played.name, played.splits, behind=True)
    if any(player.lacking_bytes(player.best())):
        _save_memory(player, space)
    best = improve(player, space, player.best())
    return replace(best.plan, estimate=_estimate(best, player.played, bound, space.model.seconds(choices[0])))


def _search(model: Model) -> tuple[float, list[Choice]]:
    """A lower bound of max(A, N), and distinct choices, the best by the model first: what `close_in` finds, then by
    turns one that `descend` ends at and one of those that it starts from."""
    bound, choices = 0.0, []
    for weight in WEIGHTS:
        sums = model.weighed(weight)
        found = minimise(sums.nodes, sums.edges)
        bound = max(bound, found.bound)
        choices.append(found.choice)
    for waiting, busy in EMPHASES:
        sums = model.mixed(waiting, busy)
        choices.append(minimise(sums.nodes, sums.edges).choice)
    starts = sorted(dict.fromkeys(choices), key=model.seconds)
    ends = sorted({descend(model, choice) for choice in starts}, key=model.seconds)
    turns = (choice for pair in zip_longest(ends, starts) for choice in pair if choice is not None)
    closer_bound, closer = close_in(model, ends[0])
    return max(bound, closer_bound), list(dict.fromkeys((*closer, *turns)))


def _rules(graph: Graph, cluster: Cluster) -> Iterator[tuple[str, Splits]]:
    nodes = len(cluster.nodes)
    names = ["single"]
    if nodes > 1:
        grids = [f"grid:{rows}x{nodes // rows}" for rows in range(1, nodes + 1) if nodes % rows == 0]
        names += ["batch", "channel", "mixed", *grids]
    for name in names:
        yield name, rule_splits(graph, name, cluster)


def _save_memory(player: Player, space: Space) -> None:
    """Play plans for which memory has a price, and those that keep nothing which can be computed and sent again."""
    seconds = player.best().seconds
    memory = room_bytes(player.cluster)
    for price in PRICES:
        sums = space.model.mixed(1.0, 0.3, price * seconds / memory)
        splits = space.splits(minimise(sums.nodes, sums.edges).choice)
        for keep in (True, False):
            player.play("auto", splits, keep=keep)
    player.play("auto", player.best().splits, keep=False)


def _estimate(best: Played, played: Sequence[Played], bound: float, objective: float) -> Estimate:
    others: dict[str, float] = {}
    for result in played:
        family = result.name.split(":")[0]
        others[family] = min(result.seconds, others.get(family, result.seconds))
    return Estimate(best.name, best.seconds, objective, bound, others)
