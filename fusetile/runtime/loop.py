"""The steps of a run, one after the other, and what comes between them: validations, checkpoints, the ends."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Mapping
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


@dataclass(slots=True, kw_only=True)
class Loop:
    """Steps up to `total`, a validation after every `every` of them. `terms`: what a checkpoint is to hold of the run.
    `gradients`: whether those of the last step are wanted. `bests`: the steps whose weights are the best by the
    checkpoints that are there."""

    options: Options
    program: Program
    training: Training
    validation: Validation | None
    arena: np.ndarray
    progress: Progress
    transport: Transport | None
    follower: Follower | None
    terms: Mapping[str, Any]
    total: int
    every: int
    gradients: bool
    bests: deque[int]

    def run(self, start: int, history: History) -> End:
        """The steps that follow `start`. Raises FusetileError for a loss that is no number."""
        step, snapshot, reason = start, Snapshot(), self._reason(history)
        losses = Losses(self.program.rates, self.total)
        while step < self.total and not reason:
            step += 1
            snapshot.clear()
            record = self._step(step, snapshot, losses)
            if self._validates(step):
                history, record = self._validated(record, history)
            stopped = self.options.followed and not self._goes_on(record)
            if stopped and self.validation is not None and not self._validates(step):  # as at any end
                history, record = self._validated(record, history)
            self.progress.step(record)
            if record.best:
                self._write(self.options.best, step, history)
            reason = "the program that follows wanted no more" if stopped else self._reason(history)
            every = self.options.checkpoint_every
            if every and (step % every == 0 or step == self.total or reason):
                self._write(self.options.checkpoints, step, history)
        return End(step, history, snapshot, reason)

    def _step(self, step: int, snapshot: Snapshot, losses: Losses) -> StepRecord:
        began = time.monotonic()
        last = step == self.total or self.options.followed or (self._validates(step) and self.options.patience)
        loss = self.training.step(step, snapshot if last and self.gradients else None)
        record = StepRecord(step, loss, time.monotonic() - began, self.training.samples)
        if (failure := losses.failure(step, loss)) is not None:
            self.progress.step(record)
            raise failure
        return record

    def _validated(self, record: StepRecord, history: History) -> tuple[History, StepRecord]:
        """After a step, with what the validation shows."""
        assert self.validation is not None
        history = self.validation.run(record.step, history)
        return history, replace(record, validation=history.values, best=history.best_step == record.step)

    def _validates(self, step: int) -> bool:
        return self.validation is not None and (step % self.every == 0 or step == self.total)

    def _reason(self, history: History) -> str:
        if self.options.patience and history.since >= self.options.patience:
            return f"no validation since step {history.best_step} was better"
        return ""

    def _goes_on(self, record: StepRecord) -> bool:
        """What the program that follows says; the lowest rank has a line to it, and tells the others."""
        if self.follower is None:
            assert self.transport is not None
            return bool(self.transport.ask([])["go"])
        follower = self.follower
        if self.transport is None:
            return follower.goes_on(record)
        return bool(self.transport.answer(lambda _: {"go": follower.goes_on(record)})["go"])

    def _write(self, folder: Path, step: int, history: History) -> None:
        """A checkpoint of this node; the lowest rank also puts the model there, for `fusetile export`."""
        program, model = self.program, self.options.bundle / "model.onnx"
        folder.mkdir(parents=True, exist_ok=True)
        shown = history.json() if history.best_step else None
        beside = self.bests if folder == self.options.best else None
        checkpoint.write(folder, program, self.arena, step=step, run=self.terms, validation=shown, beside=beside)
        if beside is None:
            self.bests.append(history.best_step)
        if program.rank == LOWEST and model.is_file() and not (folder / model.name).exists():
            with model.open("rb") as source:
                atomic_write(folder / model.name, partial(shutil.copyfileobj, source))
