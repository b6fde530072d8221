"""Play a step of a schedule against the clock: devices compute, links carry, the rest follows.

A device does its actions in order. A transfer is on the way once it is shipped and posted: it keeps its source's
sending and its target's receiving direction busy for its bytes and `MESSAGE_seconds`, in chunks, the most urgent
transfer first; the last chunk arrives a latency later, and both ends may go on. Directions of a link are independent
(full duplex), and the switch between the devices is not a bottleneck.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusetile.box import volume
from fusetile.cluster import Cluster, Link
from fusetile.cost import cost_of, seconds_on
from fusetile.graph import Graph
from fusetile.passes.communicate import Communication
from fusetile.passes.schedule import Await, Compute, Pack, Place, Post, Schedule, Ship
from fusetile.plan import Plan

CHUNK_bytes = 1 << 16  # the runtime's
MESSAGE_seconds = 0.1e-3
"""What a message keeps a link busy for besides its bytes: system calls at both ends, the frame's header."""


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds of a device's own, then messages: those that it ships and posts, and those that it waits for."""

    seconds: float = 0.0
    ships: tuple[int, ...] = ()
    posts: tuple[int, ...] = ()
    awaits: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Message:
    """`size_bytes` from one device to another; the lower `priority`, the sooner it goes."""

    source: int
    target: int
    size_bytes: float
    priority: int = 0


def step_seconds(graph: Graph, plan: Plan, communication: Communication, order: Schedule, cluster: Cluster) -> float:
    """The predicted time of a step, from its start on all devices to the end of the last."""
    messages = [
        Message(
            transfer.source,
            transfer.target,
            sum(
                volume(part.move.box) * np.dtype(dtype).itemsize
                for part, dtype in zip(transfer.parts, transfer.dtypes, strict=True)
            ),
            transfer.priority,
        )
        for transfer in order.transfers
    ]
    return play(_works(graph, plan, communication, order, cluster, messages), messages, cluster.link)


def _works(
    graph: Graph,
    plan: Plan,
    communication: Communication,
    order: Schedule,
    cluster: Cluster,
    messages: Sequence[Message],
) -> list[list[Work]]:
    known: dict[tuple[str, object, str], float] = {}
    works: list[list[Work]] = []
    for device, node in enumerate(cluster.nodes):
        copied = 2 / node.device.bandwidth  # seconds per byte that is read and written
        mine: list[Work] = []
        for action in order.actions[device]:
            match action:
                case Compute(name):
                    box = plan.placements[name].compute[device]
                    key = (name, box, node.device.kind + str(node.device.cores))
                    if key not in known:
                        known[key] = seconds_on(cost_of(graph, graph.ops[name], box), node)
                    mine.append(Work(known[key]))
                case Pack(tag):
                    mine.append(Work(messages[tag].size_bytes * copied))
                case Ship(tag):
                    mine.append(Work(ships=(tag,)))
                case Post(tag):
                    mine.append(Work(posts=(tag,)))
                case Await(tags):
                    mine.append(Work(awaits=tags))
                case Place(index):
                    delivery = communication.deliveries[index]
                    moves = [volume(move.box) for move in delivery.moves if move.target == device]
                    mine.append(Work(4 * sum(moves) * copied))
        works.append(mine)
    return works


def play(works: Sequence[Sequence[Work]], messages: Sequence[Message], link: Link) -> float:
    """The time at which the last device has done its works. Raises RuntimeError if they wait for each other."""
    return _Clock(works, messages, link).run()


class _Clock:
    """The state between two events. Events: a device is free, a chunk has left, a message has arrived."""

    def __init__(self, works: Sequence[Sequence[Work]], messages: Sequence[Message], link: Link) -> None:
        self.works, self.messages, self.link = works, messages, link
        nodes = len(works)
        self.at = [0] * nodes
        self.waiting: list[set[int]] = [set() for _ in range(nodes)]
        self.left = [message.size_bytes for message in messages]
        self.begun: set[int] = set()  # shipped or posted, not yet both
        self.done: set[int] = set()
        self.queues: dict[tuple[int, int], list[tuple[int, int]]] = {}  # by ends: (priority, tag)
        self.sending, self.receiving = [False] * nodes, [False] * nodes
        self.events: list[tuple[float, int, str, int]] = []
        self.count = 0

    def run(self) -> float:
        now = 0.0
        for device in range(len(self.works)):
            self._go_on(device, now)
        while self.events:
            now, _, what, subject = heapq.heappop(self.events)
            if what == "free":
                self._go_on(subject, now)
            elif what == "left":
                self._left(subject, now)
            else:
                self._arrived(subject, now)
        if any(at < len(works) for at, works in zip(self.at, self.works, strict=True)):
            raise RuntimeError("the schedule that is simulated waits for itself")
        return now

    def _at(self, time: float, what: str, subject: int) -> None:
        self.count += 1  # ties: first come, first served
        heapq.heappush(self.events, (time, self.count, what, subject))

    def _go_on(self, device: int, now: float) -> None:
        """Do works until one takes time or has to wait."""
        works = self.works[device]
        while self.at[device] < len(works):
            work = works[self.at[device]]
            self.waiting[device] = set(work.awaits) - self.done
            if self.waiting[device]:
                return
            self.at[device] += 1
            for tag in (*work.ships, *work.posts):
                self._begin(tag, now)
            if work.seconds:
                self._at(now + work.seconds, "free", device)
                return

    def _begin(self, tag: int, now: float) -> None:
        if tag not in self.begun:
            self.begun.add(tag)
            return
        message = self.messages[tag]
        ends = (message.source, message.target)
        heapq.heappush(self.queues.setdefault(ends, []), (message.priority, tag))
        if not self.sending[message.source] and not self.receiving[message.target]:
            self._send(message.source, message.target, now)

    def _send(self, source: int, target: int, now: float) -> None:
        """Let the next chunk between two devices that are both free leave."""
        _, tag = self.queues[source, target][0]
        self.sending[source] = self.receiving[target] = True
        chunk = min(self.left[tag], CHUNK_bytes)
        first = self.left[tag] == self.messages[tag].size_bytes
        self.left[tag] -= chunk
        if not self.left[tag]:
            heapq.heappop(self.queues[source, target])
        self._at(now + chunk / self.link.bytes_per_second + MESSAGE_seconds * first, "left", tag)

    def _left(self, tag: int, now: float) -> None:
        source, target = self.messages[tag].source, self.messages[tag].target
        self.sending[source] = self.receiving[target] = False
        if not self.left[tag]:
            self._at(now + self.link.latency_seconds, "arrived", tag)
        nodes = range(len(self.works))
        self._next([(source, other) for other in nodes if not self.receiving[other]], now)
        self._next([(other, target) for other in nodes if not self.sending[other]], now)

    def _next(self, ends: list[tuple[int, int]], now: float) -> None:
        """Of the queues between these ends, serve the most urgent; those of later devices wait their turn."""
        waiting = [(self.queues[pair][0], pair) for pair in ends if self.queues.get(pair)]
        if waiting:
            _, (source, target) = min(waiting)
            if not self.sending[source] and not self.receiving[target]:
                self._send(source, target, now)

    def _arrived(self, tag: int, now: float) -> None:
        self.done.add(tag)
        for device in (self.messages[tag].source, self.messages[tag].target):
            if tag in self.waiting[device]:
                self.waiting[device].discard(tag)
                if not self.waiting[device]:
                    self._go_on(device, now)
