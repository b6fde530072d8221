"""Play plans: through the passes that follow, and through the simulation. What was played once is remembered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusetile.cluster import Cluster
from fusetile.graph import Graph
from fusetile.passes.communicate import Communication, communicate
from fusetile.passes.group import Halo, group
from fusetile.passes.place import place
from fusetile.passes.schedule import Schedule, schedule
from fusetile.passes.tile import Split
from fusetile.plan import Plan
from fusetile.planner.memory import economized, needed_bytes
from fusetile.planner.simulate import simulate

PLAYED_op_devices = 40_000
"""So many ops on so many devices are played in about ten seconds: what a search may take twice."""

CONSIDERED = 6
"""Plans that are asked for what memory they could do with: the fastest, and those that need least."""

Splits = Mapping[str, Split]
"""By the names of the layers' forward ops."""


@dataclass(frozen=True, slots=True)
class Played:
    """A plan whose step takes `seconds`, by the simulation; `name`: the rule that it comes from; `behind` as in
    `group`."""

    name: str
    splits: Splits
    plan: Plan
    seconds: float
    behind: bool


class Player:
    """Plays plans of a graph on a cluster."""

    def __init__(self, graph: Graph, *, cluster: Cluster, block: int, halo: Halo) -> None:
        self.graph, self.cluster, self.block, self.halo = graph, cluster, block, halo
        self.played: list[Played] = []
        self._known: dict[object, Played] = {}
        self._lacking: dict[int, tuple[int, ...]] = {}
        self._saved: dict[int, tuple[float, tuple[int, ...]]] = {}

    def play(self, name: str, splits: Splits, *, keep: bool = True, behind: bool = False) -> Played:
        """Without `keep`, maps are computed and sent again rather than kept; `behind` as in `group`."""
        key = (tuple(sorted(splits.items())), keep, behind)
        if key not in self._known:
            graph, cluster = self.graph, self.cluster
            plan = place(graph, splits, speeds=cluster.speeds, block=self.block)
            plan = group(graph, plan, cluster=cluster, halo=self.halo, keep_maps=keep, behind=behind)
            communication = communicate(graph, plan, block=self.block)
            order = schedule(graph, plan, communication, cluster=cluster)
            seconds = simulate(communication, order, cluster).seconds
            self._known[key] = Played(name, splits, plan, seconds, behind)
            self.played.append(self._known[key])
        return self._known[key]

    def affordable(self, most: int) -> int:
        """How many plans to play, by the size of the graph and the cluster: at least three, at most `most`."""
        return min(most, max(3, PLAYED_op_devices // (len(self.graph.ops) * len(self.cluster.nodes))))

    def lacking_bytes(self, played: Played) -> tuple[int, ...]:
        """By how much a plan exceeds each device's memory; 0 where it fits."""
        if id(played) not in self._lacking:
            nodes = self.cluster.nodes
            needed = needed_bytes(self.graph, played.plan, *self._ordered(played), block=self.block)
            self._lacking[id(played)] = tuple(
                max(0, need - node.device.memory_bytes) for need, node in zip(needed, nodes, strict=True)
            )
        return self._lacking[id(played)]

    def seconds_within(self, played: Played) -> float:
        """The step with what must be computed again so that the plan fits into the devices' memory; infinite where
        nothing makes it fit."""
        if not any(self.lacking_bytes(played)):
            return played.seconds
        more, lacking = self._economized(played)
        return float("inf") if any(lacking) else played.seconds + more

    def best(self) -> Played:
        """The fastest within the devices' memory; if none fits, the one in which no device lacks more than it has to.
        Of the plans that were played the fastest are considered, and those that need least memory."""
        fastest = sorted(self.played, key=lambda result: result.seconds)
        if not any(self.lacking_bytes(fastest[0])):
            return fastest[0]
        smallest = sorted(self.played, key=lambda result: (max(self.lacking_bytes(result)), result.seconds))
        considered = [*fastest[:CONSIDERED], *smallest[:CONSIDERED]]
        best = min(considered, key=self.seconds_within)
        if self.seconds_within(best) < float("inf"):
            return best
        return min(considered, key=lambda result: max(self._economized(result)[1]))

    def _ordered(self, played: Played) -> tuple[Communication, Schedule]:
        communication = communicate(self.graph, played.plan, block=self.block)
        return communication, schedule(self.graph, played.plan, communication, cluster=self.cluster)

    def _economized(self, played: Played) -> tuple[float, tuple[int, ...]]:
        if id(played) not in self._saved:
            ordered = self._ordered(played)
            found = economized(self.graph, played.plan, *ordered, cluster=self.cluster, block=self.block)
            self._saved[id(played)] = found
        return self._saved[id(played)]
