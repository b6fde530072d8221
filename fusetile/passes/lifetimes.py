"""What is live while a step's ops run in a given order, if some maps are computed again in the backward pass.

    order    y1  y2  y3  | g3  g2  g1          what g2 reads, y1, is computed again: y1 lives until y2 is done, and
             y1  y2  y3  | g3  y1' g2  g1      its copy y1' from right above g2 to its last reader

Thousands of choices are tried, so only what a choice changes is gone through op by op: the copies, and what moves with
them. All else is one array operation per question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusetile.graph import BACKWARD, Graph, Op
from fusetile.ops import overwritten
from fusetile.passes.order import late_ops

Again = frozenset[str]
ROOM = 1 << 20  # keys between one op of the order and the next: more than copies ever stand there


@dataclass(frozen=True, slots=True)
class Copies:
    """What a choice changes: a key for every op of the order, by which they are sorted; the ops that are computed
    again, and the keys of these copies."""

    keys: np.ndarray
    ops: list[int]
    copy_keys: list[int]


class Pairs:
    """(op, tensor) of all ops in order: as two arrays, and the tensors of each op."""

    def __init__(self, names: Sequence[Sequence[str]], numbers: Mapping[str, int]) -> None:
        self.of = [[numbers[name] for name in each] for each in names]
        self.ops = np.repeat(np.arange(len(names)), [len(each) for each in names])
        self.tensors = np.array([number for each in self.of for number in each], int)


class Lifetimes:
    """Of an order of ops of a graph without copies. `sizes` (bytes per device) of the tensors that count, `scratch`
    (the same) of every op in order; `always` is there all the time."""

    def __init__(
        self,
        graph: Graph,
        order: Sequence[Op],
        sizes: Mapping[str, np.ndarray],
        scratch: Sequence[np.ndarray],
        always: np.ndarray,
    ) -> None:
        self._order, self._scratch, self._always = order, np.array(scratch), always
        self._number = {op.name: i for i, op in enumerate(order)}
        self._producers = {name: self._number[op.name] for name, op in graph.producers().items()}
        self._names = {name: i for i, name in enumerate({n: 0 for op in order for n in (*op.outputs, *op.inputs)})}
        self._kept_back = _kept_back(graph, order)
        self._backward_readers: dict[str, list[int]] = {}
        for i, op in enumerate(order):
            for name in op.inputs if op.phase == BACKWARD else ():
                self._backward_readers.setdefault(name, []).append(i)
        self._backward = np.array([op.phase == BACKWARD for op in order])
        self._reads = Pairs([op.inputs for op in order], self._names)
        self._writes = Pairs([op.outputs for op in order], self._names)
        places = [overwritten(graph, op) for op in order]
        most = max(map(len, places), default=0)
        self._places = [Pairs([each[k : k + 1] for each in places], self._names) for k in range(most)]
        lasting = {*graph.gradients.values(), graph.loss}
        self._may_end = np.array([*(name not in lasting for name in self._names), *[True] * len(self._names)])
        nothing = np.zeros_like(always)
        size = np.array([sizes.get(name, nothing) for name in self._names]).reshape(-1, always.size)
        self._size = np.concatenate([size, size])  # copies follow the tensors that they are copies of

    def live(self, again: Again) -> tuple[np.ndarray, list[Op]]:
        """Bytes that are live [step, device], at every op and copy in the order in which they run; and the copies."""
        copies = self._copies(again)
        numbers = np.concatenate([np.arange(len(self._order)), np.array(copies.ops, int)])
        order = np.argsort(np.concatenate([copies.keys, np.array(copies.copy_keys, int)]))
        rank = np.empty_like(order)
        rank[order] = np.arange(order.size)
        first, last = self._spans(again, copies, rank)
        there = first >= 0
        change = np.zeros((order.size + 1, self._always.size))
        for device, size in enumerate(self._size.T):
            change[:, device] = np.bincount(first[there], size[there], order.size + 1)
            change[:, device] -= np.bincount(last[there] + 1, size[there], order.size + 1)
        live = self._always + np.cumsum(change, axis=0)[:-1] + self._scratch[numbers[order]]
        return live, [self._order[i] for i in copies.ops]

    def _spans(self, again: Again, copies: Copies, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last step of every tensor, then of every copy; (-1, _) of what is not computed."""
        count, base = len(self._names), len(self._order)
        is_again = np.zeros(count, bool)
        is_again[[self._names[name] for name in again]] = True

        def seen(pairs: Pairs, *, copied: bool) -> tuple[np.ndarray, np.ndarray]:
            """The steps, of the ops or their copies, and the tensors or copies that they have to do with."""
            if not copied:
                return rank[pairs.ops], pairs.tensors + count * (self._backward[pairs.ops] & is_again[pairs.tensors])
            found = [(base + i, tensor) for i, op in enumerate(copies.ops) for tensor in pairs.of[op]]
            ops, tensors = np.array(found, int).reshape(-1, 2).T
            return rank[ops], tensors + count * is_again[tensors]

        first = np.full(2 * count, -1)
        first[self._writes.tensors] = rank[self._writes.ops]
        for i, op in enumerate(copies.ops):
            first[count + np.array(self._writes.of[op])] = rank[base + i]
        last = first.copy()
        for copied in (False, True):
            steps, tensors = seen(self._reads, copied=copied)
            np.maximum.at(last, tensors, steps)
        written = np.zeros(rank.size, bool)
        for pairs in self._places:  # of several places that an op may write to, the first that nothing needs later
            for copied in (False, True):
                steps, tensors = seen(pairs, copied=copied)
                over = (last[tensors] == steps) & self._may_end[tensors] & ~written[steps]
                last[tensors[over]] -= 1  # from here on it is what is written in its place
                written[steps[over]] = True
        return first, last

    def _copies(self, again: Again) -> Copies:
        """As `order_ops` would have them: right above the first reader; late ops that are kept back come before."""
        keys = np.arange(1, len(self._order) + 1, dtype=int) * ROOM
        copies, done = dict[int, int](), set[int]()
        now = 0

        def stand() -> int:
            nonlocal now
            now += 1
            return now

        def read(name: str) -> None:
            if name in again and (op := self._producers[name]) not in copies:
                for part in self._order[op].inputs:
                    read(part)
                copies[op] = stand()

        def run(i: int) -> None:
            if i in done:
                return
            done.add(i)
            inputs = self._order[i].inputs if self._backward[i] else ()
            if any(name in again and self._producers[name] not in copies for name in inputs):
                for late in self._kept_back.get(i, ()):
                    run(late)
            for name in inputs:
                read(name)
            keys[i] = stand()

        for i in sorted({i for name in again for i in self._backward_readers.get(name, ())}):
            now = i * ROOM
            run(i)
        return Copies(keys, list(copies), list(copies.values()))


def _kept_back(graph: Graph, order: Sequence[Op]) -> dict[int, list[int]]:
    """Urgent backward op -> the late ones that come before it in the graph, but behind it in the order."""
    late, found = late_ops(graph), {}
    at = {name: i for i, name in enumerate(graph.ops)}
    late_numbers = [i for i, op in enumerate(order) if op.name in late]
    for i, op in enumerate(order):
        if op.phase == BACKWARD and op.name not in late:
            behind = [j for j in late_numbers if j > i and at[order[j].name] < at[op.name]]
            if behind:
                found[i] = behind
    return found
