"""One connection to a peer: what waits to be sent, what is expected, and what was last heard. No thread of its own."""

from __future__ import annotations

import contextlib
import heapq
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fusetile.errors import ProtocolError
from fusetile.runtime.wire import CHUNK_bytes, Decoder, Frame, Header, Kind, header

_UNSENT_bytes = 1 << 17  # so little may wait in the kernel: what is urgent goes behind no more than this
_FRAMES_per_turn = 16  # then it is another link's turn


@dataclass(slots=True)
class Outgoing:
    """A transfer to a peer, `done` bytes of which are on their way."""

    kind: Kind
    step: int
    tag: int
    view: memoryview
    priority: int = 0
    done: int = 0


@dataclass(slots=True)
class Incoming:
    """A place for a transfer from a peer, `done` bytes of which are there."""

    view: memoryview
    done: int = 0


class Link:
    """A connected socket, non-blocking. `rank` and `name` are the peer's, once its HELLO has come."""

    def __init__(self, connection: socket.socket, *, rank: int = -1, name: str = "") -> None:
        self.socket, self.rank, self.name = connection, rank, name
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError, AttributeError):  # not every system has it; it only makes urgency sharper
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_bytes)
        self.incoming: dict[tuple[Kind, int, int], Incoming] = {}  # by kind, step and tag
        self.credits: dict[tuple[int, int], int] = {}  # (step, tag) -> bytes that the peer is ready for
        self.uncredited: dict[tuple[int, int], Outgoing] = {}
        self.progress, self.activity = -1, 0
        self.heard_at = self.moved_at = time.monotonic()
        self.closed = False  # the peer has said BYE
        self._decoder = Decoder(self._place)
        self._control: deque[bytes] = deque()
        self._data: list[tuple[int, int, Outgoing]] = []
        self._sequence = 0
        self._current: list[memoryview] = []  # what is left of the frame that is being sent
        self._last_of: Outgoing | None = None  # the transfer that the current frame completes

    # -- sending ----------------------------------------------------------------------------------------------------

    def control(self, frame: bytes) -> None:
        """Queue a small frame: it goes before all data."""
        self._control.append(frame)

    def data(self, outgoing: Outgoing) -> None:
        """Queue a transfer that has credit. A lower priority goes first, then the one that was queued first."""
        heapq.heappush(self._data, (outgoing.priority, self._sequence, outgoing))
        self._sequence += 1

    def drop_data(self) -> None:
        """Forget the transfers; the frame that is being sent still ends."""
        self._data.clear()

    @property
    def pending_controls(self) -> int:
        """Control frames that are not yet being sent."""
        return len(self._control)

    def send(self) -> tuple[bool, list[Outgoing]]:
        """Send what the kernel takes: whether something is left, and the transfers whose buffers are free again."""
        finished: list[Outgoing] = []
        for _ in range(_FRAMES_per_turn):
            if not self._current and not self._next_frame():
                return False, finished
            try:
                sent = self.socket.sendmsg(self._current)
            except BlockingIOError:
                return True, finished
            self._current = _after(self._current, sent)
            if not self._current and self._last_of is not None:
                finished.append(self._last_of)
                self._last_of = None
        return True, finished

    def _next_frame(self) -> bool:
        if self._control:
            self._current = [memoryview(b"".join(self._control))]
            self._control.clear()
            return True
        if not self._data:
            return False
        outgoing = self._data[0][2]
        payload = outgoing.view[outgoing.done : outgoing.done + CHUNK_bytes]
        self._current = [memoryview(header(outgoing.kind, payload, step=outgoing.step, tag=outgoing.tag)), payload]
        outgoing.done += len(payload)
        if outgoing.done == len(outgoing.view):
            heapq.heappop(self._data)
            self._last_of = outgoing
        return True

    # -- receiving --------------------------------------------------------------------------------------------------

    def receive(self) -> Iterator[Frame]:
        """The frames that have arrived; a caller may stop after any of them, and another go on. Raises EOFError if the
        peer has closed, OSError if the connection broke."""
        yield from self._decoder.frames()  # came with the frame after which the last caller stopped
        for _ in range(_FRAMES_per_turn):
            views = self._decoder.views()
            try:
                count = self.socket.recvmsg_into(views)[0]
            except BlockingIOError:
                return
            if count == 0:
                raise EOFError
            self.heard_at = time.monotonic()
            yield from self._decoder.advance(count)
            if count < sum(map(len, views)):
                return

    def _place(self, head: Header) -> memoryview:
        incoming = self.incoming.get((head.kind, head.step, head.tag))
        if incoming is None:
            raise ProtocolError(f"{self.name!r} sent data that nobody waits for: step {head.step}, transfer {head.tag}")
        return incoming.view[incoming.done : incoming.done + head.length]


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """The views without their first `count` bytes."""
    while views and count >= len(views[0]):
        count -= len(views[0])
        views = views[1:]
    return [views[0][count:], *views[1:]] if views and count else views


def part(links: Iterable[Link], *, seconds: float) -> None:
    """Send what is queued and close, but so that it arrives: say that no more comes, then read until the peer ends.

    Closing with unread bytes would make the kernel throw away what the peer has not read yet."""
    end = time.monotonic() + seconds
    links = list(links)
    with selectors.DefaultSelector() as selector:
        for link in links:
            link.socket.setblocking(False)
            selector.register(link.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, link)
        while selector.get_map() and (left := end - time.monotonic()) > 0:
            for key, ready in selector.select(left):
                if to_do := _part_turn(key.data, key.events, ready):
                    selector.modify(key.fileobj, to_do, key.data)
                else:
                    selector.unregister(key.fileobj)
    for link in links:
        link.socket.close()


def _part_turn(link: Link, to_do: int, ready: int) -> int:
    """Send or read once; what is still to do, as events."""
    try:
        if ready & selectors.EVENT_WRITE and not link.send()[0]:
            link.socket.shutdown(socket.SHUT_WR)
            to_do &= ~selectors.EVENT_WRITE
        if ready & selectors.EVENT_READ and not link.socket.recv(CHUNK_bytes):
            to_do &= ~selectors.EVENT_READ
    except BlockingIOError:
        return to_do
    except OSError:
        return 0
    return to_do
