"""The meeting before training: connections come up, plans are compared, and all nodes start together.

Rank i listens on its address; higher ranks connect to lower ones and try again until it answers, because people start
devices by hand. Both sides say HELLO and check the other's. A node whose connections are all up tells the lowest rank
(READY) and which steps it can start from; the lowest rank tells everybody when all are (GO), and the last step that all
can start from. Only then do the deadlines for silence begin.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from fusetile.errors import PeerFailure, ProtocolError, UserError
from fusetile.program import Program
from fusetile.runtime.address import listen, resolve
from fusetile.runtime.faults import abort_frame, node, reason_in, reason_of, this_node
from fusetile.runtime.link import Link, part
from fusetile.runtime.wire import Frame, Kind, VersionMismatch, encode_json

LOWEST = 0  # the rank that gathers the result and prints progress
_RETRY_seconds = (0.05, 1.0)  # the first pause between attempts to connect; it doubles up to the last
_ATTEMPT_seconds = 5.0
_PARTING_seconds = 0.5


def partners(program: Program) -> list[int]:
    """The ranks that this node has a connection with: its peers, and everybody with the lowest rank and the source of
    the data."""
    hubs = {LOWEST, program.source} - {None}
    star = set(range(program.nodes)) if program.rank in hubs else hubs
    return sorted({rank for rank in (*program.peers, *star) if rank is not None} - {program.rank})


@dataclass(slots=True)
class _Dial:
    """Attempts to connect to one lower rank."""

    rank: int
    due: float = 0.0
    pause: float = _RETRY_seconds[0]
    attempt: socket.socket | None = None
    error: str = "no answer"


@dataclass(frozen=True, slots=True)
class Meeting:
    """What the meeting gave: a link per partner, and what the lowest rank asks of all: its HELLO's `wants`, and
    `start`, the step after which the training begins. `samples`: what every partner says of the samples, which it
    wants or, if it is the source, has."""

    links: dict[int, Link] = field(default_factory=dict)
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)
    wants: dict[str, Any] = field(default_factory=dict)


def meet(
    program: Program,
    *,
    run: Mapping[str, Any],
    wants: Mapping[str, Any],
    timeout: float,
    starts: Collection[int] = (0,),
    samples: Mapping[str, Any] = MappingProxyType({}),
) -> Meeting:
    """Connect to all partners and start together. `run` must be the same on all nodes; `wants` counts on the lowest
    rank only; `starts` are the steps after which this node can begin; `samples` is told to all.

    Raises UserError (port in use, other plan, other run), PeerFailure (who did not come in `timeout` s)."""
    rendezvous = _Rendezvous(program, run, wants, starts, timeout, samples)
    try:
        return rendezvous.meet()
    except BaseException as error:
        rendezvous.leave(error)
        raise
    finally:
        rendezvous.close()


class _Rendezvous:
    def __init__(
        self,
        program: Program,
        run: Mapping[str, Any],
        wants: Mapping[str, Any],
        starts: Collection[int],
        timeout: float,
        samples: Mapping[str, Any],
    ) -> None:
        self._program, self._run, self._timeout = program, dict(run), timeout
        self._starts = sorted(starts)  # on the lowest rank: those that all who are ready have
        self._partners = partners(program)
        self._selector = selectors.DefaultSelector()
        self._dials = {rank: _Dial(rank) for rank in self._partners if rank < program.rank}
        self._strangers: set[Link] = set()  # have not said HELLO yet
        self._meeting = Meeting(wants=dict(wants) if program.rank == LOWEST else {})
        self._ready: set[int] = set()
        self._started = self._told_ready = False
        self._hello = encode_json(
            Kind.HELLO,
            {
                "plan": program.plan_hash,
                "nodes": program.nodes,
                "rank": program.rank,
                "name": program.name,
                "run": self._run,
                "wants": dict(wants),
                "samples": dict(samples),
            },
        )

    def meet(self) -> Meeting:
        if any(rank > self._program.rank for rank in self._partners):
            listener = listen(self._program)
            self._watch(listener, lambda: self._accept(listener))
        end = time.monotonic() + self._timeout
        while not self._started:
            now = time.monotonic()
            if now >= end:
                raise PeerFailure(self._missing())
            self._dial_due(now)
            pause = min([end, *(dial.due for dial in self._dials.values())]) - now
            for key, _ in self._selector.select(max(0.0, pause)):
                key.data()
            self._advance()
        return self._meeting

    def leave(self, error: BaseException) -> None:
        """Tell those who are here why the run ends."""
        links = [*self._meeting.links.values(), *self._strangers]
        for link in links:
            link.control(abort_frame(reason_of(self._program, error, 0)))
        part(links, seconds=_PARTING_seconds)

    def close(self) -> None:
        kept = {link.socket for link in self._meeting.links.values()}
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket) and key.fileobj not in kept:
                key.fileobj.close()
        self._selector.close()

    def _watch(self, channel: socket.socket, call: Callable[[], None], events: int = selectors.EVENT_READ) -> None:
        channel.setblocking(False)
        self._selector.register(channel, events, call)

    # -- connections come up ----------------------------------------------------------------------------------------

    def _dial_due(self, now: float) -> None:
        for dial in [dial for dial in self._dials.values() if dial.due <= now]:
            if dial.attempt is not None:
                self._attempt_failed(dial, "no answer")
                continue
            try:
                family, kind, protocol, _, address = resolve(self._program.addresses[dial.rank])
                dial.attempt = socket.socket(family, kind, protocol)
                dial.attempt.setblocking(False)
                status = dial.attempt.connect_ex(address)
            except OSError as error:
                self._attempt_failed(dial, error.strerror or str(error))
                continue
            if status in (0, errno.EINPROGRESS):
                dial.due = now + _ATTEMPT_seconds
                self._watch(dial.attempt, partial(self._dialled, dial), selectors.EVENT_WRITE)
            else:
                self._attempt_failed(dial, os.strerror(status))

    def _attempt_failed(self, dial: _Dial, error: str) -> None:
        if dial.attempt is not None:
            self._forget(dial.attempt)
        dial.attempt, dial.error, dial.due = None, error, time.monotonic() + dial.pause
        dial.pause = min(2 * dial.pause, _RETRY_seconds[1])

    def _dialled(self, dial: _Dial) -> None:
        connection = dial.attempt
        assert connection is not None
        if status := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._attempt_failed(dial, os.strerror(status))
        elif connection.getsockname() == connection.getpeername():
            # Nobody listens there, and TCP has connected the socket to itself: its own port happened to be that one.
            self._attempt_failed(dial, "connection refused")
        else:
            self._selector.unregister(connection)
            del self._dials[dial.rank]
            self._greet(Link(connection, rank=dial.rank), dial)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, _ = listener.accept()
            self._greet(Link(connection), None)

    def _greet(self, link: Link, dial: _Dial | None) -> None:
        self._strangers.add(link)
        self._watch(link.socket, lambda: self._readable(link, dial))
        with contextlib.suppress(OSError):  # the reading side finds out
            link.socket.send(self._hello)

    def _forget(self, connection: socket.socket) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(connection)
        connection.close()

    # -- frames -----------------------------------------------------------------------------------------------------

    def _readable(self, link: Link, dial: _Dial | None) -> None:
        if link not in self._strangers and LOWEST not in (link.rank, self._program.rank):
            self._peek(link)
            return
        try:
            for frame in link.receive():
                self._handle(link, frame, dial)
                if self._started or link.socket.fileno() < 0:
                    return  # what follows is for the transport, or from a peer that was refused
        except (EOFError, OSError):
            self._gone(link, dial)
        except VersionMismatch:
            raise
        except ProtocolError as error:
            if link not in self._strangers:
                raise
            if dial is not None:
                address = self._program.addresses[dial.rank]
                raise UserError(f"what listens at {address} is not the node of rank {dial.rank}: {error}") from error
            self._strangers.discard(link)  # somebody else's connection: a browser, a port scanner
            self._forget(link.socket)

    def _peek(self, link: Link) -> None:
        """A peer that was told to start may be ahead: what it sends is for the transport. An end is an end."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            if link.socket.recv(1, socket.MSG_PEEK):
                self._selector.unregister(link.socket)
                return
        self._gone(link, None)

    def _gone(self, link: Link, dial: _Dial | None) -> None:
        if link not in self._strangers:
            raise PeerFailure(f"{node(self._program, link.rank, link.name)} went away before the training began")
        self._strangers.discard(link)
        self._forget(link.socket)
        if dial is not None:
            dial.attempt = None
            self._dials[dial.rank] = dial
            self._attempt_failed(dial, "it closed the connection")

    def _handle(self, link: Link, frame: Frame, dial: _Dial | None) -> None:
        if frame.kind == Kind.ABORT:
            raise PeerFailure(reason_in(frame))
        if link in self._strangers:
            if frame.kind != Kind.HELLO:
                raise ProtocolError(f"a {frame.kind.name} frame before HELLO")
            self._hear(link, frame.json(), dial)
        elif frame.kind == Kind.READY and self._program.rank == LOWEST:
            self._hear_ready(link, frame)
        elif frame.kind == Kind.GO and link.rank == LOWEST and self._told_ready:
            self._meeting.wants["start"] = _step(frame.json().get("start"))
            self._started = True
        else:
            raise ProtocolError(f"{link.name!r} sent a {frame.kind.name} frame before the training began")

    def _hear_ready(self, link: Link, frame: Frame) -> None:
        theirs = frame.json().get("starts")
        if not isinstance(theirs, list):
            raise ProtocolError(f"{link.name!r} is ready for {theirs!r}")
        common = sorted({*self._starts} & {_step(step) for step in theirs})
        if not common:
            mine = self._program
            raise UserError(
                f"node {mine.name!r} has checkpoints of steps {self._starts}, node {link.name!r} of {theirs}: there is "
                "none to resume from; start without --resume, or bring back the files"
            )
        self._starts = common
        self._ready.add(link.rank)

    def _hear(self, link: Link, hello: dict[str, Any], dial: _Dial | None) -> None:
        match hello:
            case {
                "plan": str(plan),
                "nodes": int(),
                "rank": int(rank),
                "name": str(name),
                "run": dict(),
                "wants": dict(),
                "samples": dict(samples),
            }:
                pass
            case _:
                raise ProtocolError("a HELLO that lacks something")
        mine = self._program
        if plan != mine.plan_hash or hello["nodes"] != mine.nodes or not 0 <= rank < mine.nodes:
            raise UserError(
                f"node {name!r} has a bundle of plan {plan} for {hello['nodes']} nodes, node {mine.name!r} one of plan "
                f"{mine.plan_hash} for {mine.nodes}: copy the bundles of one compilation to all devices"
            )
        if dial is not None and rank != dial.rank:
            raise UserError(
                f"at {mine.addresses[dial.rank]} runs {node(mine, rank, name)}, where the plan has rank {dial.rank}: "
                "start every bundle on the device that has its address"
            )
        if rank in self._meeting.links or rank not in self._partners or (dial is None and rank < mine.rank):
            self._refuse(link, f"{node(mine, rank, name)} is there already: is its bundle started twice?")
            return
        self._compare_runs(name, hello["run"])
        link.rank, link.name = rank, name
        self._strangers.discard(link)
        self._meeting.links[rank] = link
        self._meeting.samples[rank] = samples
        if rank == LOWEST:
            self._meeting.wants.update(hello["wants"])

    def _compare_runs(self, name: str, theirs: dict[str, Any]) -> None:
        for key in sorted({*theirs, *self._run}):
            if theirs.get(key) != self._run.get(key):
                raise UserError(
                    f"node {name!r} runs with {key} = {theirs.get(key)}, node {self._program.name!r} with {key} = "
                    f"{self._run.get(key)}: start all nodes with the same options and the same data"
                )

    def _refuse(self, link: Link, reason: str) -> None:
        self._selector.unregister(link.socket)
        link.control(abort_frame(reason))
        self._strangers.discard(link)
        part([link], seconds=_PARTING_seconds)

    # -- the start --------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """All connections are up: say so; on the lowest rank, start when all have said so."""
        if len(self._meeting.links) < len(self._partners):
            return
        if self._program.rank == LOWEST:
            if len(self._ready) == len(self._partners):
                start = self._meeting.wants["start"] = self._starts[-1]
                for link in self._meeting.links.values():
                    link.socket.send(encode_json(Kind.GO, {"start": start}))
                self._started = True
        elif not self._told_ready:
            self._told_ready = True
            self._meeting.links[LOWEST].socket.send(encode_json(Kind.READY, {"starts": self._starts}))

    def _missing(self) -> str:
        missing = [rank for rank in self._partners if rank not in self._meeting.links]
        if not missing:
            late = [rank for rank in self._partners if rank not in self._ready] if self._program.rank == LOWEST else []
            who = ", ".join(f"rank {rank} ({self._program.addresses[rank]})" for rank in late) or "other nodes"
            what = f"{who} did not get all their connections"
        else:
            errors = {dial.rank: f": {dial.error}" for dial in self._dials.values()}
            what = "no connection with " + ", ".join(
                f"rank {rank} ({self._program.addresses[rank]}{errors.get(rank, '')})" for rank in missing
            )
        return (
            f"{this_node(self._program)} gave up waiting after {self._timeout:g} s: {what}; "
            "is fusetile-runtime running on all devices? --connect-timeout waits longer"
        )


def _step(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ProtocolError(f"{value!r} is no step to start from")
    return value
