"""Layouts: where every tensor is, and the moves that turn one layout into another.

A layout gives, for every device, a *have* box (what it holds) and an *own* box (`have ⊇ own`; the rest is halo), and
how values combine: with `pick` the own boxes partition the tensor, with `sum` the true value is the sum over the
devices that have the element. Halo exchange, gather, scatter, all-gather, reduce-scatter: all are `redistribute`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from fusetile.box import Box, contains, intersect, subtract, text, volume
from fusetile.errors import PlanError

Combine = Literal["pick", "sum"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Per device: the box that it has and the box that it owns; with `sum`, own equals have."""

    have: tuple[Box, ...]
    own: tuple[Box, ...]
    combine: Combine = "pick"

    def check(self, whole: Box, what: str) -> None:
        """Raise PlanError unless the layout is legal for a tensor of this box."""
        if fault := _fault(self, whole):
            raise PlanError(f"{what}: {fault}")


REMEMBERED = 8192
"""So many layouts and redistributions: plans that a search tries have most of them in common."""


@lru_cache(REMEMBERED)
def _fault(layout: Layout, whole: Box) -> str:
    """Why a layout is not legal for a tensor of this box; nothing if it is."""
    for device, (have, own) in enumerate(zip(layout.have, layout.own, strict=True)):
        if not contains(whole, have) or not contains(have, own):
            return f"device {device} owns {text(own)} of {text(have)} of {text(whole)}"
    if layout.combine == "sum":
        missing = uncovered(whole, layout.have)
        return f"no device contributes to {text(missing[0])}" if missing else ""
    if sum(map(volume, layout.own)) != volume(whole) or uncovered(whole, layout.own):
        return f"the own boxes {', '.join(map(text, layout.own))} do not partition {text(whole)}"
    return ""


@dataclass(frozen=True, slots=True)
class Placement:
    """An op's iteration domain over the devices: `own` boxes partition it; `compute ⊇ own` may overlap between
    devices along parallel axes only (recomputation). Boxes have one interval per axis of the op's domain. With
    `partial` the op is linear and every device does it to its own contributions to inputs whose layout is a sum; so the
    boxes overlap, and its outputs are sums too."""

    compute: tuple[Box, ...]
    own: tuple[Box, ...]
    partial: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the planner expects of a plan: the simulated step; and of the analytic model, the best plan that was found
    and a lower bound for all. `others`: the simulated step of the best plan of every rule."""

    rule: str
    step_seconds: float
    model_seconds: float
    bound_seconds: float
    others: Mapping[str, float]

    @property
    def gap(self) -> float:
        """By what part the best plan of the model may be longer than the shortest possible."""
        return max(0.0, self.model_seconds / self.bound_seconds - 1) if self.bound_seconds else 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement for every op of a graph. `settled`: its halos are chosen, nothing is to be grown any more.
    `estimate`: if it comes from the planner."""

    nodes: int
    placements: Mapping[str, Placement]
    settled: bool = False
    estimate: Estimate | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """`box` of a tensor goes from device `source` to device `target`, which may be the same one."""

    source: int
    target: int
    box: Box


def uncovered(whole: Box, boxes: tuple[Box, ...]) -> list[Box]:
    """The parts of `whole` that no box covers."""
    rest = [whole]
    for box in boxes:
        rest = [piece for part in rest for piece in subtract(part, box)]
    return rest


@lru_cache(REMEMBERED)
def redistribute(source: Layout, need: tuple[Box, ...]) -> tuple[Move, ...]:
    """The moves after which device j holds `need[j]`, ordered by target, then by source rank.

    `pick`: what j has stays (a move from j to j); every other element comes from its owner. `sum`: every device that
    has an element contributes it, and the target adds the contributions in the order of the moves.
    """
    moves = []
    for target, wanted in enumerate(need):
        if volume(wanted) == 0:
            continue
        if source.combine == "sum":
            parts = [(device, intersect(have, wanted)) for device, have in enumerate(source.have)]
        else:
            here = source.have[target]
            parts = [
                (device, piece)
                for device, own in enumerate(source.own)
                for piece in ([intersect(here, wanted)] if device == target else subtract(intersect(own, wanted), here))
            ]
        moves += [Move(device, target, part) for device, part in parts if volume(part)]
    return tuple(moves)
