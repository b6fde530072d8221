"""The one order in which all devices do their ops, made so that what must be waited for hides behind what need not.

    urgent   dx3 | moments2 (sent) |              | NormalizeGrad2 (reads all moments) | dx2 ...
    late                           | dw3, update4 |                                          | dw2 ...

Ops of the forward pass and input gradients are urgent: they follow each other as in the graph. Late are weight
gradients and all that only updates wait for. A late op takes its turn when the next urgent one would have to wait for
a message, by an estimate: the slowest device, the busiest link. None is kept back beyond the next layer's weight
gradient, nor beyond what is computed again, because what it reads takes memory. An update runs once its gradient is
expected to have come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fusetile.cluster import Link, MESSAGE_seconds
from fusetile.graph import BACKWARD, FORWARD, UPDATE, Graph
from fusetile.passes.communicate import Communication, busiest


def order_ops(
    graph: Graph, communication: Communication, link: Link, seconds: Mapping[str, Sequence[float]]
) -> tuple[str, ...]:
    """Names of all ops. `seconds[op]`: what each device takes for its part. `graph` must be in topological order."""
    return _Queue(graph, communication, link, seconds).run()


class _Queue:
    """The state between two ops: `now`, and when the link has carried what is on its way, by the estimate."""

    def __init__(
        self, graph: Graph, communication: Communication, link: Link, seconds: Mapping[str, Sequence[float]]
    ) -> None:
        self.graph, self.communication, self.link = graph, communication, link
        self.seconds = {name: max(parts) for name, parts in seconds.items()}
        self.late, self.readers = late_ops(graph), graph.consumers()
        self.crossing: dict[str, list[int]] = {}  # tensor -> its deliveries that cross the network
        for index, delivery in enumerate(communication.deliveries):
            if delivery.transfers():
                self.crossing.setdefault(delivery.tensor, []).append(index)
        self.now = self.link_free = 0.0
        self.arrival: dict[int, float] = {}
        self.done: list[str] = []
        self.kept: list[str] = []  # late ops that are kept back
        self.unread: dict[str, set[str]] = {}  # update -> ops that must be done before it
        self.waiting: dict[str, list[str]] = {}  # op -> updates that it lets run
        self.updates: list[str] = []  # nothing but their gradients' arrival is missing

    def run(self) -> tuple[str, ...]:
        names = [op.name for op in self.graph.ops.values() if op.phase != UPDATE]
        self._hold_updates()
        self._send([name for name in self.graph.parameters if name in self.crossing])
        waits = self._waits(names)
        for name, wait_ahead in zip(names, waits, strict=True):
            self._update(self.now)
            if name in self.late and wait_ahead:
                self.kept.append(name)
                continue
            if name in self.late:
                self._run_kept()
            needs_room = name in self.graph.repeats
            while self.kept and (needs_room or self._ready(name) > self.now or self._opens(name)):
                self._run(self.kept.pop(0))
                self._update(self.now)
            self._update(self._ready(name))
            self._run(name)
        self._run_kept()
        self._update(float("inf"))
        return tuple(self.done)

    def _waits(self, names: Sequence[str]) -> list[bool]:
        """Per op: whether an urgent one up to the next that opens a weight gradient reads what crosses the network."""
        waits, ahead = [], False
        for name in reversed(names):
            if self._opens(name):
                ahead = False
            ahead |= name not in self.late and any(tensor in self.crossing for tensor in self.graph.ops[name].inputs)
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
                    self.waiting.setdefault(name, []).append(op.name)
                if not self.unread[op.name]:
                    self.updates.append(op.name)

    def _ready(self, name: str) -> float:
        """When all that an op reads has arrived."""
        op = self.graph.ops[name]
        arrivals = [self.arrival.get(self.communication.reads[name, tensor], 0.0) for tensor in op.inputs]
        return max(arrivals, default=0.0)

    def _run(self, name: str) -> None:
        self.now = max(self.now, self._ready(name)) + self.seconds[name]
        self.done.append(name)
        self._send(self.graph.ops[name].outputs)
        for update in self.waiting.get(name, []):
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

    def _send(self, tensors: Iterable[str]) -> None:
        """What must be waited for overtakes the rest."""
        for tensor in tensors:
            for index in self.crossing.get(tensor, []):
                delivery = self.communication.deliveries[index]
                size_bytes, messages = busiest(self.graph, delivery, self.link)
                seconds = size_bytes / self.link.bytes_per_second + messages * MESSAGE_seconds
                begin = self.now if self._is_urgent(delivery.readers) else max(self.now, self.link_free)
                self.link_free = max(self.link_free, self.now) + seconds
                self.arrival[index] = begin + seconds + self.link.latency_seconds

    def _is_urgent(self, readers: Iterable[str]) -> bool:
        ops = [self.graph.ops[name] for name in readers if name in self.graph.ops]
        return any(op.phase != UPDATE and op.name not in self.late for op in ops)


def late_ops(graph: Graph) -> set[str]:
    """Backward ops that only updates read, and what is recomputed for them alone."""
    readers, producers, late = graph.consumers(), graph.producers(), set[str]()
    for op in reversed(graph.ops.values()):
        after = [reader for name in op.outputs for reader in readers[name]]
        recomputed = all(producers[name].phase == FORWARD for name in op.inputs if name in producers)
        if op.phase == BACKWARD and all(r.phase == UPDATE or (recomputed and r.name in late) for r in after):
            late.add(op.name)
    return late
