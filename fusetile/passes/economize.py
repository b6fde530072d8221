"""Choose what to compute again in the backward pass so that every device's memory suffices.

    live MB   forward  ... backward                 again {}           peak 412, no seconds
    400 |          _____                            again {pool1}      peak 371, 0.8 s
    200 |     ____/     \\____                       again {pool1, y2}  peak 290, 1.1 s
        | ___/               \\___

A choice is played: the order of ops is known from the schedule, so is the size of every tensor on every device, so
are the kernels' scratch buffers, and hence what is live at every op. Greedy by excess over the memory (summed over
ops and devices) saved per second of computing again; beside it, the evenly spaced checkpoints of Chen et al.
(arXiv 1604.06174). That one forward value is kept, and another computed again, follows Checkmate (Jain et al.,
arXiv 1910.02653), whose integer program is too slow for hundreds of ops.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fusetile.box import volume
from fusetile.cluster import Cluster
from fusetile.cost import cost_of, seconds_on
from fusetile.graph import FORWARD, Graph, Op
from fusetile.passes.buffers import DeviceBuffers
from fusetile.passes.communicate import Communication, moved_bytes
from fusetile.passes.lifetimes import Again, Lifetimes
from fusetile.plan import Plan

SMALLEST_part = 1 / 500  # of the peak: smaller tensors are kept
MOST = 64  # tensors are considered
SHRINK = 0.94  # by which the goal is lowered again and again when the smallest peak is looked for
MISSES = 4  # goals without a new smallest peak after which the search ends
FLATTENED = 6  # choices with the smallest peaks, which are looked at once more
PRUNED = 3  # of the choices within the goals, the fastest, from which is taken what is not needed
EXCHANGED = 8  # tensors, those that take longest, for which others are looked for instead
SEGMENTS = (2, 3, 4, 6, 8, 11, 16, 23, 32)  # between evenly spaced checkpoints
REMEMBERED = 1024  # choices: one goal after the other asks for most of the same


@dataclass(frozen=True, slots=True)
class Saving:
    """What is computed again: how many maps, seconds per step that it takes, memory that it saves on every device."""

    maps: int
    seconds: float
    saved_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Played:
    """A choice: the most that is live on every device (bytes), the excess over the goals, and seconds per step that
    computing again takes."""

    again: Again
    peak_bytes: np.ndarray
    excess: float
    seconds: float


class Books:
    """What the choice is made by: order, sizes and times of a plan that was laid out already, whatever it repeats."""

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        communication: Communication,
        order: Sequence[str],
        storage: Sequence[DeviceBuffers],
        scratch_bytes: Sequence[dict[str, int]],
        *,
        cluster: Cluster,
    ) -> None:
        """`graph` is the one without copies; `scratch_bytes` of every op, per device."""
        self._nodes = plan.nodes
        self._order = [graph.ops[name] for name in order if name in graph.ops]
        always = {*graph.parameters, *graph.next_value.values(), *graph.fed()}
        sizes = _sizes(communication, storage)
        there = (sizes[name] for name in {*graph.parameters, *graph.fed()} if name in sizes)
        self._always: np.ndarray = sum(there, self._nothing)
        self._sizes = {name: size for name, size in sizes.items() if name not in always}
        scratch = [np.array([found.get(op.name, 0) for found in scratch_bytes], float) for op in self._order]
        self._lifetimes = Lifetimes(graph, self._order, self._sizes, scratch, self._always)
        self._seconds = {op.name: _seconds(graph, op, plan, communication, cluster) for op in self._order}
        self._partial = {name for name, layout in communication.layouts.items() if layout.combine == "sum"}
        self._lived = lru_cache(REMEMBERED)(self._live)

    @property
    def _nothing(self) -> np.ndarray:
        return np.zeros(self._nodes)

    def play(self, again: Again, goal_bytes: np.ndarray) -> Played:
        """What a choice leads to."""
        live, seconds = self._lived(again)
        excess = float((np.maximum(live - goal_bytes, 0) / goal_bytes).sum())
        return Played(again, live.max(axis=0), excess, seconds)

    def least_bytes(self) -> np.ndarray:
        """Per device, no choice makes the peak smaller: what is always there, and what one op reads."""
        reads = [
            sum((self._sizes.get(name, self._nothing) for name in set(op.inputs)), self._nothing) for op in self._order
        ]
        return self._always + np.max(reads, axis=0)

    def saving(self, again: Again, scale: np.ndarray) -> Saving:
        """Against keeping all; an arena is so many times (`scale`) what is live at most."""
        free = np.full(self._nodes, np.inf)
        none, chosen = self.play(frozenset(), free), self.play(again, free)
        saved = (none.peak_bytes - chosen.peak_bytes) * scale
        return Saving(len(again), chosen.seconds, tuple(int(max(0, each)) for each in saved))

    def candidates(self, peak_bytes: np.ndarray) -> list[str]:
        """Forward tensors that are worth keeping or not, in order; of many, the largest."""
        worth = {
            name: float((self._sizes[name] / peak_bytes).max())
            for op in self._order
            if op.phase == FORWARD
            for name in op.outputs
            if name in self._sizes and name not in self._partial
        }
        largest = sorted((name for name in worth if worth[name] > SMALLEST_part), key=lambda name: -worth[name])
        return [name for name in worth if name in set(largest[:MOST])]

    def _live(self, again: Again) -> tuple[np.ndarray, float]:
        """Bytes that are live at every step, on every device; seconds per step that computing again takes."""
        live, copies = self._lifetimes.live(again)
        return live, sum(self._seconds[op.name] for op in copies)


def _sizes(communication: Communication, storage: Sequence[DeviceBuffers]) -> dict[str, np.ndarray]:
    """Per tensor and device: its home, and what is delivered elsewhere."""
    sizes: dict[str, np.ndarray] = {}
    for device, held in enumerate(storage):
        buffers = [(name, buffer) for name, buffer in held.home.items()]
        for index, buffer in held.delivered.items():
            name = communication.deliveries[index].tensor
            if held.home.get(name) is not buffer:
                buffers.append((name, buffer))
        for name, buffer in buffers:
            sizes.setdefault(name, np.zeros(len(storage)))[device] += buffer.size_bytes
    return sizes


def _seconds(graph: Graph, op: Op, plan: Plan, communication: Communication, cluster: Cluster) -> float:
    """Doing an op once more: on the slowest device, and what it has to send."""
    boxes = plan.placements[op.name].compute
    computing = max(
        seconds_on(cost_of(graph, op, box), node) if volume(box) else 0.0
        for box, node in zip(boxes, cluster.nodes, strict=True)
    )
    moved = sum(moved_bytes(graph, d, cluster.link) for d in communication.deliveries if d.tensor in op.outputs)
    return computing + moved / (len(cluster.nodes) * cluster.link.bytes_per_second)


# -- choosing ---------------------------------------------------------------------------------------------------------


def economize(
    books: Books, start: Again, goal_bytes: np.ndarray, *, free_seconds: float, thorough: bool = True
) -> Played:
    """A choice that holds `start`. If that is within the goals (the most that may be live, per device), the one with
    the smallest peak of those that take at most `free_seconds` more; else the fastest that is found within the goals;
    else the one with the smallest peak of all, which is looked for only if `thorough`, as more is."""

    def need(found: Played) -> float:
        return float((found.peak_bytes / goal_bytes).max())

    plain = books.play(start, goal_bytes)
    if plain.excess == 0:
        most = plain.seconds + free_seconds
        found = [f for f in _shrinking(books, plain, goal_bytes, need, (), most) if f.seconds <= most]
        best = min([plain, *found], key=lambda found: (round(need(found) / need(plain), 2), found.seconds))
        return _pruned(books, best, start, best.peak_bytes)
    found = _alternatives(books, plain, goal_bytes, SEGMENTS if thorough else SEGMENTS[1::3])
    if min(map(need, found)) > 1 and thorough:
        found = list(_shrinking(books, plain, goal_bytes, need))  # what misses one goal may lie within another
        found = [_flattened(books, each, start, need) for each in sorted(found, key=need)[:FLATTENED]]
    fitting = [each for each in found if need(each) <= 1]
    if not fitting:
        least = min(found, key=need)
        return _pruned(books, least, start, least.peak_bytes)
    fastest = sorted(fitting, key=lambda found: found.seconds)[: PRUNED if thorough else 1]
    return min((_pruned(books, each, start, goal_bytes) for each in fastest), key=lambda found: found.seconds)


def _shrinking(
    books: Books,
    plain: Played,
    goal_bytes: np.ndarray,
    need: Callable[[Played], float],
    numbers: Sequence[int] = SEGMENTS,
    most_seconds: float = float("inf"),
) -> Iterator[Played]:
    """Choices for smaller and smaller goals, until that leads nowhere, or to what takes too long."""
    smallest, misses, part = need(plain), 0, need(plain)
    yield plain
    while misses < MISSES:
        part *= SHRINK
        goal = goal_bytes * part
        found = _alternatives(books, books.play(plain.again, goal), goal, numbers)
        yield from found
        if min(each.seconds for each in found) > most_seconds:
            break
        least = min(map(need, found))
        misses = 0 if least < smallest else misses + 1
        smallest = min(smallest, least)


def _flattened(books: Books, now: Played, start: Again, need: Callable[[Played], float]) -> Played:
    """Change one tensor after the other, as long as the largest peak falls."""
    goal_bytes, candidates = now.peak_bytes, books.candidates(now.peak_bytes)
    while True:
        changes = [books.play((now.again ^ {name}) | start, goal_bytes) for name in candidates]
        best = min(changes, key=need, default=now)
        if need(best) >= need(now):
            return now
        now = best


def _alternatives(
    books: Books, plain: Played, goal_bytes: np.ndarray, numbers: Sequence[int] = SEGMENTS
) -> list[Played]:
    candidates = books.candidates(plain.peak_bytes)
    found = [_climbed(books, plain, candidates, goal_bytes, start=plain.again)]
    for segments in numbers:
        if segments < len(candidates):
            kept = {candidates[i * len(candidates) // segments] for i in range(segments)}
            spaced = books.play(plain.again | (set(candidates) - kept), goal_bytes)
            found.append(_climbed(books, spaced, candidates, goal_bytes, start=plain.again))
    return found


def _climbed(books: Books, now: Played, candidates: Sequence[str], goal_bytes: np.ndarray, *, start: Again) -> Played:
    """Add greedily, take out again what by now only adds to the excess (a pool whose input is computed again anyway),
    and so on, as long as the excess falls."""
    now = _greedy(books, now, candidates, goal_bytes)
    while now.excess > 0:
        without = [books.play(now.again - {name}, goal_bytes) for name in sorted(now.again - start)]
        least = min(without, key=lambda found: found.excess, default=now)
        if least.excess >= now.excess:
            break
        now = _greedy(books, least, candidates, goal_bytes)
    return now


def _greedy(books: Books, plain: Played, candidates: Sequence[str], goal_bytes: np.ndarray) -> Played:
    """Add the tensor that saves most excess per second, until there is no excess or nothing helps. Savings are looked
    up anew only for the tensor that seems best (lazy greedy: Minoux, 1978)."""
    now = plain

    def value(name: str) -> tuple[float, Played]:
        tried = books.play(now.again | {name}, goal_bytes)
        return (now.excess - tried.excess) / max(tried.seconds - now.seconds, 1e-9), tried

    queue = [(-value(name)[0], name) for name in candidates if name not in now.again]
    heapq.heapify(queue)
    skipped: list[str] = []
    while queue and now.excess > 0:
        _, name = heapq.heappop(queue)
        worth, tried = value(name)
        if queue and worth < -queue[0][0]:
            if worth > 0:
                heapq.heappush(queue, (-worth, name))
            else:
                skipped.append(name)  # another choice may make it useful
        elif worth > 0:
            now = tried
            for other in skipped:
                heapq.heappush(queue, (-value(other)[0], other))
            skipped.clear()
    return now


def _pruned(books: Books, found: Played, start: Again, goal_bytes: np.ndarray) -> Played:
    """Without what is not needed, and with other tensors instead where these take less time."""
    candidates = books.candidates(found.peak_bytes)

    def taking(name: str) -> tuple[float, str]:
        return -books.play(start | {name}, goal_bytes).seconds, name

    found = books.play(found.again, goal_bytes)
    for number, name in enumerate(sorted(found.again - start, key=taking)):
        without = books.play(found.again - {name}, goal_bytes)
        if without.excess > 0 and number < EXCHANGED:
            without = _greedy(books, without, [other for other in candidates if other != name], goal_bytes)
        if without.excess == 0 and without.seconds <= found.seconds:
            found = without
    return found
