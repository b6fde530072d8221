"""When a peer counts as lost: it says nothing, or it says that it lives and yet gets nothing done."""

from __future__ import annotations

import time
from collections.abc import Collection
from enum import IntEnum

from fusetile.program import Program
from fusetile.runtime.faults import node
from fusetile.runtime.link import Link
from fusetile.runtime.rendezvous import LOWEST

_HEARTBEAT_seconds = 1.0


class Activity(IntEnum):
    """What a node's heartbeat says that it does."""

    COMPUTING = 0
    WAITING = 1  # for others: they are to blame, not this node
    FINISHING = 2  # writing the result, or deciding what to do next, which takes as long as it takes


class Watch:
    """The clock of the I/O thread. `deadline`: seconds of silence that mean a lost peer. A peer that computes may also
    take ten times the longest predicted segment without progress."""

    def __init__(self, program: Program, deadline: float) -> None:
        self.deadline = deadline
        self.limit = max(deadline, 10 * program.segment_seconds)
        self.interval = min(_HEARTBEAT_seconds, deadline / 4)
        self._program = program
        self._last_turn = self._next_beat = self._moved_at = time.monotonic()
        self._progress = -1

    def tick(self, links: Collection[Link]) -> bool:
        """Call on every turn of the thread; True when the heartbeat is due."""
        now = time.monotonic()
        asleep = now - self._last_turn - 2 * self.interval
        if asleep > 0:  # this node itself was frozen: the others' silence of that time says nothing
            self._moved_at += asleep
            for link in links:
                link.heard_at += asleep
                link.moved_at += asleep
        self._last_turn = now
        if now < self._next_beat:
            return False
        self._next_beat = now + self.interval
        return True

    def hear(self, link: Link, progress: int, activity: int) -> None:
        """A heartbeat has come."""
        if (progress, activity) != (link.progress, link.activity):
            link.progress, link.activity, link.moved_at = progress, activity, time.monotonic()

    def complaint(self, links: Collection[Link], progress: int, activity: Activity) -> tuple[Link | None, str] | None:
        """The peer that is lost and how, or None; no peer and the reason if all wait for each other. `progress` and
        `activity` are this node's own."""
        now = time.monotonic()
        if (progress, activity) != (self._progress, Activity.WAITING):
            self._progress, self._moved_at = progress, now
        for link in links:
            who = node(self._program, link.rank, link.name)
            if now - link.heard_at > self.deadline:
                return link, f"{who} sent nothing for {now - link.heard_at:.1f} s (frozen, or not reachable?)"
            if link.activity == Activity.COMPUTING and now - link.moved_at > self.limit:
                return link, f"{who} made no progress for {now - link.moved_at:.1f} s"
        moved_at = max([self._moved_at, *(link.moved_at for link in links)])
        waiting = activity == Activity.WAITING and all(link.activity == Activity.WAITING for link in links)
        if self._program.rank == LOWEST and waiting and now - moved_at > 2 * self.limit:
            return None, f"all nodes wait for each other since {now - moved_at:.1f} s: a fault of the plan"
        return None
