"""The one order in which all devices do their ops, made so that what must be waited for hides behind what need not.

    urgent   dx3 | moments2 (sent) |              | NormalizeGrad2 (reads all moments) | dx2 ...
    late                           | dw3, update4 |                                          | dw2 ...

Ops of the forward pass and input gradients are urgent: they follow each other as in the graph. Late are weight
gradients and all that only updates wait for. A late op takes its turn when the next urgent one would have to wait for
a message, by an estimate: the slowest device, the busiest link. None is kept back beyond the next layer's weight
gradient, nor beyond what is computed again, because what it reads takes memory. An update runs once its gradient is
expected to have come.

What only updates wait for, and the weights that a step begins with, would be in the way of what is urgent: a device
receives from all others at a time, and they do not know of each other. Such deliveries begin when a long op does, no
more of them than will have come by its end, those first that are read first. What must be waited for and leaves while
its op is computed (pieces.py) is on the link before them.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from fusetile.box import volume
from fusetile.cluster import Link, MESSAGE_seconds
from fusetile.graph import BACKWARD, FORWARD, UPDATE, Graph
from fusetile.passes.communicate import Communication, Delivery, busiest, wire_dtype
from fusetile.plan import Move


@dataclass(frozen=True, slots=True)
class Order:
    """`ops`: the names of all. `begins[delivery, turn]`: with the op at which position the moves of a delivery that can
    wait begin, turn by turn (see `turns_of`); the others begin when they are written."""

    ops: tuple[str, ...]
    begins: Mapping[tuple[int, int], int]


def turns_of(delivery: Delivery) -> dict[Move, int]:
    """When each move takes place among those of a delivery: in each turn every device sends to another one."""
    nodes, turns = len(delivery.need), dict[Move, int]()
    taken: Counter[tuple[int, int]] = Counter()
    for move in delivery.transfers():
        ends = (move.source, move.target)
        turns[move] = taken[ends] * nodes + (move.target - move.source) % nodes
        taken[ends] += 1
    return turns


def order_ops(
    graph: Graph,
    communication: Communication,
    link: Link,
    seconds: Mapping[str, Sequence[float]],
    waiting: Sequence[Collection[str]],
    cut: Collection[str] = (),
) -> Order:
    """`seconds[op]`: what each device takes for its part; `waiting[delivery]`: the readers that have to wait for it, on
    whatever device; `cut`: ops whose outputs travel while they are computed. `graph` must be in topological order."""
    return _Queue(graph, communication, link, seconds, waiting, cut).run()


class _Queue:
    """The state between two ops: `now`, and when the link has carried what is on its way, by the estimate."""

    def __init__(
        self,
        graph: Graph,
        communication: Communication,
        link: Link,
        seconds: Mapping[str, Sequence[float]],
        waiting: Sequence[Collection[str]],
        cut: Collection[str],
    ) -> None:
        self.cut = cut
        self.graph, self.communication, self.link = graph, communication, link
        self.seconds = {name: max(parts) for name, parts in seconds.items()}
        self.late, self.readers, self.waiting = late_ops(graph), graph.consumers(), waiting
        self.turns: dict[int, dict[int, float]] = {}  # delivery -> seconds of each of its turns, until they begin
        self.crossing: dict[str, list[int]] = {}  # tensor -> its deliveries that cross the network
        self.awaited: dict[str, list[int]] = {}  # op -> those that it waits for
        for index, delivery in enumerate(communication.deliveries):
            if delivery.transfers():
                self.crossing.setdefault(delivery.tensor, []).append(index)
                for name in waiting[index]:
                    self.awaited.setdefault(name, []).append(index)
                if can_wait(graph, communication, index, waiting[index]):
                    self.turns[index] = self._turns(delivery)
        self.work_left = sum(self.seconds.values())
        self.link_left = sum(sum(turns.values()) for turns in self.turns.values())
        self.now = self.link_free = 0.0
        self.arrival: dict[int, float] = {}
        self.begins: dict[tuple[int, int], int] = {}
        self.pending: list[tuple[int, int, int]] = []  # what can wait: position of the first reader, delivery, turn
        self.done: list[str] = []
        self.kept: list[str] = []  # late ops that are kept back
        self.unread: dict[str, set[str]] = {}  # update -> ops that must be done before it
        self.lets: dict[str, list[str]] = {}  # op -> updates that it lets run
        self.updates: list[str] = []  # nothing but their gradients' arrival is missing

    def run(self) -> Order:
        names = [op.name for op in self.graph.ops.values() if op.phase != UPDATE]
        self.rank = {name: position for position, name in enumerate(names)}
        self._hold_updates()
        self._let_wait(self.graph.parameters)
        waits = self._waits(names)
        for name, wait_ahead in zip(names, waits, strict=True):
            self._update(self.now)
            if name in self.late and wait_ahead:
                self.kept.append(name)
                continue
            if name in self.late:
                self._run_kept()
            self._begin_for(name)
            needs_room = name in self.graph.repeats
            while self.kept and (needs_room or self._ready(name) > self.now or self._opens(name)):
                self._run(self.kept.pop(0))
                self._update(self.now)
            self._update(self._ready(name))
            self._run(name)
        self._run_kept()
        self._update(self.now)
        self._begin(inf)
        self._update(inf)
        return Order(tuple(self.done), self.begins)

    def _waits(self, names: Sequence[str]) -> list[bool]:
        """Per op: whether an urgent one up to the next that opens a weight gradient waits for the network."""
        waits, ahead = [], False
        for name in reversed(names):
            if self._opens(name):
                ahead = False
            ahead |= name not in self.late and name in self.awaited
            waits.append(ahead)
        return waits[::-1]

    def _opens(self, name: str) -> bool:
        """Whether a weight gradient becomes possible by an op."""
        if name in self.late:
            return False
        return any(r.kind.endswith("WeightGrad") for out in self.graph.ops[name].outputs for r in self.readers[out])

    def _hold_updates(self) -> None:
        """Updates come after all that they read, and, being in place, after all that read the old value."""
        producers = self.graph.producers()
        for op in self.graph.ops.values():
            if op.phase == UPDATE:
                before = {producers[name].name for name in op.inputs if name in producers}
                before |= {r.name for name in op.inputs if name in self.graph.parameters for r in self.readers[name]}
                self.unread[op.name] = before - {op.name}
                for name in self.unread[op.name]:
                    self.lets.setdefault(name, []).append(op.name)
                if not self.unread[op.name]:
                    self.updates.append(op.name)

    def _ready(self, name: str) -> float:
        """When all that an op waits for has arrived; what has not begun is not expected."""
        return max((self.arrival.get(index, inf) for index in self.awaited.get(name, ())), default=0.0)

    def _run(self, name: str) -> None:
        self._begin_for(name)
        start = max(self.now, self._ready(name))
        seconds = self.seconds[name]
        if name in self.cut:
            self._send(self.graph.ops[name].outputs, start)
        if self.graph.ops[name].phase != UPDATE:  # which is short, and may be one kernel with what is before it
            self._begin(start + seconds if self.link_left <= self.work_left else inf)
        self.now = start + seconds
        self.work_left -= seconds
        self.done.append(name)
        if name not in self.cut:
            self._send(self.graph.ops[name].outputs, self.now)
        self._let_wait(self.graph.ops[name].outputs)
        for update in self.lets.get(name, []):
            self.unread[update].discard(name)
            if not self.unread[update]:
                self.updates.append(update)

    def _run_kept(self) -> None:
        while self.kept:
            self._run(self.kept.pop(0))

    def _update(self, until: float) -> None:
        """Run the updates whose gradients will have come by then."""
        while due := [name for name in self.updates if self._ready(name) <= until]:
            first = min(due, key=self._ready)
            self.updates.remove(first)
            self._run(first)

    def _send(self, tensors: Iterable[str], begin: float) -> None:
        """What is written and must be waited for: it overtakes the rest."""
        for index in self._deliveries(tensors):
            if index not in self.turns:
                size_bytes, messages = busiest(self.graph, self.communication.deliveries[index], self.link)
                seconds = size_bytes / self.link.bytes_per_second + messages * MESSAGE_seconds
                urgent = any(name not in self.late for name in self.waiting[index])
                self._carry(index, seconds, begin if urgent else max(begin, self.link_free))

    def _let_wait(self, tensors: Iterable[str]) -> None:
        """What is written and can wait."""
        for index in self._deliveries(tensors):
            if index in self.turns:
                first = min((self.rank.get(name, len(self.rank)) for name in self.waiting[index]), default=0)
                for number in self.turns[index]:
                    heapq.heappush(self.pending, (first, index, number))

    def _deliveries(self, tensors: Iterable[str]) -> list[int]:
        return [index for tensor in tensors for index in self.crossing.get(tensor, [])]

    def _turns(self, delivery: Delivery) -> dict[int, float]:
        turns: dict[int, float] = {}
        size = np.dtype(wire_dtype(self.graph, delivery.tensor, self.link)).itemsize
        for move, number in turns_of(delivery).items():
            seconds = size * volume(move.box) / self.link.bytes_per_second + MESSAGE_seconds
            turns[number] = max(seconds, turns.get(number, 0.0))
        return dict(sorted(turns.items()))

    def _begin_for(self, name: str) -> None:
        """Let begin what an op waits for."""
        while self._ready(name) == inf:
            self._begin_next()

    def _begin(self, until: float) -> None:
        """Let moves begin with the next op, as many as keep the link busy until then."""
        while self.pending and max(self.now, self.link_free) < until:
            self._begin_next()

    def _begin_next(self) -> None:
        _, index, number = heapq.heappop(self.pending)
        self.begins[index, number] = len(self.done)
        seconds = self.turns[index].pop(number)
        self.link_left -= seconds
        self._carry(index, seconds, max(self.now, self.link_free))
        if self.turns[index]:
            self.arrival[index] = inf

    def _carry(self, index: int, seconds: float, begin: float) -> None:
        self.link_free = max(self.link_free, begin) + seconds
        self.arrival[index] = begin + seconds + self.link.latency_seconds


def can_wait(graph: Graph, communication: Communication, index: int, waiting: Collection[str]) -> bool:
    """Whether a delivery is one of parameters, or only updates are among its readers that wait for it."""
    if communication.deliveries[index].tensor in graph.parameters:
        return True
    return all(graph.ops[name].phase == UPDATE for name in waiting)


def late_ops(graph: Graph) -> set[str]:
    """Backward ops that only updates read, and what is recomputed for them alone."""
    readers, producers, late = graph.consumers(), graph.producers(), set[str]()
    for op in reversed(graph.ops.values()):
        after = [reader for name in op.outputs for reader in readers[name]]
        recomputed = all(producers[name].phase == FORWARD for name in op.inputs if name in producers)
        if op.phase == BACKWARD and all(r.phase == UPDATE or (recomputed and r.name in late) for r in after):
            late.add(op.name)
    return late
