"""Runs a routine of a program: its steps, once per batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from fusetile.errors import PlanError
from fusetile.program import Gradient, Program, Recv, Routine, Run, Send, Step, Wait
from fusetile.runtime.guard import Guard
from fusetile.runtime.native import Library, Segment
from fusetile.runtime.storage import Place, unpack
from fusetile.runtime.transport import Transport

Snapshot = list[tuple[Gradient, np.ndarray]]


class Executor:
    """A routine made ready to run, by default the training step: `transport` is None on a single device."""

    def __init__(
        self,
        program: Program,
        routine: Routine | None = None,
        *,
        library: Library,
        arena: np.ndarray,
        transport: Transport | None,
    ) -> None:
        routine = routine or program.training
        self._program, self._arena, self._transport = program, arena, transport
        self._library = library
        self._posted: set[int] = set()
        self._loss = Place(arena, routine.loss, routine.loss.box) if routine.loss is not None else None
        self._guard = Guard(routine, arena) if routine.zones else None
        self._actions = [self._guarded(self._action(step), index) for index, step in enumerate(routine.steps)]

    def run(self, number: int, *, snapshot: Snapshot | None = None) -> float | None:
        """A batch of training step `number` (from 1); its loss, if this device has it. The feeds must be in place. With
        `snapshot`, of a training step, the gradients that this device holds are appended to it as canonical arrays."""
        transport = self._transport
        if transport is not None:
            transport.begin_turn(number)
        if self._guard is not None:
            self._guard.begin_step()
        pieces = self._gradients() if snapshot is not None else {}
        for index, action in enumerate(self._actions):
            if index in pieces and snapshot is not None:
                self._run_in_parts(action, pieces[index], snapshot)
            else:
                action()
            if transport is not None:
                transport.count()
                transport.check()
        if transport is not None:
            transport.finish(self._posted)
        return None if self._loss is None else self._loss.read().item()

    def _guarded(self, action: Callable[[], None], index: int) -> Callable[[], None]:
        return action if self._guard is None else self._guard.around(action, index)

    def _action(self, step: Step) -> Callable[[], None]:
        if isinstance(step, Run):
            return self._library.segment(step.calls, self._arena)
        if self._transport is None:
            raise PlanError(f"a program for one device has the step {step}")
        if isinstance(step, Wait):
            if unknown := set(step.tags) - self._posted:
                raise PlanError(f"a step waits for the transfers {sorted(unknown)} before they are posted")
            return partial(self._transport.wait, frozenset(step.tags))
        if not 0 <= step.offset_bytes < step.offset_bytes + step.size_bytes <= self._arena.size:
            raise PlanError(f"transfer {step.tag} is outside the arena of {self._arena.size} bytes, or empty")
        self._posted.add(step.tag)
        view = self._arena.data[step.offset_bytes : step.offset_bytes + step.size_bytes]
        if isinstance(step, Send):
            return partial(self._transport.send, step.peer, step.tag, view, step.priority)
        assert isinstance(step, Recv)
        return partial(self._transport.recv, step.peer, step.tag, view)

    def _gradients(self) -> dict[int, list[Gradient]]:
        pieces: dict[int, list[Gradient]] = {}
        for gradient in sorted(self._program.gradients, key=lambda gradient: gradient.call):
            if gradient.step >= len(self._actions):
                raise PlanError(
                    f"the gradient of {gradient.parameter!r} is to be read in step {gradient.step}, too late"
                )
            pieces.setdefault(gradient.step, []).append(gradient)
        return pieces

    def _run_in_parts(self, action: Callable[[], None], gradients: list[Gradient], snapshot: Snapshot) -> None:
        """Run a step and stop before the calls that will overwrite a gradient, to copy it."""
        done = 0
        for gradient in gradients:
            if isinstance(action, Segment):
                action(done, gradient.call)
                done = gradient.call
            snapshot.append((gradient, gradient_values(self._arena, gradient)))
        if isinstance(action, Segment):
            action(done)
        else:
            action()


def gradient_values(arena: np.ndarray, gradient: Gradient) -> np.ndarray:
    """A gradient as a canonical array, at the moment at which it is there."""
    if gradient.factor is None:
        return unpack(arena, gradient.buffer, gradient.box)
    rows, columns = gradient.box
    batch = gradient.buffer.box[0]
    dy, x = unpack(arena, gradient.buffer, (batch, rows)), unpack(arena, gradient.factor, (batch, columns))
    return dy.T @ x
