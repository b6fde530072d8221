"""The transport against a peer that the test plays by hand, and two transports against each other."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from fusetile.errors import PeerFailure, PlanError, ProtocolError
from fusetile.program import Program, Recv, Send
from fusetile.runtime.link import Link
from fusetile.runtime.transport import Transport
from fusetile.runtime.wire import HEADER_bytes, Kind, encode, encode_credit, encode_heartbeat, encode_json
from tests.runtime import toy
from tests.runtime.pair import connected_pair

SIZE = 1000


def program(rank: int, *steps: Send | Recv) -> Program:
    return replace(toy.program(rank, ("h:1", "h:2")), steps=steps)


def transport(rank: int, connection: socket.socket, *steps: Send | Recv, deadline: float = 30) -> Transport:
    other = 1 - rank
    made = Transport(program(rank, *steps), {other: Link(connection, rank=other, name="ab"[other])}, deadline=deadline)
    made.start()
    made.begin_turn(1)
    return made


class Peer:
    """Rank 1, byte by byte."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.settimeout(5)

    def read(self) -> tuple[Kind, int, bytes]:
        """The next frame that is no heartbeat: kind, tag, payload."""
        while True:
            head = self._exactly(HEADER_bytes)
            kind, tag, length = Kind(head[5]), int.from_bytes(head[12:16]), int.from_bytes(head[16:20])
            payload = self._exactly(length)
            if kind != Kind.HEARTBEAT:
                return kind, tag, payload

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    first, second = connected_pair()
    yield first, second
    first.close()
    second.close()


Ends = tuple[socket.socket, socket.socket]


def test_nothing_is_sent_without_credit(ends: Ends) -> None:
    made, peer = transport(0, ends[0], Send(1, 7, 0, SIZE)), Peer(ends[1])
    array = np.arange(SIZE, dtype=np.uint8)
    made.send(1, 7, array.data, 0)
    peer.socket.settimeout(0.2)
    with pytest.raises(TimeoutError):
        peer.read()
    peer.socket.settimeout(5)
    peer.socket.sendall(encode_credit(step=1, tag=7, size_bytes=SIZE))
    assert peer.read() == (Kind.DATA, 7, array.tobytes())
    made.wait([7])
    made.abort(RuntimeError("the test is over"))
    peer.socket.close()
    made.close()


def test_credit_may_come_first(ends: Ends) -> None:
    made, peer = transport(0, ends[0], Send(1, 7, 0, SIZE)), Peer(ends[1])
    peer.socket.sendall(encode_credit(step=1, tag=7, size_bytes=SIZE))
    time.sleep(0.1)
    made.send(1, 7, memoryview(bytes(SIZE)), 0)
    assert peer.read()[0] == Kind.DATA
    peer.socket.close()
    made.close()


def test_a_receive_gives_credit_and_its_buffer_is_filled(ends: Ends) -> None:
    made, peer = transport(0, ends[0], Recv(1, 5, 0, SIZE)), Peer(ends[1])
    array = np.zeros(SIZE, np.uint8)
    made.recv(1, 5, array.data)
    assert peer.read() == (Kind.CREDIT, 5, SIZE.to_bytes(8))
    for part in (b"a" * 400, b"b" * 600):
        peer.socket.sendall(encode(Kind.DATA, part, step=1, tag=5))
    made.wait([5])
    assert array.tobytes() == b"a" * 400 + b"b" * 600
    peer.socket.close()
    made.close()


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (encode(Kind.DATA, b"x", step=1, tag=5), "nobody waits for"),
        (encode_credit(step=1, tag=99, size_bytes=1), "a credit for transfer 99"),
        (encode_credit(step=5, tag=7, size_bytes=1), "of turn 5 in turn 1"),
        (encode(Kind.GO, b"{}"), "a GO frame during the training"),
        (encode(Kind.SHARD_DATA, b"x"), "nobody waits for"),
        (encode_json(Kind.SHARD, {"bytes": 1 << 60}), "array 0 of 1152921504606846976 bytes"),
        (encode_json(Kind.SHARD, {"bytes": 4}), "where 0 were announced"),
        (b"garbage" * 10, "does not speak fusetile's protocol"),
    ],
    ids=["data", "credit", "step", "go", "shard-data", "shard-size", "shard-number", "garbage"],
)
def test_a_peer_that_breaks_the_protocol_ends_the_run(ends: Ends, frame: bytes, message: str) -> None:
    made, peer = transport(0, ends[0], Send(1, 7, 0, SIZE), Recv(1, 8, 0, SIZE)), Peer(ends[1])
    made.recv(1, 8, memoryview(bytearray(SIZE)))
    assert peer.read()[0] == Kind.CREDIT
    threading.Timer(0.1, peer.socket.sendall, [frame]).start()
    with pytest.raises(PeerFailure, match=message) as caught:
        made.wait([8])
    assert "node 'b' (rank 1, h:2) broke the protocol" in str(caught.value)
    assert "at step 1, waiting for transfer 8 (1000 bytes) from 'b'" in str(caught.value)
    assert peer.read()[0] == Kind.ABORT
    peer.socket.close()
    made.close()


