"""Candidate cuts of a unit: products of cuts along n, k, h and w over 1, 2, 3, 4, 6, 8, 12, 16 ... or all devices, a
cut of the input channels whose partial sums are scattered behind it, and the same work on every device.

Subsets are the fastest devices, and products are in order of speed, so that rows of a grid hold devices alike. Parts
are in proportion to the devices' speeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from fusetile.graph import Graph
from fusetile.ops import Domain, domain_of
from fusetile.passes.tile import CHANNEL_AXES, Split
from fusetile.planner.units import Unit

EVERYWHERE = "everywhere"
"""An axis that no op has: all devices of the split do the same."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """The split of a unit's head and that of its followers."""

    head: Split
    followers: Split


def candidates_of(graph: Graph, unit: Unit, *, speeds: Sequence[float], block: int) -> tuple[Candidate, ...]:
    """At least one: everything on the fastest device."""
    nodes = len(speeds)
    ranked = sorted(range(nodes), key=lambda device: -speeds[device])
    domain = domain_of(graph, unit.head)
    found = []
    for count in _counts(nodes):
        devices = tuple(ranked[:count])
        for parts in _products(count, "nkhw"):
            if all(_fits(domain, axis, number, block) for axis, number in parts):
                split = Split(parts, devices)
                found.append(Candidate(split, split))
        if count > 1 and _fits(domain, "c", count, block):
            behind = [axis for axis in "kh" if _fits(domain, axis, count, block)]
            found += [Candidate(Split((("c", count),), devices), Split(((axis, count),), devices)) for axis in behind]
    if nodes > 1:
        same = Split(((EVERYWHERE, nodes),), tuple(ranked))
        found.append(Candidate(same, same))
    return tuple(dict.fromkeys(found))


def _counts(nodes: int) -> list[int]:
    """Numbers of devices to consider."""
    return sorted({1, nodes, *(count for count in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if count < nodes)})


def _products(count: int, axes: str) -> Iterator[tuple[tuple[str, int], ...]]:
    """All ways to write `count` as a product over axes; factors of 1 are left out."""
    if count == 1:
        yield ()
        return
    if not axes:
        return
    for first in range(1, count + 1):
        if count % first == 0:
            for rest in _products(count // first, axes[1:]):
                if prod(number for _, number in rest) * first == count:
                    yield (((axes[0], first),) if first > 1 else ()) + rest


def _fits(domain: Domain, axis: str, parts: int, block: int) -> bool:
    """Whether every part gets something."""
    if not domain.has(axis):
        return False
    size = domain.axes[domain.axis(axis)].size
    return parts <= (-(-size // block) if axis in CHANNEL_AXES else size)
