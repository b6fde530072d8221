"""Units: what the planner chooses for. A unit is a layer and the pointwise layers behind it, which follow its cut.

Conv | ChannelMoments, BatchStatistics, Normalize        one unit: head Conv, three followers
Add | Relu                                               one unit
"""

from __future__ import annotations

from dataclasses import dataclass

from fusetile.graph import FORWARD, UPDATE, Graph, Op
from fusetile.ops import row

FOLLOWERS = frozenset(
    (
        "elementwise",
        "dropout",
        "normalize",
        "channel_moments",
        "batch_statistics",
        "frozen_statistics",
        "mean_squared_error",
    )
)
"""Kernel families that work pixel by pixel, or channel by channel."""


@dataclass(frozen=True, slots=True)
class Unit:
    """`head`: a forward op; `followers`: forward ops; `ops`: all forward and backward ops of these layers."""

    head: Op
    followers: tuple[Op, ...]
    ops: tuple[Op, ...]

    @property
    def layers(self) -> tuple[Op, ...]:
        """The forward ops."""
        return (self.head, *self.followers)


def units_of(graph: Graph) -> tuple[Unit, ...]:
    """Every layer is in one unit; units are in topological order of their heads."""
    producers = graph.producers()
    head: dict[str, str] = {}  # layer -> head of its unit
    for op in graph.topological():
        if op.phase != FORWARD:
            continue
        above = {head[producers[name].name] for name in op.inputs if name in producers}
        head[op.name] = above.pop() if row(op.kind).kernel in FOLLOWERS and len(above) == 1 else op.name
    layers: dict[str, list[Op]] = {}
    ops: dict[str, list[Op]] = {}
    for name, first in head.items():
        layers.setdefault(first, []).append(graph.ops[name])
    for op in graph.ops.values():
        if op.phase != UPDATE:
            ops.setdefault(head[op.layer], []).append(op)
    return tuple(Unit(members[0], tuple(members[1:]), tuple(ops[first])) for first, members in layers.items())
