"""The critical path of a step: what its end waited for, and what that waited for, back to the start."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from fusetile.passes.schedule import Await, Post, Schedule, Ship
from fusetile.planner.clock import TICK_seconds, Timeline


@dataclass(frozen=True, slots=True)
class Stretch:
    """Of the path, in seconds since the start of the step: what `device` does in its action `action`, or, if that is
    None, message `tag` on its way to it, from when it could be sent (it may have queued for the link)."""

    device: int
    start: float
    stop: float
    action: int | None = None
    tag: int | None = None


def critical_path(order: Schedule, timeline: Timeline) -> list[Stretch]:
    """From the start to the end, without gaps."""
    walk = _Walk(order, timeline)
    ends = [(device, len(actions)) for device, actions in enumerate(order.actions)]
    at = max(ends, key=lambda end: walk.reached(*end))
    path: list[Stretch] = []
    while (stretch := walk.before(*at)) is not None:
        path.append(stretch)
        if stretch.tag is None:
            assert stretch.action is not None
            at = stretch.device, stretch.action
        else:
            at = walk.let_go(stretch.tag)
    return path[::-1]


class _Walk:
    """Answers what a device's action, told by its number, had to wait for."""

    def __init__(self, order: Schedule, timeline: Timeline) -> None:
        self._order, self._timeline = order, timeline
        self._indices = [[index for *_, index in works] for works in timeline.works]
        self._ends: dict[int, list[tuple[int, int]]] = {}  # by tag: where it is shipped and where it is posted
        for device, actions in enumerate(order.actions):
            for i, action in enumerate(actions):
                if isinstance(action, Ship | Post):
                    self._ends.setdefault(action.tag, []).append((device, i))

    def before(self, device: int, action: int) -> Stretch | None:
        """What ended last of all that comes before an action: the device's own work, or a message."""
        works = self._timeline.works[device]
        done = bisect_left(self._indices[device], action)
        start, stop, index = works[done - 1] if done else (0.0, 0.0, -1)
        awaited = [
            tag
            for each in self._order.actions[device][index + 1 : action]
            if isinstance(each, Await)
            for tag in each.tags
        ]
        arrived, tag = max(((self._timeline.messages[tag][1], tag) for tag in awaited), default=(0.0, -1))
        if arrived > stop + TICK_seconds:
            target = self._order.transfers[tag].target
            return Stretch(target, self.reached(*self.let_go(tag)), arrived, tag=tag)
        return Stretch(device, start, stop, action=index) if done else None

    def reached(self, device: int, action: int) -> float:
        """When a device came to an action."""
        stretch = self.before(device, action)
        return stretch.stop if stretch is not None else 0.0

    def let_go(self, tag: int) -> tuple[int, int]:
        """The later of the actions that ship and post a message."""
        return max(self._ends[tag], key=lambda end: self.reached(*end))
