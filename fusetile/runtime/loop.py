"""The steps of a run, one after the other, and what comes between them: validations, checkpoints, the ends."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusetile.program import Program
from fusetile.runtime import checkpoint
from fusetile.runtime.executor import Snapshot
from fusetile.runtime.files import atomic_write
from fusetile.runtime.follow import Follower
from fusetile.runtime.options import Options
from fusetile.runtime.progress import Progress, StepRecord
from fusetile.runtime.rendezvous import LOWEST
from fusetile.runtime.training import Losses, Training
from fusetile.runtime.transport import Transport
from fusetile.runtime.validation import History, Validation


@dataclass(frozen=True, slots=True)
class End:
    """After the last step: why it was the last, if not as planned; the gradients of it, if they are wanted."""

    step: int
    history: History
    snapshot: Snapshot
    reason: str


class Loop:
    """Steps up to `total`, a validation after every `every` of them. `terms`: what a checkpoint is to hold of the
    run. `bests`: the steps whose weights are the best by the checkpoints that are there."""

    def __init__(
        self,
        options: Options,
        program: Program,
        training: Training,
        validation: Validation | None,
        *,
        arena: np.ndarray,
        progress: Progress,
        transport: Transport | None,
        terms: Mapping[str, Any],
        total: int,
        every: int,
        gradients: bool,
        bests: Iterable[int],
        follower: Follower | None,
    ) -> None:
        self._options, self._program, self._arena = options, program, arena
        self._training, self._validation = training, validation
        self._progress, self._transport, self._follower = progress, transport, follower
        self._terms, self._total, self._every, self._gradients = terms, total, every, gradients
        self._losses = Losses(program.rates, total)
        self._bests = deque(bests, checkpoint.KEPT)

    def run(self, start: int, history: History) -> End:
        """The steps that follow `start`. Raises FusetileError for a loss that is no number."""
        step, snapshot, reason = start, Snapshot(), self._reason(history)
        while step < self._total and not reason:
            step += 1
            snapshot.clear()
            record = self._step(step, snapshot)
            if self._validates(step):
                history, record = self._validated(record, history)
            stopped = self._options.followed and not self._goes_on(record)
            if stopped and self._validation is not None and not self._validates(step):  # as at any end
                history, record = self._validated(record, history)
            self._progress.step(record)
            if record.best:
                self._write(self._options.best, step, history)
            reason = "the program that follows wanted no more" if stopped else self._reason(history)
            every = self._options.checkpoint_every
            if every and (step % every == 0 or step == self._total or reason):
                self._write(self._options.checkpoints, step, history)
        return End(step, history, snapshot, reason)

    def _step(self, step: int, snapshot: Snapshot) -> StepRecord:
        began = time.monotonic()
        last = step == self._total or self._options.followed or (self._validates(step) and self._options.patience)
        loss = self._training.step(step, snapshot if last and self._gradients else None)
        record = StepRecord(step, loss, time.monotonic() - began, self._training.samples)
        if (failure := self._losses.failure(step, loss)) is not None:
            self._progress.step(record)
            raise failure
        return record

    def _validated(self, record: StepRecord, history: History) -> tuple[History, StepRecord]:
        """After a step, with what the validation shows."""
        assert self._validation is not None
        history = self._validation.run(record.step, history)
        return history, replace(record, validation=history.values, best=history.best_step == record.step)

    def _validates(self, step: int) -> bool:
        return self._validation is not None and (step % self._every == 0 or step == self._total)

    def _reason(self, history: History) -> str:
        if self._options.patience and history.since >= self._options.patience:
            return f"no validation since step {history.best_step} was better"
        return ""

    def _goes_on(self, record: StepRecord) -> bool:
        """What the program that follows says; the lowest rank has a line to it, and tells the others."""
        if self._follower is None:
            assert self._transport is not None
            return bool(self._transport.ask([])["go"])
        follower = self._follower
        if self._transport is None:
            return follower.goes_on(record)
        return bool(self._transport.answer(lambda _: {"go": follower.goes_on(record)})["go"])

    def _write(self, folder: Path, step: int, history: History) -> None:
        """A checkpoint of this node; the lowest rank also puts the model there, for `fusetile export`."""
        program, model = self._program, self._options.bundle / "model.onnx"
        folder.mkdir(parents=True, exist_ok=True)
        shown = history.json() if history.best_step else None
        beside = self._bests if folder == self._options.best else None
        checkpoint.write(folder, program, self._arena, step=step, run=self._terms, validation=shown, beside=beside)
        if beside is None:
            self._bests.append(history.best_step)
        if program.rank == LOWEST and model.is_file() and not (folder / model.name).exists():
            with model.open("rb") as source:
                atomic_write(folder / model.name, partial(shutil.copyfileobj, source))
