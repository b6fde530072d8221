"""The thread that owns all connections of a node, and all their state.

The executor posts commands and waits. A Send goes out when the peer's CREDIT for its step and tag has come, in chunks,
the most urgent transfer first. The thread never waits for anything but the selector, so heartbeats go out and failures
are seen whatever the executor does.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from fusetile.errors import PeerFailure, PlanError, ProtocolError
from fusetile.program import Program, Recv, Send
from fusetile.runtime.faults import Stopped, abort_frame, node, reason_in, reason_of, this_node
from fusetile.runtime.gathering import Gathering, Shard, give
from fusetile.runtime.link import Incoming, Link, Outgoing, part
from fusetile.runtime.rendezvous import LOWEST
from fusetile.runtime.shared import Shared
from fusetile.runtime.watch import Watch
from fusetile.runtime.wire import Frame, Kind, encode, encode_credit, encode_heartbeat

SAMPLES, SAMPLES_tags = 1 << 24, 4
"""Tags from here on are those of samples that the source sends, so many to each node; see `outlet`."""
VERDICT = ("verdict", LOWEST)
_PARTING_seconds = 1.0
_AWAITED = {"bye": "the end of", "gathered": "the arrays of", "verdict": "the verdict of"}


class IoThread:
    """Commands are posted with `post`, from any thread, and run in this one: `recv`, `send`, `give_shards`, `tell`,
    `bye`, `fail`. Each returns the link on which there is something to send now, if any."""

    def __init__(self, program: Program, links: Mapping[int, Link], shared: Shared, *, deadline: float) -> None:
        self.gathering = Gathering(links)
        self.verdict: dict[str, Any] = {}
        self._program, self._links, self._shared = program, links, shared
        self._active = list(links.values())  # without those that are gone
        self._watch = Watch(program, deadline)
        self._transfers: dict[Hashable, str] = {}  # tag -> what a message calls it
        self._sent_tags: set[tuple[int, int]] = set()
        self._note_transfers()
        self._commands: deque[tuple[Callable[..., Link | None], tuple[Any, ...]]] = deque()
        self._awake = False
        self._wake_reader, self._wake_writer = socket.socketpair()
        for end in (self._wake_reader, self._wake_writer):
            end.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._writing: set[Link] = set()
        self._chunks = 0
        self._over = False  # the result is complete: nobody is needed any more
        self._leaving = self._catch_signals = False
        self._main_left = threading.Event()
        self._thread = threading.Thread(target=self._main, name="fusetile-io", daemon=True)

    def _note_transfers(self) -> None:
        for step in (step for routine in self._program.routines() for step in routine.steps):
            if isinstance(step, Send | Recv):
                if step.peer not in self._links or step.tag in self._transfers:
                    raise PlanError(f"{step} is with no peer of {sorted(self._links)}, or its tag is there twice")
                way = "to" if isinstance(step, Send) else "from"
                name = self._links[step.peer].name
                self._transfers[step.tag] = f"transfer {step.tag} ({step.size_bytes} bytes) {way} {name!r}"
            if isinstance(step, Send):
                self._sent_tags.add((step.peer, step.tag))

    # -- for the executor's thread ----------------------------------------------------------------------------------

    def start(self, *, catch_signals: bool) -> None:
        """Begin; with `catch_signals` a signal wakes this thread, until `join`."""
        now = time.monotonic()
        for link in self._active:
            link.heard_at = link.moved_at = now
        self._catch_signals = catch_signals
        if catch_signals:
            signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    def post(self, command: Callable[..., Link | None], *arguments: Any) -> None:
        """Let the thread run one of its commands."""
        self._commands.append((command, arguments))
        if not self._awake:
            self._awake = True
            self._wake_writer.send(b"\0")

    def join(self) -> None:
        """The executor has left: say goodbye if all is well, wait for the others to do so, and end."""
        self._main_left.set()
        self.post(self.bye)
        self._thread.join()
        if self._catch_signals:
            signal.set_wakeup_fd(-1)
        self._wake_reader.close()
        self._wake_writer.close()

    # -- commands, run by the thread --------------------------------------------------------------------------------

    def recv(self, link: Link, step: int, tag: int, view: memoryview) -> Link:
        """The peer may send this transfer into `view`."""
        link.incoming[Kind.DATA, step, tag] = Incoming(view)
        link.control(encode_credit(step=step, tag=tag, size_bytes=len(view)))
        return link

    def send(self, link: Link, outgoing: Outgoing) -> Link:
        """Send this once the peer is ready for it."""
        key = (outgoing.step, outgoing.tag)
        if key in link.credits:
            self._match(link, outgoing, link.credits.pop(key))
        else:
            link.uncredited[key] = outgoing
        return link

    def _match(self, link: Link, outgoing: Outgoing, credit: int) -> None:
        if credit != len(outgoing.view):
            raise ProtocolError(
                f"{link.name!r} is ready for {credit} bytes of transfer {outgoing.tag}, which has {len(outgoing.view)}"
            )
        link.data(outgoing)

    def give_shards(self, link: Link, shards: list[Shard], last: bool) -> Link:
        """Send these arrays to the lowest rank; `last`: nothing follows."""
        give(link, shards, last=last)
        return link

    def tell(self, frame: bytes) -> None:
        """Send a frame to everybody."""
        for link in self._open():
            link.control(frame)
            self._flush(link)

    def bye(self) -> None:
        """Say goodbye; the thread ends when all have done so."""
        self._leaving = True
        for link in self._active:
            link.control(encode(Kind.BYE))
            self._flush(link)

    # -- the thread -------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._selector.register(self._wake_reader, selectors.EVENT_READ)
            for link in self._active:
                self._selector.register(link.socket, selectors.EVENT_READ, link)
            while self._shared.failure is None and not (self._leaving and self._is_quiet()):
                self._look()
        except BaseException as error:  # a fault of this file: the executor must hear of it, or it would wait forever
            self.fail(error)
        self._part()

    def _is_quiet(self) -> bool:
        """All is sent, and all the others have said goodbye."""
        return not self._writing and not self._open()

    def _open(self) -> list[Link]:
        return [link for link in self._active if not link.closed]

    def _look(self) -> None:
        for key, events in self._selector.select(self._watch.interval):
            if key.data is None:
                self._wake()
                continue
            if events & selectors.EVENT_READ:
                self._read(key.data)
            if key.data in self._writing:
                self._flush(key.data)
        dirty: dict[Link, None] = {}
        while self._commands and self._shared.failure is None:
            command, arguments = self._commands.popleft()
            if (link := command(*arguments)) is not None:
                dirty[link] = None
        for link in dirty:
            self._flush(link)
        if self._watch.tick(self._open()) and self._shared.failure is None:
            self._beat()

    def _wake(self) -> None:
        signals = [number for number in self._wake_reader.recv(4096) if number]
        self._awake = False  # before the commands are looked at: a later one wakes again
        if signals:
            self.fail(Stopped(signals[0], self._shared.step))

    def _beat(self) -> None:
        """The regular turn: say that this node lives, see who does not."""
        progress = self._shared.progress + self._chunks
        beat = encode_heartbeat(progress=progress, activity=self._shared.activity)
        for link in self._open():
            if not link.pending_controls:
                link.control(beat)
                self._flush(link)
        if (complaint := self._watch.complaint(self._open(), progress, self._shared.activity)) is not None:
            self._lose(*complaint)

    def _read(self, link: Link) -> None:
        try:
            for frame in link.receive():
                self._handle(link, frame)
                if self._shared.failure is not None:
                    return
        except EOFError:
            self._lose(link, f"{self._who(link)} closed its connection (was it killed?)")
        except ProtocolError as error:
            self._lose(link, f"{self._who(link)} broke the protocol: {error}")
        except OSError as error:
            self._lose(link, f"the connection with {self._who(link)} broke: {error.strerror}")

    def _flush(self, link: Link) -> None:
        try:
            more, finished = link.send()
        except OSError:
            more, finished = False, []  # reading tells why
        for outgoing in finished:
            self._chunks += 1
            if outgoing.kind == Kind.DATA:
                self._shared.complete(outgoing.tag)
        if more != (link in self._writing):
            (self._writing.add if more else self._writing.discard)(link)
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if more else 0)
            self._selector.modify(link.socket, events, link)

    # -- frames -----------------------------------------------------------------------------------------------------

    def _handle(self, link: Link, frame: Frame) -> None:
        match frame.kind:
            case Kind.DATA:
                self._chunks += 1
                if self._receive_chunk(link, frame):
                    self._shared.complete(frame.tag)
            case Kind.CREDIT:
                self._receive_credit(link, frame)
            case Kind.HEARTBEAT:
                self._watch.hear(link, *frame.heartbeat())
            case Kind.GATHERED if self._program.rank == LOWEST:
                self.gathering.announce(link, frame)
                self._gathered(link)
            case Kind.SHARD if self._program.rank == LOWEST:
                self.gathering.expect(link, frame)
            case Kind.SHARD_DATA:
                self._chunks += 1
                if self._receive_chunk(link, frame):
                    self.gathering.arrived(link)
                    self._gathered(link)
            case Kind.VERDICT if link.rank == LOWEST:
                self.verdict = frame.json()
                self._shared.complete(VERDICT)
            case Kind.BYE:
                link.closed = True
                self._over |= link.rank == LOWEST
                self._shared.complete(("bye", link.rank))
            case Kind.ABORT:
                self._lose(link, reason_in(frame))
            case _:
                raise ProtocolError(f"a {frame.kind.name} frame during the training")

    def _receive_chunk(self, link: Link, frame: Frame) -> bool:
        key = (frame.kind, frame.step, frame.tag)
        incoming = link.incoming[key]
        incoming.done += len(frame.payload)
        if incoming.done < len(incoming.view):
            return False
        del link.incoming[key]
        return True

    def _receive_credit(self, link: Link, frame: Frame) -> None:
        key = (frame.step, frame.tag)
        # A peer can be one turn ahead and no more, because its receives of a turn end only after this node's sends of
        # it; or by the batches of a step, if nothing goes between the two before the last of them.
        turn = self._shared.turn
        due = turn <= frame.step <= turn + self._program.accumulate and (link.rank, frame.tag) in self._sent_tags
        if not due and not self._is_for_samples(link, frame):
            raise ProtocolError(f"a credit for transfer {frame.tag} of turn {frame.step} in turn {turn}")
        if key in link.uncredited:
            self._match(link, link.uncredited.pop(key), frame.credit())
            self._flush(link)
        else:
            link.credits[key] = frame.credit()

    def _is_for_samples(self, link: Link, frame: Frame) -> bool:
        first = SAMPLES + SAMPLES_tags * link.rank
        return self._program.source == self._program.rank and first <= frame.tag < first + SAMPLES_tags

    def _gathered(self, link: Link) -> None:
        if self.gathering.has_all_of(link.rank):
            self._over |= self.gathering.last and self.gathering.has_all()
            self._shared.complete(("gathered", link.rank))

    # -- the end ----------------------------------------------------------------------------------------------------

    def _who(self, link: Link) -> str:
        return node(self._program, link.rank, link.name)

    def _lose(self, link: Link | None, what: str) -> None:
        """A peer is lost, or has said that the run is over; unless the result is complete, this ends the run."""
        if link is not None and (self._over or link.closed):
            self._active.remove(link)
            self._writing.discard(link)
            self._selector.unregister(link.socket)
            link.socket.close()
        else:
            self.fail(PeerFailure(f"{what}; {self._doing()}"), reason=what)

    def _doing(self) -> str:
        """What this node is at: `at step 5, waiting for transfer 7 (512 bytes) with 'b'`."""
        wanted = self._shared.wanted()
        texts = [
            f"{_AWAITED[key[0]]} {self._links[key[1]].name!r}"
            if isinstance(key, tuple)
            else self._transfers.get(key, "samples")
            for key in wanted[:3]
        ]
        more = f" and {len(wanted) - 3} more" if len(wanted) > 3 else ""
        return f"{this_node(self._program)} was at step {self._shared.step}, " + (
            f"waiting for {', '.join(texts)}{more}" if texts else "computing"
        )

    def fail(self, error: BaseException, reason: str = "") -> None:
        """End the run: tell the others and wake the executor. The first error counts."""
        if self._shared.failure is not None:
            return
        frame = abort_frame(reason or reason_of(self._program, error, self._shared.step))
        for link in self._open():
            link.drop_data()
            link.control(frame)
        self._shared.fail(error)

    def _part(self) -> None:
        """End the connections, and see that the executor ends as well."""
        self._selector.close()
        part(self._active, seconds=_PARTING_seconds)
        if self._shared.failure is not None and not self._main_left.wait(self._watch.limit):
            # The executor is stuck in a kernel: nothing but the end of the process can stop it.
            print(f"fusetile-runtime: error: {self._shared.failure}", file=sys.stderr, flush=True)
            os._exit(getattr(self._shared.failure, "exit_status", 1))
