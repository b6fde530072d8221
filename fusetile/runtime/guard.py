"""The debug mode of the arena: every buffer lies between redzones, and what is not live is NaN.

    ...NaN | redzone | y: live 3..9 | redzone | NaN...

Redzones, and buffers before and after their life, are filled with 0xFF bytes, which are NaN in every floating-point
type: what reads outside of a buffer, or a buffer too early or too late, makes NaN of the results. What writes outside
is found after each kernel call, when the redzones of all live buffers are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from fusetile.errors import PlanError
from fusetile.program import REDZONE_bytes, Routine, Run, Zone
from fusetile.runtime.native import Segment

_FILL = 0xFF
_REDZONE = bytes([_FILL]) * REDZONE_bytes
_ALWAYS = (-1, 0)  # when what a step begins with is used first

Moment = tuple[int, int]


class Guard:
    """Watches the arena in a routine of a program that was compiled with --guard. The arena must hold the parameters
    already."""

    def __init__(self, routine: Routine, arena: np.ndarray) -> None:
        self._routine, self._arena = routine, arena
        self._starts: dict[Moment, list[Zone]] = {}
        self._ends: dict[Moment, list[Zone]] = {}
        self._live: dict[str, Zone] = {}
        start = 0
        for zone in sorted(routine.zones, key=lambda zone: zone.offset_bytes):
            self._starts.setdefault(zone.first, []).append(zone)
            self._ends.setdefault(zone.last, []).append(zone)
            if zone.first == _ALWAYS:
                arena[start : zone.offset_bytes] = _FILL
                start = zone.offset_bytes + zone.size_bytes
        arena[start:] = _FILL

    def around(self, action: Callable[..., None], step: int) -> Callable[..., None]:
        """A step that is watched; a segment, after every call. Raises PlanError if it writes outside of a buffer."""
        if isinstance(action, Segment):
            return _GuardedSegment(action, lambda call, run: self._watch((step, call), run))
        return lambda: self._watch((step, 0), action)

    def begin_step(self) -> None:
        """The arena holds what a step begins with, and nothing else lives."""
        self._live = {zone.name: zone for zone in self._starts.get(_ALWAYS, ())}
        for zone in self._live.values():
            for low in _redzones(zone):
                self._arena[low : low + REDZONE_bytes] = _FILL

    def _watch(self, at: Moment, run: Callable[[], None]) -> None:
        for zone in self._starts.get(at, ()):
            self._live[zone.name] = zone
            self._arena[zone.offset_bytes - REDZONE_bytes : _end(zone) + REDZONE_bytes] = _FILL
        run()
        memory = self._arena.data
        for zone in self._live.values():
            for low in _redzones(zone):
                if memory[low : low + REDZONE_bytes] != _REDZONE:
                    raise PlanError(self._message(zone, low, at))
        for zone in self._ends.get(at, ()):
            self._arena[zone.offset_bytes : _end(zone)] = _FILL
            del self._live[zone.name]

    def _message(self, zone: Zone, low: int, at: Moment) -> str:
        changed = np.flatnonzero(self._arena[low : low + REDZONE_bytes] != _FILL) + low
        before, behind = zone.offset_bytes - changed[0], changed[-1] + 1 - _end(zone)
        where = f"up to {before} bytes before" if before > 0 else f"up to {behind} bytes behind"
        step = self._routine.steps[at[0]]
        what = f"kernel {step.calls[at[1]].kernel}" if isinstance(step, Run) else str(step)
        return f"{what} (step {at[0]}, call {at[1]}) wrote {where} the buffer {zone.name!r}"


def _end(zone: Zone) -> int:
    return zone.offset_bytes + zone.size_bytes


def _redzones(zone: Zone) -> tuple[int, int]:
    return (zone.offset_bytes - REDZONE_bytes, _end(zone))


class _GuardedSegment(Segment):
    """A segment that runs one call at a time, each by `watch(call, run)`."""

    def __init__(self, segment: Segment, watch: Callable[[int, Callable[[], None]], None]) -> None:
        self._segment, self._watch = segment, watch
        self.size = segment.size

    def __call__(self, start: int = 0, stop: int | None = None) -> None:
        for call in range(start, self.size if stop is None else stop):
            self._watch(call, partial(self._segment, call, call + 1))
