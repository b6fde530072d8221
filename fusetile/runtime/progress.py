"""What a run shows and logs: a progress bar or lines on the lowest rank, and one JSON object per step."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from fusetile.errors import FusetileError, UserError

_LINE_every_seconds = 5.0


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One training step; `loss` is None on a device that does not have it. `validation`: the loss and the metrics of
    held-back data after it, if they were computed; `best` says whether they are the best so far."""

    step: int
    loss: float | None
    seconds: float
    samples: int
    validation: Mapping[str, float] = field(default_factory=dict)
    best: bool = False

    def json(self) -> str:
        """One line of the log. What is no number is null."""
        shown = {"step": self.step, "loss": self.loss, "seconds": round(self.seconds, 6), "samples": self.samples}
        shown |= {f"val_{name}": value for name, value in self.validation.items()}
        shown |= {"best": True} if self.best else {}
        return json.dumps(
            {key: value if value is not None and math.isfinite(value) else None for key, value in shown.items()}
        )

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> StepRecord:
        """What a line of the log says."""
        shown = {key.removeprefix("val_"): value for key, value in found.items() if key.startswith("val_")}
        values = {key: math.nan if value is None else value for key, value in shown.items()}
        return cls(found["step"], found["loss"], found["seconds"], found["samples"], values, bool(found.get("best")))

    def text(self, total: int) -> str:
        """One line for people."""
        loss = "" if self.loss is None else f"loss {self.loss:.4f}  "
        rate = self.samples / max(self.seconds, 1e-9)
        line = f"step {self.step}/{total}  {loss}{self.seconds:.3g} s/step  {rate:.4g} samples/s"
        if not self.validation:
            return line
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.validation.items())
        return f"{line}  validation: {shown}{' (best)' if self.best else ''}"


class Progress:
    """Shows the steps of a run. A context manager; `show=False` prints nothing, `log` is the file for every step."""

    def __init__(self, total: int, *, show: bool, log: Path | None) -> None:
        self._total, self._show = total, show
        self._stack = ExitStack()
        self._file = None
        self._bar = _bar(total) if show and sys.stdout.isatty() else None
        self._printed_at = -math.inf
        if log is not None:
            try:
                self._file = self._stack.enter_context(log.open("w", encoding="utf-8"))
            except OSError as error:
                raise UserError(f"can't write the log {log}: {error.strerror}") from error

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def step(self, record: StepRecord) -> None:
        """A step is done."""
        if self._file is not None:
            try:
                self._file.write(record.json() + "\n")
                self._file.flush()
            except OSError as error:
                with suppress(OSError):  # it would try to write the rest
                    self._file.close()
                raise FusetileError(f"can't write the log {self._file.name}: {error.strerror}") from error
        if self._bar is not None:
            if not self._bar.live.is_started:
                self._stack.enter_context(self._bar)
            if record.validation:
                self._bar.console.print(record.text(self._total), markup=False, highlight=False, soft_wrap=True)
            short = replace(record, validation={}).text(self._total)
            self._bar.update(self._bar.task_ids[0], completed=record.step, text=short)
            if record.step == self._total:
                self._bar.stop()  # what is printed afterwards comes below it
        elif self._show:
            now = time.monotonic()
            due = record.step in (1, self._total) or now - self._printed_at >= _LINE_every_seconds
            if due or record.validation:
                self._printed_at = now
                print(record.text(self._total), flush=True)


def _bar(total: int) -> Any:
    """A rich progress bar, or None where rich is not installed."""
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    bar = Progress(BarColumn(), TextColumn("{task.fields[text]}"), TextColumn("left:"), TimeRemainingColumn())
    bar.add_task("training", total=total, text=f"step 0/{total}")
    return bar