def test_transfers_of_different_sizes_do_not_match(ends: Ends) -> None:
    made, peer = transport(0, ends[0], Send(1, 7, 0, SIZE)), Peer(ends[1])
    peer.socket.sendall(encode_credit(step=1, tag=7, size_bytes=999))
    time.sleep(0.05)
    made.send(1, 7, memoryview(bytes(SIZE)), 0)
    with pytest.raises(ProtocolError, match="ready for 999 bytes of transfer 7, which has 1000"):
        made.wait([7])
    peer.socket.close()
    made.close()


def test_a_peer_that_only_lives_and_gets_nothing_done(ends: Ends) -> None:
    made, peer = transport(0, ends[0], Recv(1, 5, 0, SIZE), deadline=0.4), Peer(ends[1])
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            try:
                peer.socket.send(encode_heartbeat(progress=3, activity=0))
            except OSError:
                return

    thread = threading.Thread(target=beat)
    thread.start()
    made.recv(1, 5, memoryview(bytearray(SIZE)))
    with pytest.raises(PeerFailure, match=r"made no progress for 0\.[4-9] s"):
        made.wait([5])
    stop.set()
    thread.join()
    peer.socket.close()
    made.close()


def test_plans_that_can_not_work_are_refused(ends: Ends) -> None:
    links = {1: Link(ends[0], rank=1, name="b")}
    for steps in ((Send(2, 1, 0, 8),), (Send(1, 1, 0, 8), Recv(1, 1, 8, 8))):
        with pytest.raises(PlanError):
            Transport(program(0, *steps), links, deadline=1)


def test_steps_arrays_and_goodbyes_between_two(ends: Ends) -> None:
    steps = 20
    arrays = [np.random.default_rng(rank).integers(0, 256, 300_000, np.uint8) for rank in range(2)]
    got: list[list[np.ndarray]] = [[], []]
    shards: list[bytes] = []
    errors: list[BaseException] = []

    def node(rank: int) -> None:
        made = transport(rank, ends[rank], Send(1 - rank, rank, 0, 300_000), Recv(1 - rank, 1 - rank, 0, 300_000))
        try:
            place = np.zeros(300_000, np.uint8)
            for step in range(1, steps + 1):
                if step > 1:
                    made.begin_turn(step)
                made.recv(1 - rank, 1 - rank, place.data)
                made.send(1 - rank, rank, (arrays[rank] + np.uint8(step)).data, 0)
                made.wait([1 - rank])
                got[rank].append(place.copy())
                made.finish([0, 1])
            if rank == 0:
                shards.extend(view.tobytes() for _, view in made.gather_shards())
                time.sleep(0.2)  # it writes the result
                made.check()
            else:
                made.give_shards([({}, arrays[0].data), ({}, memoryview(b"abc"))])
        except BaseException as error:
            errors.append(error)
            made.abort(error)
        made.close()

    threads = [threading.Thread(target=node, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not errors and not any(thread.is_alive() for thread in threads)
    for rank in range(2):
        for step, array in enumerate(got[rank], 1):
            np.testing.assert_array_equal(array, arrays[1 - rank] + np.uint8(step))
        assert len(got[rank]) == steps
    assert shards == [arrays[0].tobytes(), b"abc"]
