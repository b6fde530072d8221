"""What the planner chooses from: a candidate per unit, priced by the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusetile.cluster import Cluster
from fusetile.graph import Graph
from fusetile.passes.tile import Split
from fusetile.planner.candidates import Candidate, candidates_of
from fusetile.planner.model import Model, model_of
from fusetile.planner.play import Splits
from fusetile.planner.units import Unit, units_of

Choice = tuple[int, ...]
"""The index of a candidate per unit."""


@dataclass(frozen=True, slots=True)
class Space:
    """Units in topological order, and the candidates of each."""

    units: Sequence[Unit]
    candidates: Sequence[Sequence[Candidate]]
    model: Model

    def splits(self, choice: Choice) -> Splits:
        """The splits that a choice gives all layers."""
        splits: dict[str, Split] = {}
        for unit, found, index in zip(self.units, self.candidates, choice, strict=True):
            splits[unit.head.name] = found[index].head
            splits |= {op.name: found[index].followers for op in unit.followers}
        return splits

    def choice(self, splits: Splits) -> Choice | None:
        """The choice that gives these splits, if there is one."""
        choice = []
        for unit, found in zip(self.units, self.candidates, strict=True):
            followers = {splits[op.name] for op in unit.followers} or {splits[unit.head.name]}
            wanted = Candidate(splits[unit.head.name], followers.pop())
            if followers or wanted not in found:
                return None
            choice.append(found.index(wanted))
        return tuple(choice)


def space_of(graph: Graph, *, cluster: Cluster, block: int) -> Space:
    """Of a graph in topological order."""
    units = units_of(graph)
    candidates = [candidates_of(graph, unit, speeds=cluster.speeds, block=block) for unit in units]
    return Space(units, candidates, model_of(graph, units, candidates, cluster=cluster, block=block))
