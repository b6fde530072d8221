"""Training steps: the batches of each, and what their losses say of the run."""

from __future__ import annotations

import math

import numpy as np

from fusetile.errors import FusetileError
from fusetile.program import Program
from fusetile.rates import Rates
from fusetile.runtime.data import Feeder
from fusetile.runtime.executor import Executor, Snapshot
from fusetile.runtime.native import Library
from fusetile.runtime.transport import Transport


class Training:
    """A program's training steps, of `total`. All batches of a step but the last run the routine `micro`."""

    def __init__(
        self,
        program: Program,
        data: Feeder,
        *,
        library: Library,
        arena: np.ndarray,
        transport: Transport | None,
        total: int,
    ) -> None:
        self._data, self._arena, self._batches, self._total = data, arena, program.accumulate, total
        self._micro = program.micro
        self._last = Executor(program, library=library, arena=arena, transport=transport)
        if program.micro is not None:
            self._first = Executor(program, program.micro, library=library, arena=arena, transport=transport)
        self.samples = program.batch * program.accumulate  # of a step

    def step(self, number: int, snapshot: Snapshot | None = None) -> float | None:
        """Training step `number` (from 1): the mean loss of its batches, if this device has them. For `snapshot` see
        `Executor.run`."""
        losses = []
        for batch in range((number - 1) * self._batches + 1, number * self._batches):
            self._data.fill(self._arena, batch, total=self._total, routine=self._micro)
            losses.append(self._first.run(number))
        self._data.fill(self._arena, number * self._batches, total=self._total)
        losses.append(self._last.run(number, snapshot=snapshot))
        there = [loss for loss in losses if loss is not None]
        return sum(there) / len(there) if there else None


class Losses:
    """Watches the losses of a run, which has `total` steps."""

    def __init__(self, rates: Rates, total: int) -> None:
        self._rates, self._total, self._last = rates, total, "there was none before"

    def failure(self, step: int, loss: float | None) -> FusetileError | None:
        """What a loss that is no number means: nothing good can follow."""
        if loss is not None and not math.isfinite(loss):
            rate = self._rates.rate(step, self._total)
            return FusetileError(
                f"the loss of step {step} is {loss} ({self._last}), with a learning rate of {rate:.3g}: lower --lr, or "
                "give --clip-norm or --warmup; if it is so from the start, look for NaN or huge numbers in the data"
            )
        if loss is not None:
            self._last = f"that of step {step} was {loss:.6g}"
        return None
