"""Give every buffer of a device its offset in one arena: buffers that are never live together share memory.

    y1 live 0..5, y2 live 3..9, y3 live 6..12         offsets y1 0, y2 4096, y3 0

A buffer is live from the first step that touches it to the last: a receive from when it is posted, a send until it is
awaited. Parameters are live always, fed buffers from the start. Largest buffers are placed first, each at the lowest
offset where it fits (greedy by size: Pisarchyk and Lee, arXiv 2001.03288). That leaves gaps, of up to a tenth in deep
networks; with more `rounds` the buffer that reaches highest is placed first the next time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

import numpy as np

from fusetile.program import ALIGNMENT_bytes, Buffer


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Offsets and sizes in bytes by buffer, and the size of the arena. `live` holds (first, last) step by buffer."""

    offsets: dict[str, int]
    sizes_bytes: dict[str, int]
    arena_bytes: int
    live: dict[str, tuple[int, int]]
    redzone_bytes: int = 0  # that lie before and behind every buffer
    peak_step: int = 0  # at which most is live
    peak_bytes: int = 0  # no arena can be smaller


ROUNDS = 50
SMALL_part = 1 / 300  # of the peak: where smaller buffers lie matters little


def plan_memory(
    buffers: Iterable[Buffer],
    live: dict[str, tuple[int, int]],
    *,
    redzone_bytes: int = 0,
    fixed: Mapping[str, int] = MappingProxyType({}),
    rounds: int = 1,
) -> MemoryPlan:
    """`live[name]`: the inclusive interval of steps in which a buffer must keep its content. Redzones live as long.
    `fixed`: offsets of buffers that lie somewhere already."""
    sizes = {b.name: _round_up(b.size_bytes) + 2 * redzone_bytes for b in buffers if b.name in live}
    start = {name: offset - redzone_bytes for name, offset in fixed.items()}
    step, most = _peak(sizes, live)
    order = sorted(sizes.keys() - fixed, key=lambda name: (-sizes[name], live[name], name))
    orders = [order]
    if rounds > 1:
        large = [name for name in order if sizes[name] > most * SMALL_part]
        orders.append(_packed(large, start, sizes, live, rounds) + order[len(large) :])
    offsets = min((_placed(each, start, sizes, live) for each in orders), key=lambda offsets: _end(offsets, sizes))
    arena_bytes = _end(offsets, sizes)
    offsets = {name: offset + redzone_bytes for name, offset in offsets.items()}
    return MemoryPlan(offsets, sizes, arena_bytes, live, redzone_bytes, step, most)


def _placed(
    order: Sequence[str], fixed: Mapping[str, int], sizes: Mapping[str, int], live: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """Each buffer at the lowest offset where it fits beside those before it."""
    names = [*fixed, *order]
    first, last = np.array([live[name] for name in names], np.int64).reshape(-1, 2).T
    size = np.array([sizes[name] for name in names], np.int64)
    offset = np.zeros(len(names), np.int64)
    offset[: len(fixed)] = list(fixed.values())
    for i in range(len(fixed), len(names)):
        beside = np.flatnonzero((first[:i] <= last[i]) & (first[i] <= last[:i]))
        beside = beside[np.argsort(offset[beside], kind="stable")]
        top = np.maximum.accumulate(np.append(0, offset[beside] + size[beside]))  # of those up to each, in order
        gaps = np.flatnonzero(top[:-1] + size[i] <= offset[beside])
        offset[i] = top[gaps[0]] if len(gaps) else top[-1]
    return dict(zip(names, offset.tolist(), strict=True))


def _packed(
    order: Sequence[str],
    fixed: Mapping[str, int],
    sizes: Mapping[str, int],
    live: Mapping[str, tuple[int, int]],
    rounds: int,
) -> list[str]:
    """The best order of several."""
    tried, best, least = list(order), list(order), None
    for _ in range(rounds if order else 0):
        offsets = _placed(tried, fixed, sizes, live)
        end = _end(offsets, sizes)
        if least is None or end < least:
            best, least = list(tried), end
        top = max(tried, key=lambda name: offsets[name] + sizes[name])
        tried.remove(top)
        tried.insert(0, top)
    return best


def _end(offsets: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    return max((offset + sizes[name] for name, offset in offsets.items()), default=0)


def _peak(sizes: dict[str, int], live: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """The step at which most is live, and how much."""
    change: Counter[int] = Counter()
    for name, size in sizes.items():
        change[live[name][0]] += size
        change[live[name][1] + 1] -= size
    steps = sorted(change)
    most, step = max(zip(accumulate(change[step] for step in steps), steps, strict=True), default=(0, 0))
    return step, most


def _round_up(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_bytes) * ALIGNMENT_bytes
