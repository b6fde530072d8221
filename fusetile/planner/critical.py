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
    while True:
        device, (stop, index, tag) = at[0], walk.last(*at)
        if tag is not None:
            at = walk.let_go(tag)
            path.append(Stretch(order.transfers[tag].target, walk.reached(*at), stop, tag=tag))
        elif index is not None:
            at = device, index
            path.append(Stretch(device, walk.started(device, index), stop, action=index))
        else:
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

    def last(self, device: int, action: int) -> tuple[float, int | None, int | None]:
        """When all was done that comes before an action, and what ended then: the device's own work, by the number of
        its action, or a message, by its tag; nothing at the start."""
        done = bisect_left(self._indices[device], action)
        _, stop, index = self._timeline.works[device][done - 1] if done else (0.0, 0.0, -1)
        awaited = [
            tag
            for each in self._order.actions[device][index + 1 : action]
            if isinstance(each, Await)
            for tag in each.tags
        ]
        arrived, tag = max(((self._timeline.messages[tag][1], tag) for tag in awaited), default=(0.0, -1))
        if arrived > stop + TICK_seconds:
            return arrived, None, tag
        return stop, index if done else None, None

    def reached(self, device: int, action: int) -> float:
        """When a device came to an action."""
        return self.last(device, action)[0]

    def started(self, device: int, action: int) -> float:
        """When a device began with a work."""
        return self._timeline.works[device][bisect_left(self._indices[device], action)][0]

    def let_go(self, tag: int) -> tuple[int, int]:
        """The later of the actions that ship and post a message."""
        return max(self._ends[tag], key=lambda end: self.reached(*end))
