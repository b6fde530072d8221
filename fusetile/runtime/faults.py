"""How a run ends before its time: what this node says, and what it tells the others."""

from __future__ import annotations

import signal
from typing import Any

from fusetile.errors import FusetileError, PeerFailure, ProtocolError
from fusetile.program import Program
from fusetile.runtime.wire import Frame, Kind, encode_json

_REASON_characters = 1000


class Stopped(FusetileError):
    """The user stopped this node with Ctrl-C or SIGTERM."""

    def __init__(self, number: int, step: int | None = None) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}" + (f" at step {step}" if step is not None else ""))
        self.exit_status = 128 + number


def node(program: Program, rank: int, name: str) -> str:
    """`node 'b' (rank 1, 10.0.0.2:7000)`."""
    return f"node {name!r} (rank {rank}, {program.addresses[rank]})"


def this_node(program: Program) -> str:
    """The same for the device that runs this."""
    return node(program, program.rank, program.name)


def reason_of(program: Program, error: BaseException, step: int) -> str:
    """What the others are told about an error of this node's own. An error about a peer is told as it is."""
    if isinstance(error, Stopped):
        return f"{this_node(program)} was stopped by its user at step {step}"
    if isinstance(error, PeerFailure):
        return str(error)
    return f"{this_node(program)} failed at step {step}: {error or type(error).__name__}"


def abort_frame(reason: str) -> bytes:
    """The frame that ends the run of whoever gets it."""
    return encode_json(Kind.ABORT, {"reason": reason[:_REASON_characters]})


def reason_in(frame: Frame) -> str:
    """The reason in an ABORT frame."""
    reason: Any = frame.json().get("reason")
    if not isinstance(reason, str):
        raise ProtocolError("an ABORT frame without a reason")
    return reason
