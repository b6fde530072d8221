"""The kernel library of a device: loaded with ctypes, called once per segment. The C side is codegen's segment.c."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from fusetile.errors import PlanError, UserError
from fusetile.program import Call
from fusetile.runtime.abi import check_runs

_POINTERS, _INTS, _FLOATS = 10, 40, 6


class _Call(ctypes.Structure):
    """struct ft_call."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("split", ctypes.c_int32),
        ("workers", ctypes.c_int32),
        ("pointers", ctypes.c_void_p * _POINTERS),
        ("ints", ctypes.c_int32 * _INTS),
        ("floats", ctypes.c_float * _FLOATS),
    )


class Segment:
    """Calls ready to run: one contiguous array, whose parts can be run as well."""

    def __init__(self, run: ctypes._NamedFuncPointer, calls: ctypes.Array[_Call]) -> None:
        self._run = run
        self.calls = calls  # as the C side sees them
        self.size = len(calls)

    def __call__(self, start: int = 0, stop: int | None = None) -> None:
        """Run calls [start, stop), without the GIL."""
        stop = self.size if stop is None else stop
        if start < stop:
            self._run(ctypes.byref(self.calls, start * ctypes.sizeof(_Call)), stop - start)


class Library:
    """A loaded library whose threads are running. Use it in a `with` statement: leaving it ends the threads."""

    def __init__(self, path: Path, *, threads: int) -> None:
        try:
            check_runs(path)
            self._library = ctypes.CDLL(str(path.resolve()))
            self._start, self._run, self._stop = (
                getattr(self._library, f"ft_{verb}") for verb in ("start", "run", "stop")
            )
        except (OSError, AttributeError) as error:
            raise UserError(
                f"can't load the kernels {path}: {error}; was the bundle made for this device, and copied whole?"
            ) from error
        self.path = path
        self._start.argtypes, self._start.restype = (ctypes.c_int32,), ctypes.c_int
        self._run.argtypes, self._run.restype = (ctypes.c_void_p, ctypes.c_int32), None
        self._stop.argtypes, self._stop.restype = (), None
        if status := self._start(threads):
            raise UserError(f"can't start {threads} threads: {os.strerror(status)}; try a smaller --threads")

    def __enter__(self) -> Library:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def segment(self, calls: Sequence[Call], arena: np.ndarray) -> Segment:
        """Convert the calls of a Run step once and for all. The arena must outlive the segment."""
        array = (_Call * len(calls))()
        for target, call in zip(array, calls, strict=True):
            self._fill(target, call, arena)
        return Segment(self._run, array)

    def _fill(self, target: _Call, call: Call, arena: np.ndarray) -> None:
        if len(call.pointers) > _POINTERS or len(call.ints) > _INTS or len(call.floats) > _FLOATS:
            raise PlanError(f"kernel {call.kernel} has more arguments than a call can hold")
        end = (
            arena.size if call.split else arena.size + 1
        )  # a call without work may point to an empty buffer at the end
        if any(not 0 <= offset < end for offset in call.pointers):
            raise PlanError(f"kernel {call.kernel} points outside the arena of {arena.size} bytes: {call.pointers}")
        if any(not -(2**31) <= value < 2**31 for value in (*call.ints, call.split)):
            raise PlanError(f"kernel {call.kernel} has an argument beyond 32 bits: {call.ints}")
        try:
            target.kernel = ctypes.cast(getattr(self._library, call.kernel), ctypes.c_void_p).value
        except AttributeError as error:
            raise UserError(
                f"{self.path} has no kernel {call.kernel}: copy the bundle again, or compile again"
            ) from error
        target.split, target.workers = call.split, call.workers
        target.pointers[: len(call.pointers)] = [arena.ctypes.data + offset for offset in call.pointers]
        target.ints[: len(call.ints)] = call.ints
        target.floats[: len(call.floats)] = call.floats
