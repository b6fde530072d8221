"""Transfers between devices: one thread that owns all connections, and the calls by which the executor uses it.

The executor's thread posts commands and waits; all state of the links belongs to the I/O thread. A Send goes out when
the peer's CREDIT for its step and tag has come, in chunks, the most urgent transfer first. The thread never waits for
anything but the selector, so heartbeats go out and failures are seen whatever the executor does.
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
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any

from fusetile.errors import PeerFailure, PlanError, ProtocolError
from fusetile.program import Program, Recv, Send
from fusetile.runtime.faults import Stopped, abort_frame, node, reason_in, reason_of, this_node
from fusetile.runtime.gathering import Gathering, Shard, give
from fusetile.runtime.link import Incoming, Link, Outgoing, part
from fusetile.runtime.rendezvous import LOWEST
from fusetile.runtime.watch import Activity, Watch
from fusetile.runtime.wire import Frame, Kind, encode, encode_credit, encode_heartbeat, encode_json

SAMPLES, SAMPLES_tags = 1 << 24, 4
"""Tags from here on are those of samples that the source sends, so many to each node; see `outlet`."""
_LAST = 1 << 30  # a priority behind all others
_PARTING_seconds = 1.0
_VERDICT = ("verdict", LOWEST)
_AWAITED = {"bye": "the end of", "gathered": "the arrays of", "verdict": "the verdict of"}


class Transport:
    """Transfers with all peers of a program.

    All methods are for the executor's thread; they raise PeerFailure, ProtocolError or Stopped as soon as the run is
    over. `deadline` is the silence, in seconds, after which a peer counts as lost.
    """

    def __init__(self, program: Program, links: Mapping[int, Link], *, deadline: float) -> None:
        self.step = 0  # of the training: for messages
        self.turn = 0  # the routines that this node has begun, as all do in the same order
        self.progress = 0  # counted by the executor; the thread counts chunks
        self.activity = Activity.COMPUTING
        self._program, self._links = program, dict(links)
        self._active = list(links.values())  # without those that are gone
        self._watch = Watch(program, deadline)
        self._transfers: dict[Hashable, str] = {}  # tag -> what a message calls it
        self._sent_tags: set[tuple[int, int]] = set()
        self._ahead = program.accumulate
        for step in (step for routine in program.routines() for step in routine.steps):
            if isinstance(step, Send | Recv):
                if step.peer not in self._links or step.tag in self._transfers:
                    raise PlanError(f"{step} is with no peer of {sorted(self._links)}, or its tag is there twice")
                way = "to" if isinstance(step, Send) else "from"
                name = self._links[step.peer].name
                self._transfers[step.tag] = f"transfer {step.tag} ({step.size_bytes} bytes) {way} {name!r}"
            if isinstance(step, Send):
                self._sent_tags.add((step.peer, step.tag))
        self._condition = threading.Condition()
        self._done: set[Hashable] = set()
        self._wanted: set[Hashable] = set()
        self._failure: BaseException | None = None
        self._commands: deque[tuple[Callable[..., Link | None], tuple[Any, ...]]] = deque()
        self._awake = False
        self._wake_reader, self._wake_writer = socket.socketpair()
        for end in (self._wake_reader, self._wake_writer):
            end.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._writing: set[Link] = set()
        self._chunks = 0
        self._gathering = Gathering(self._links)
        self._verdict: dict[str, Any] = {}
        self._over = False  # the result is complete: nobody is needed any more
        self._leaving = self._catch_signals = False
        self._main_left = threading.Event()
        self._thread = threading.Thread(target=self._main, name="fusetile-io", daemon=True)

    def start(self, *, catch_signals: bool = False) -> None:
        """Begin: all nodes are ready. With `catch_signals` (in the main thread only) a signal that has a handler ends
        the run at once, whatever the executor is doing; `close` gives the signals back."""
        now = time.monotonic()
        for link in self._active:
            link.heard_at = link.moved_at = now
        self._catch_signals = catch_signals
        if catch_signals:
            signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    # -- for the executor -------------------------------------------------------------------------------------------

    def recv(self, peer: int, tag: int, view: memoryview) -> None:
        """Let the peer send this turn's transfer `tag` into `view`."""
        self._post(self._do_recv, self._links[peer], self.turn, tag, view)

    def send(self, peer: int, tag: int, view: memoryview, priority: int) -> None:
        """Send `view` as this turn's transfer `tag`, once the peer is ready for it."""
        self._post(self._do_send, self._links[peer], Outgoing(Kind.DATA, self.turn, tag, view, priority))

    def send_samples(self, peer: int, tag: int, batch: int, view: memoryview) -> None:
        """Send samples, once the peer is ready for them; from any thread. They give way to all that a step sends."""
        self._post(self._do_send, self._links[peer], Outgoing(Kind.DATA, batch, tag, view, _LAST))

    def recv_samples(self, tag: int, batch: int, view: memoryview) -> None:
        """Let the source send samples into `view`."""
        assert self._program.source is not None
        self._post(self._do_recv, self._links[self._program.source], batch, tag, view)

    def finish(self, tags: Collection[int]) -> None:
        """Wait for these transfers and forget them."""
        self.wait(tags)
        self._forget(tags)

    def wait(self, keys: Iterable[Hashable]) -> None:
        """Block until these transfers of the turn are complete."""
        with self._condition:
            self._wanted = {key for key in keys if key not in self._done}
            self.activity = Activity.WAITING
            while self._wanted and self._failure is None:
                self._condition.wait()
            self.activity = Activity.COMPUTING
        self.check()

    def check(self) -> None:
        """Raise what has ended the run, if something has."""
        if self._failure is not None:
            raise self._failure

    def begin_turn(self, step: int) -> None:
        """The next routine begins, in this step of the training."""
        self.step, self.turn = step, self.turn + 1

    def end_turn(self, tags: Collection[int]) -> None:
        """Wait for all transfers of the turn."""
        self.finish(tags)

    def give_shards(self, shards: list[Shard]) -> None:
        """Send these arrays to the lowest rank and wait until it has finished its work. (Not on the lowest rank.)"""
        self._post(self._do_give_shards, self._links[LOWEST], shards, True)
        self.wait([("bye", LOWEST)])

    def gather_shards(self) -> list[Shard]:
        """The arrays of all other ranks, by rank, then in the order they were given. (On the lowest rank.) Afterwards
        the others wait until `close`, however long that takes."""
        shards = self._gathered_shards()
        self.activity = Activity.FINISHING
        return shards

    def ask(self, shards: list[Shard]) -> dict[str, Any]:
        """Send these arrays to the lowest rank in the midst of the training, and wait for what it says to them."""
        self._post(self._do_give_shards, self._links[LOWEST], shards, False)
        self.wait([_VERDICT])
        self._forget([_VERDICT])
        return self._verdict

    def answer(self, decide: Callable[[list[Shard]], dict[str, Any]]) -> dict[str, Any]:
        """On the lowest rank: what `decide` says to what all the others `ask`; it is told to them."""
        shards = self._gathered_shards()
        keys = [("gathered", rank) for rank in self._links]
        self._gathering = Gathering(self._links)
        self._forget(keys)
        self.activity = Activity.FINISHING  # however long it takes
        verdict = decide(shards)
        self.activity = Activity.COMPUTING
        self._post(self._do_tell, encode_json(Kind.VERDICT, verdict))
        return verdict

    def _gathered_shards(self) -> list[Shard]:
        self.wait([("gathered", rank) for rank in self._links])
        return self._gathering.shards()

    def _forget(self, keys: Iterable[Hashable]) -> None:
        with self._condition:
            self._done.difference_update(keys)

    def close(self) -> None:
        """The end: say goodbye if all is well, wait for the others to do so, and end the thread."""
        self._main_left.set()
        self._post(self._do_bye)
        self._thread.join()
        if self._catch_signals:
            signal.set_wakeup_fd(-1)
        self._wake_reader.close()
        self._wake_writer.close()

    def abort(self, error: BaseException) -> None:
        """End the run for everybody because of an error of this node. Then `close`."""
        self._post(self._fail, error)

    def _post(self, command: Callable[..., Link | None], *arguments: Any) -> None:
        self._commands.append((command, arguments))
        if not self._awake:
            self._awake = True
            self._wake_writer.send(b"\0")

    # -- commands, run by the thread --------------------------------------------------------------------------------

    def _do_recv(self, link: Link, step: int, tag: int, view: memoryview) -> Link:
        link.incoming[Kind.DATA, step, tag] = Incoming(view)
        link.control(encode_credit(step=step, tag=tag, size_bytes=len(view)))
        return link

    def _do_send(self, link: Link, outgoing: Outgoing) -> Link:
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

    def _do_give_shards(self, link: Link, shards: list[Shard], last: bool) -> Link:
        give(link, shards, last=last)
        return link

    def _do_tell(self, frame: bytes) -> None:
        for link in self._open():
            link.control(frame)
            self._flush(link)

    def _do_bye(self) -> None:
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
            while self._failure is None and not (self._leaving and self._is_quiet()):
                self._turn()
        except BaseException as error:  # a fault of this file: the executor must hear of it, or it would wait forever
            self._fail(error)
        self._part()

    def _is_quiet(self) -> bool:
        """All is sent, and all the others have said goodbye."""
        return not self._writing and not self._open()

    def _open(self) -> list[Link]:
        return [link for link in self._active if not link.closed]

    def _turn(self) -> None:
        for key, events in self._selector.select(self._watch.interval):
            if key.data is None:
                self._wake()
                continue
            if events & selectors.EVENT_READ:
                self._read(key.data)
            if key.data in self._writing:
                self._flush(key.data)
        dirty: dict[Link, None] = {}
        while self._commands and self._failure is None:
            command, arguments = self._commands.popleft()
            if (link := command(*arguments)) is not None:
                dirty[link] = None
        for link in dirty:
            self._flush(link)
        if self._watch.tick(self._open()) and self._failure is None:
            self._beat()

    def _wake(self) -> None:
        signals = [number for number in self._wake_reader.recv(4096) if number]
        self._awake = False  # before the commands are looked at: a later one wakes again
        if signals:
            self._fail(Stopped(signals[0], self.step))

    def _beat(self) -> None:
        """The regular turn: say that this node lives, see who does not."""
        progress = self.progress + self._chunks
        beat = encode_heartbeat(progress=progress, activity=self.activity)
        for link in self._open():
            if not link.pending_controls:
                link.control(beat)
                self._flush(link)
        if (complaint := self._watch.complaint(self._open(), progress, self.activity)) is not None:
            self._lose(*complaint)

    def _read(self, link: Link) -> None:
        try:
            for frame in link.receive():
                self._handle(link, frame)
                if self._failure is not None:
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
                self._complete(outgoing.tag)
        if more != (link in self._writing):
            (self._writing.add if more else self._writing.discard)(link)
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if more else 0)
            self._selector.modify(link.socket, events, link)

    def _complete(self, key: Hashable) -> None:
        with self._condition:
            self._done.add(key)
            self._wanted.discard(key)
            if not self._wanted:
                self._condition.notify()

    # -- frames -----------------------------------------------------------------------------------------------------

    def _handle(self, link: Link, frame: Frame) -> None:
        match frame.kind:
            case Kind.DATA:
                self._chunks += 1
                if self._receive_chunk(link, frame):
                    self._complete(frame.tag)
            case Kind.CREDIT:
                self._receive_credit(link, frame)
            case Kind.HEARTBEAT:
                self._watch.hear(link, *frame.heartbeat())
            case Kind.GATHERED if self._program.rank == LOWEST:
                self._gathering.announce(link, frame)
                self._gathered(link)
            case Kind.SHARD if self._program.rank == LOWEST:
                self._gathering.expect(link, frame)
            case Kind.SHARD_DATA:
                self._chunks += 1
                if self._receive_chunk(link, frame):
                    self._gathering.arrived(link)
                    self._gathered(link)
            case Kind.VERDICT if link.rank == LOWEST:
                self._verdict = frame.json()
                self._complete(_VERDICT)
            case Kind.BYE:
                link.closed = True
                self._over |= link.rank == LOWEST
                self._complete(("bye", link.rank))
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
        sent = (link.rank, frame.tag) in self._sent_tags and self.turn <= frame.step <= self.turn + self._ahead
        if not sent and not self._is_for_samples(link, frame):
            raise ProtocolError(f"a credit for transfer {frame.tag} of turn {frame.step} in turn {self.turn}")
        if key in link.uncredited:
            self._match(link, link.uncredited.pop(key), frame.credit())
            self._flush(link)
        else:
            link.credits[key] = frame.credit()

    def _is_for_samples(self, link: Link, frame: Frame) -> bool:
        first = SAMPLES + SAMPLES_tags * link.rank
        return self._program.source == self._program.rank and first <= frame.tag < first + SAMPLES_tags

    def _gathered(self, link: Link) -> None:
        if self._gathering.has_all_of(link.rank):
            self._over |= self._gathering.last and self._gathering.has_all()
            self._complete(("gathered", link.rank))

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
            self._fail(PeerFailure(f"{what}; {self._doing()}"), reason=what)

    def _doing(self) -> str:
        """What this node is at: `at step 5, waiting for transfer 7 (512 bytes) with 'b'`."""
        with self._condition:
            wanted = sorted(self._wanted, key=str) if self.activity == Activity.WAITING else []
        texts = [
            f"{_AWAITED[key[0]]} {self._links[key[1]].name!r}"
            if isinstance(key, tuple)
            else self._transfers.get(key, "samples")
            for key in wanted[:3]
        ]
        more = f" and {len(wanted) - 3} more" if len(wanted) > 3 else ""
        return f"{this_node(self._program)} was at step {self.step}, " + (
            f"waiting for {', '.join(texts)}{more}" if texts else "computing"
        )

    def _fail(self, error: BaseException, reason: str = "") -> None:
        """End the run: tell the others and wake the executor. The first error counts."""
        if self._failure is not None:
            return
        frame = abort_frame(reason or reason_of(self._program, error, self.step))
        for link in self._open():
            link.drop_data()
            link.control(frame)
        with self._condition:
            self._failure = error
            self._condition.notify()

    def _part(self) -> None:
        """End the connections, and see that the executor ends as well."""
        self._selector.close()
        part(self._active, seconds=_PARTING_seconds)
        if self._failure is not None and not self._main_left.wait(self._watch.limit):
            # The executor is stuck in a kernel: nothing but the end of the process can stop it.
            print(f"fusetile-runtime: error: {self._failure}", file=sys.stderr, flush=True)
            os._exit(getattr(self._failure, "exit_status", 1))
