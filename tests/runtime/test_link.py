"""One connection: the order of what is sent, and endings that lose nothing."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from fusetile.errors import ProtocolError
from fusetile.runtime.link import Incoming, Link, Outgoing, part
from fusetile.runtime.wire import CHUNK_bytes, Frame, Kind, encode, encode_credit
from tests.runtime.pair import connected_pair

Pair = tuple[Link, Link]


@pytest.fixture
def pair() -> Iterator[Pair]:
    first, second = connected_pair()
    links = Link(first, rank=0, name="a"), Link(second, rank=1, name="b")
    yield links
    for link in links:
        link.socket.close()


def outgoing(tag: int, array: np.ndarray, priority: int = 0) -> Outgoing:
    return Outgoing(Kind.DATA, 1, tag, array.data, priority)


def expect(link: Link, tag: int, size: int) -> np.ndarray:
    array = np.zeros(size, np.uint8)
    link.incoming[Kind.DATA, 1, tag] = Incoming(array.data)
    return array


def receive(link: Link) -> list[Frame]:
    """What is there, with the transfers' progress noted as the transport does."""
    frames = []
    for frame in link.receive():
        if frame.kind == Kind.DATA:
            link.incoming[Kind.DATA, frame.step, frame.tag].done += len(frame.payload)
        frames.append(frame)
    return frames


def pump(sender: Link, receiver: Link, until: int) -> list[Frame]:
    """Send and receive until so many frames have come."""
    frames: list[Frame] = []
    end = time.monotonic() + 10
    while len(frames) < until and time.monotonic() < end:
        sender.send()
        frames += receive(receiver)
    return frames


def noise(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, size, np.uint8)


def test_what_is_urgent_overtakes_and_nothing_is_mixed_up(pair: Pair) -> None:
    sender, receiver = pair
    slow, urgent = noise(40 * CHUNK_bytes + 5), noise(2 * CHUNK_bytes + 1)
    slow_in, urgent_in = expect(receiver, 1, slow.size), expect(receiver, 2, urgent.size)
    sender.data(outgoing(1, slow, priority=5))
    sender.send()  # some of it is under way
    sender.data(outgoing(2, urgent, priority=1))
    sender.control(encode(Kind.GO, b"{}"))
    frames = pump(sender, receiver, 41 + 3 + 1)
    order = [frame.tag if frame.kind == Kind.DATA else "control" for frame in frames]
    begun = order.index("control")
    assert 0 < begun < 35, "the first transfer had begun, and was not finished first"
    assert order == [1] * begun + ["control"] + [2] * 3 + [1] * (41 - begun)
    np.testing.assert_array_equal(slow_in, slow)
    np.testing.assert_array_equal(urgent_in, urgent)


def test_equal_priorities_go_in_the_order_of_sending(pair: Pair) -> None:
    sender, receiver = pair
    for tag in (3, 1, 2):
        expect(receiver, tag, 10)
        sender.data(outgoing(tag, noise(10)))
    assert [frame.tag for frame in pump(sender, receiver, 3)] == [3, 1, 2]


def test_a_transfer_is_finished_when_its_last_byte_is_with_the_kernel(pair: Pair) -> None:
    sender, receiver = pair
    big = outgoing(1, noise(64 * CHUNK_bytes))
    expect(receiver, 1, 64 * CHUNK_bytes)
    sender.data(big)
    more, finished = sender.send()
    assert more and not finished
    end = time.monotonic() + 10
    while not finished and time.monotonic() < end:
        receive(receiver)
        more, finished = sender.send()
    assert finished == [big] and big.done == 64 * CHUNK_bytes


def test_data_that_nobody_waits_for_is_refused(pair: Pair) -> None:
    sender, receiver = pair
    sender.data(outgoing(9, noise(10)))
    sender.send()
    with pytest.raises(ProtocolError, match="'a' sent data that nobody waits for: step 1, transfer 9"):
        pump(sender, Link(receiver.socket, rank=0, name="a"), 1)


def test_who_takes_over_a_link_gets_what_follows_the_last_frame_that_was_taken(pair: Pair) -> None:
    """As at the start: the meeting stops at GO, and what its sender already sends is for the transport."""
    sender, receiver = pair
    data = noise(3 * CHUNK_bytes)
    array = expect(receiver, 7, data.size)
    sender.control(encode(Kind.GO, b"{}"))
    sender.control(encode_credit(step=1, tag=3, size_bytes=5))
    sender.control(encode(Kind.BYE))
    sender.data(outgoing(7, data))
    frames: list[Frame] = []
    end = time.monotonic() + 10
    while len(frames) < 6 and time.monotonic() < end:
        sender.send()
        for frame in receiver.receive():
            if frame.kind == Kind.DATA:
                receiver.incoming[Kind.DATA, 1, 7].done += len(frame.payload)
            frames.append(frame)
            break  # a taker for each frame
    assert [frame.kind for frame in frames] == [Kind.GO, Kind.CREDIT, Kind.BYE] + [Kind.DATA] * 3
    assert frames[1].credit() == 5
    np.testing.assert_array_equal(array, data)


def test_an_ending_is_seen(pair: Pair) -> None:
    sender, receiver = pair
    sender.socket.close()
    with pytest.raises(EOFError):
        pump(receiver, receiver, 1)


def test_parting_delivers_what_was_queued_last(pair: Pair) -> None:
    """Even with unread bytes on this side, and to a peer that reads late."""
    leaver, peer = pair
    peer.socket.sendall(b"x" * 100)
    leaver.data(outgoing(1, noise(8 * CHUNK_bytes)))
    leaver.send()
    leaver.drop_data()
    leaver.control(encode(Kind.ABORT, b'{"reason": "test"}'))
    expect(peer, 1, 8 * CHUNK_bytes)
    thread = threading.Thread(target=part, args=([leaver],), kwargs={"seconds": 5.0})
    thread.start()
    time.sleep(0.2)
    frames: list[Frame] = []
    with pytest.raises(EOFError):
        while True:
            frames += receive(peer)
    assert frames[-1].kind == Kind.ABORT and frames[-1].json() == {"reason": "test"}
    peer.socket.close()
    thread.join(2)
    assert not thread.is_alive() and leaver.socket.fileno() == -1


def test_parting_from_a_frozen_peer_ends_in_time(pair: Pair) -> None:
    leaver, _ = pair
    leaver.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    leaver.data(outgoing(1, noise(100 * CHUNK_bytes)))
    began = time.monotonic()
    part([leaver], seconds=0.3)
    assert 0.2 < time.monotonic() - began < 1
