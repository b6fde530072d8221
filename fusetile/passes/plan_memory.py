"""Give every buffer of a device its offset in one arena: buffers that are never live together share memory.

    y1 live 0..5, y2 live 3..9, y3 live 6..12         offsets y1 0, y2 4096, y3 0

A buffer is live from the first step that touches it to the last: a receive from when it is posted, a send until it is
awaited. Parameters are live always, fed buffers from the start. Largest buffers are placed first, each at the lowest
offset where it fits (greedy by size: Pisarchyk and Lee, arXiv 2001.03288).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

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


def plan_memory(
    buffers: Iterable[Buffer],
    live: dict[str, tuple[int, int]],
    *,
    redzone_bytes: int = 0,
    fixed: Mapping[str, int] = MappingProxyType({}),
) -> MemoryPlan:
    """`live[name]`: the inclusive interval of steps in which a buffer must keep its content. Redzones live as long.
    `fixed`: offsets of buffers that lie somewhere already."""
    sizes = {b.name: _round_up(b.size_bytes) + 2 * redzone_bytes for b in buffers if b.name in live}
    offsets = {name: offset - redzone_bytes for name, offset in fixed.items()}
    for name in sorted(sizes.keys() - fixed, key=lambda name: (-sizes[name], live[name], name)):
        start, stop = live[name]
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if live[other][0] <= stop and start <= live[other][1]
        )
        offset = 0
        for low, high in taken:
            if offset + sizes[name] <= low:
                break
            offset = max(offset, high)
        offsets[name] = offset
    arena_bytes = max((offsets[name] + sizes[name] for name in offsets), default=0)
    offsets = {name: offset + redzone_bytes for name, offset in offsets.items()}
    return MemoryPlan(offsets, sizes, arena_bytes, live, redzone_bytes, *_peak(sizes, live))


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
