"""Play works and messages against the clock: devices compute, links carry, the rest follows.

A device does its works in order. A message is on the way once it is shipped and posted. Its source sends in chunks, the
most urgent message first. To a device that still has a chunk and more to receive it sends nothing but what the buffers
between them take at once: the next most urgent gets the turn. A chunk keeps its source's sending direction busy and its
target's receiving direction, where chunks queue (directions of a link are independent, and the switch between the
devices is not a bottleneck). The last chunk arrives a latency later, and both ends may go on. What a chunk costs its
two devices' processors makes what they compute meanwhile take longer.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from fusetile.cluster import Link, MESSAGE_seconds
from fusetile.device import Messaging

CHUNK_bytes = 1 << 14  # the runtime's
BUFFERED_bytes = 4096
TICK_seconds = 1e-7
"""Events that are nearer to each other are of one time, whatever the rounding errors."""
CHUNKS_per_message = 128
"""Messages of more chunks are played in longer ones: that takes less time and changes little."""


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


@dataclass(frozen=True, slots=True)
class Timeline:
    """What happened, in seconds since the start: `works[device]` holds (start, stop, index of the work) of all that
    took time, `messages[tag]` the (start, stop) of a message on the links. `seconds`: when the last device was done."""

    seconds: float
    works: tuple[tuple[tuple[float, float, int], ...], ...]
    messages: tuple[tuple[float, float], ...]


def play(
    works: Sequence[Sequence[Work]], messages: Sequence[Message], link: Link, messaging: Sequence[Messaging] = ()
) -> Timeline:
    """`messaging` per device; nothing by default. Raises RuntimeError if devices wait for each other."""
    return _Clock(works, messages, link, messaging or [Messaging()] * len(works)).run()


class _Clock:
    """The state between two events. Events: a device is free, a source may send, a message has arrived."""

    def __init__(
        self,
        works: Sequence[Sequence[Work]],
        messages: Sequence[Message],
        link: Link,
        messaging: Sequence[Messaging],
    ) -> None:
        self.works, self.messages, self.link, self.messaging = works, messages, link, messaging
        nodes = len(works)
        self.stolen = [0.0] * nodes  # by messages, from the work that a device is at
        self.at = [0] * nodes
        self.waiting: list[set[int]] = [set() for _ in range(nodes)]
        self.left = [message.size_bytes for message in messages]
        self.begun: set[int] = set()  # shipped or posted, not yet both
        self.done: set[int] = set()
        self.queues: list[dict[int, list[tuple[int, int]]]] = [
            {} for _ in range(nodes)
        ]  # source, target: (priority, tag)
        self.sends_again = [0.0] * nodes  # when a source's direction is free
        self.received = [0.0] * nodes  # when a target has what is on its way to it
        self.asked = [-1.0] * nodes  # when a source is to try again
        self.events: list[tuple[int, int, float, str, int]] = []  # tick, turn, time, what, subject
        self.count = 0
        self.busy: list[list[tuple[float, float, int]]] = [[] for _ in range(nodes)]
        self.carried = [(0.0, 0.0)] * len(messages)

    def run(self) -> Timeline:
        now = 0.0
        for device in range(len(self.works)):
            self._go_on(device, now)
        while self.events:
            _, turn, now, what, subject = heapq.heappop(self.events)
            if what == "free":
                self._free(subject, now)
            elif what == "send":
                self._send(subject, now, turn)
            else:
                self._arrived(subject, now)
        if any(at < len(works) for at, works in zip(self.at, self.works, strict=True)):
            raise RuntimeError("the schedule that is simulated waits for itself")
        return Timeline(now, tuple(map(tuple, self.busy)), tuple(self.carried))

    def _at(self, time: float, what: str, subject: int, turn: int = 0) -> None:
        """Events of one time happen in the order of their turns, by default first come, first served."""
        self.count += 1
        heapq.heappush(self.events, (round(time / TICK_seconds), turn or self.count, time, what, subject))

    def _free(self, device: int, now: float) -> None:
        """A work ends, or goes on for as long as messages have interrupted it."""
        stolen, self.stolen[device] = self.stolen[device], 0.0
        if not stolen:
            self._go_on(device, now)
            return
        start, _, index = self.busy[device][-1]
        self.busy[device][-1] = (start, now + stolen, index)
        self._at(now + stolen, "free", device)

    def _go_on(self, device: int, now: float) -> None:
        """Do works until one takes time or has to wait."""
        works = self.works[device]
        while self.at[device] < len(works):
            index = self.at[device]
            work = works[index]
            if work.awaits:
                self.waiting[device] = set(work.awaits) - self.done
                if self.waiting[device]:
                    return
            self.at[device] += 1
            for tag in (*work.ships, *work.posts):
                self._begin(tag, now)
            if work.seconds:
                self.stolen[device] = 0.0  # what came while it waited
                self.busy[device].append((now, now + work.seconds, index))
                self._at(now + work.seconds, "free", device)
                return

    def _begin(self, tag: int, now: float) -> None:
        if tag not in self.begun:
            self.begun.add(tag)
            return
        message = self.messages[tag]
        heapq.heappush(self.queues[message.source].setdefault(message.target, []), (message.priority, tag))
        self._ask(message.source, max(now, self.sends_again[message.source]))

    def _ask(self, source: int, time: float, turn: int = 0) -> None:
        """Let a source try to send at a time, unless it will try before."""
        if self.asked[source] < 0 or time < self.asked[source]:
            self.asked[source] = time
            self._at(time, "send", source, turn)

    def _send(self, source: int, now: float, turn: int) -> None:
        """Put the next chunk on the way, or try again when a target has received enough. Who has waited for a target
        since before another sent to it comes first then: connections to one device share its link."""
        if self.asked[source] != now:
            return  # it was asked to try at another time
        self.asked[source] = -1.0
        rate = self.link.bytes_per_second
        slack = CHUNK_bytes / rate
        best, soonest = None, inf
        for target, queue in self.queues[source].items():
            if queue:
                received = self.received[target]
                if received <= now + slack + TICK_seconds or self.messages[queue[0][1]].size_bytes <= BUFFERED_bytes:
                    best = min(best or (queue[0], target), (queue[0], target))
                elif received < soonest:
                    soonest = received
        if best is None:
            if soonest < inf:
                self._ask(source, soonest - slack, turn)
            return
        (_, tag), target = best
        size = self.messages[tag].size_bytes
        first = self.left[tag] == size
        chunk = min(self.left[tag], max(CHUNK_bytes, size / CHUNKS_per_message))
        self.left[tag] -= chunk
        seconds = chunk / rate + MESSAGE_seconds * first
        self.sends_again[source] = now + seconds
        self.received[target] = max(self.received[target], now) + seconds
        for device in (source, target):
            cost = self.messaging[device]
            self.stolen[device] += chunk * cost.byte_seconds + first * cost.message_seconds
        if first:
            self.carried[tag] = (now, now)
        if not self.left[tag]:
            heapq.heappop(self.queues[source][target])
            self._at(self.received[target] + self.link.latency_seconds, "arrived", tag)
        self._ask(source, now + seconds)

    def _arrived(self, tag: int, now: float) -> None:
        self.done.add(tag)
        self.carried[tag] = (self.carried[tag][0], now)
        for device in (self.messages[tag].source, self.messages[tag].target):
            if tag in self.waiting[device]:
                self.waiting[device].discard(tag)
                if not self.waiting[device]:
                    self._go_on(device, now)
