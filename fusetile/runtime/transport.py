"""Transfers between devices: the calls by which the executor uses the thread that owns all connections."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any

from fusetile.program import Program
from fusetile.runtime.gathering import Gathering, Shard
from fusetile.runtime.io_thread import VERDICT, IoThread
from fusetile.runtime.link import Link, Outgoing
from fusetile.runtime.rendezvous import LOWEST
from fusetile.runtime.shared import Shared
from fusetile.runtime.watch import Activity
from fusetile.runtime.wire import Kind, encode_json

_LAST = 1 << 30  # a priority behind all others


class Transport:
    """Transfers with all peers of a program.

    All methods are for the executor's thread; they raise PeerFailure, ProtocolError or Stopped as soon as the run is
    over. `deadline` is the silence, in seconds, after which a peer counts as lost.
    """

    def __init__(self, program: Program, links: Mapping[int, Link], *, deadline: float) -> None:
        self._program, self._links = program, dict(links)
        self._shared = Shared()
        self._io = IoThread(program, self._links, self._shared, deadline=deadline)

    def start(self, *, catch_signals: bool = False) -> None:
        """Begin: all nodes are ready. With `catch_signals` (in the main thread only) a signal that has a handler ends
        the run at once, whatever the executor is doing; `close` gives the signals back."""
        self._io.start(catch_signals=catch_signals)

    def recv(self, peer: int, tag: int, view: memoryview) -> None:
        """Let the peer send this turn's transfer `tag` into `view`."""
        self._io.post(self._io.recv, self._links[peer], self._shared.turn, tag, view)

    def send(self, peer: int, tag: int, view: memoryview, priority: int) -> None:
        """Send `view` as this turn's transfer `tag`, once the peer is ready for it."""
        self._io.post(self._io.send, self._links[peer], Outgoing(Kind.DATA, self._shared.turn, tag, view, priority))

    def send_samples(self, peer: int, tag: int, batch: int, view: memoryview) -> None:
        """Send samples, once the peer is ready for them; from any thread. They give way to all that a step sends."""
        self._io.post(self._io.send, self._links[peer], Outgoing(Kind.DATA, batch, tag, view, _LAST))

    def recv_samples(self, tag: int, batch: int, view: memoryview) -> None:
        """Let the source send samples into `view`."""
        assert self._program.source is not None
        self._io.post(self._io.recv, self._links[self._program.source], batch, tag, view)

    def finish(self, tags: Collection[int]) -> None:
        """Wait for these transfers and forget them."""
        self.wait(tags)
        self._shared.forget(tags)

    def wait(self, keys: Iterable[Hashable]) -> None:
        """Block until these transfers of the turn are complete."""
        self._shared.wait(keys)

    def check(self) -> None:
        """Raise what has ended the run, if something has."""
        self._shared.check()

    def count(self) -> None:
        """The executor has done a bit of its work: others who wait see that this node gets on."""
        self._shared.progress += 1

    def begin_at(self, step: int) -> None:
        """The training begins behind this step."""
        self._shared.step = step

    def begin_turn(self, step: int) -> None:
        """The next routine begins, in this step of the training."""
        self._shared.step = step
        self._shared.turn += 1

    def give_shards(self, shards: list[Shard]) -> None:
        """Send these arrays to the lowest rank and wait until it has finished its work. (Not on the lowest rank.)"""
        self._io.post(self._io.give_shards, self._links[LOWEST], shards, True)
        self.wait([("bye", LOWEST)])

    def gather_shards(self) -> list[Shard]:
        """The arrays of all other ranks, by rank, then in the order they were given. (On the lowest rank.) Afterwards
        the others wait until `close`, however long that takes."""
        shards = self._gathered_shards()
        self._shared.activity = Activity.FINISHING
        return shards

    def ask(self, shards: list[Shard]) -> dict[str, Any]:
        """Send these arrays to the lowest rank in the midst of the training, and wait for what it says to them."""
        self._io.post(self._io.give_shards, self._links[LOWEST], shards, False)
        self.wait([VERDICT])
        self._shared.forget([VERDICT])
        return self._io.verdict

    def answer(self, decide: Callable[[list[Shard]], dict[str, Any]]) -> dict[str, Any]:
        """On the lowest rank: what `decide` says to what all the others `ask`; it is told to them."""
        shards = self._gathered_shards()
        keys = [("gathered", rank) for rank in self._links]
        self._io.gathering = Gathering(self._links)
        self._shared.forget(keys)
        self._shared.activity = Activity.FINISHING  # however long it takes
        verdict = decide(shards)
        self._shared.activity = Activity.COMPUTING
        self._io.post(self._io.tell, encode_json(Kind.VERDICT, verdict))
        return verdict

    def _gathered_shards(self) -> list[Shard]:
        self.wait([("gathered", rank) for rank in self._links])
        return self._io.gathering.shards()

    def close(self) -> None:
        """The end: say goodbye if all is well, wait for the others to do so, and end the thread."""
        self._io.join()

    def abort(self, error: BaseException) -> None:
        """End the run for everybody because of an error of this node. Then `close`."""
        self._io.post(self._io.fail, error)
