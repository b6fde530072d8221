"""A program that follows a run: it sees every step, and says whether there is to be another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress

from fusetile.errors import FusetileError
from fusetile.runtime.progress import StepRecord

GO, STOP = "go\n", "stop\n"


class Follower:
    """The run's end. `incoming` and `outgoing` are file descriptors."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._incoming = os.fdopen(incoming, encoding="utf-8")
        self._outgoing = os.fdopen(outgoing, "w", encoding="utf-8")

    def goes_on(self, record: StepRecord) -> bool:
        """Show a step; whether another one is wanted. Raises FusetileError if nobody answers."""
        try:
            self._outgoing.write(record.json() + "\n")
            self._outgoing.flush()
            answer = self._incoming.readline()
        except BrokenPipeError:
            answer = ""
        if answer not in (GO, STOP):
            raise FusetileError("the program that followed this run has ended")
        return answer == GO


class Following:
    """The program's end: `on_step` is called with what each line says; it stops the run by returning False."""

    def __init__(self, incoming: int, outgoing: int, on_step: Callable[[StepRecord], object]) -> None:
        self.incoming, self._outgoing, self._on_step = incoming, outgoing, on_step
        self._text = b""

    def read(self) -> bool:
        """What has come; False at the end."""
        found = os.read(self.incoming, 1 << 16)
        *lines, self._text = (self._text + found).split(b"\n")
        for line in lines:
            stop = self._on_step(StepRecord.from_json(json.loads(line))) is False
            with suppress(BrokenPipeError):  # the node has ended: it says why itself
                os.write(self._outgoing, (STOP if stop else GO).encode())
        return bool(found)
