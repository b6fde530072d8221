"""The protocol: frames survive any cut of the stream; damage never passes."""

from __future__ import annotations

import struct
from bisect import bisect
from itertools import accumulate
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusetile.errors import ProtocolError
from fusetile.runtime.wire import (
    VERSION,
    CHUNK_bytes,
    Decoder,
    Header,
    HEADER_bytes,
    Kind,
    VersionMismatch,
    encode,
    encode_credit,
    encode_heartbeat,
    encode_json,
)

FRAMES = [
    encode_json(Kind.HELLO, {"rank": 1}),
    encode(Kind.GO, b"{}"),
    encode_credit(step=3, tag=7, size_bytes=1 << 33),
    encode(Kind.DATA, b"abcdef", step=3, tag=7),
    encode(Kind.DATA, b"gh", step=3, tag=7),
    encode_heartbeat(progress=1 << 40, activity=1),
    encode(Kind.BYE),
]
STREAM = b"".join(FRAMES)
Event = tuple[Kind, int, int, bytes]


class Receiver:
    """A decoder whose DATA goes into `arena`, one piece after another."""

    def __init__(self) -> None:
        self.arena, self.filled = bytearray(64), 0
        self.decoder = Decoder(self._place)

    def _place(self, head: Header) -> memoryview:
        self.filled += head.length
        return memoryview(self.arena)[self.filled - head.length : self.filled]

    def feed(self, piece: bytes) -> list[Event]:
        """What a socket would do that has `piece` to give: fill the views, as often as it takes."""
        events = []
        while piece:
            count = 0
            for view in self.decoder.views():
                part = piece[count : count + len(view)]
                view[: len(part)] = part
                count += len(part)
            piece = piece[count:]
            events += [(f.kind, f.step, f.tag, bytes(f.payload)) for f in self.decoder.advance(count)]
        return events


WHOLE = Receiver().feed(STREAM)


def test_a_stream_is_decoded() -> None:
    assert [kind for kind, *_ in WHOLE] == [
        Kind.HELLO, Kind.GO, Kind.CREDIT, Kind.DATA, Kind.DATA, Kind.HEARTBEAT, Kind.BYE
    ]  # fmt: skip
    assert WHOLE[3:5] == [(Kind.DATA, 3, 7, b"abcdef"), (Kind.DATA, 3, 7, b"gh")]


def test_payloads_are_read_back() -> None:
    frames = []
    receiver = Receiver()
    for piece in (FRAMES[0], FRAMES[2], FRAMES[5]):
        for view in receiver.decoder.views():
            view[:] = piece[: len(view)]
        assert not list(receiver.decoder.advance(HEADER_bytes))
        receiver.decoder.views()[0][:] = piece[HEADER_bytes:]
        frames += list(receiver.decoder.advance(len(piece) - HEADER_bytes))
    assert frames[0].json() == {"rank": 1}
    assert frames[1].credit() == 1 << 33
    assert frames[2].heartbeat() == (1 << 40, 1)


@given(st.lists(st.integers(1, 60)))
def test_any_cut_gives_the_same_events(cuts: list[int]) -> None:
    receiver, events, rest = Receiver(), [], STREAM
    for size in [*cuts, len(STREAM)]:
        events += receiver.feed(rest[:size])
        rest = rest[size:]
    assert events == WHOLE
    assert receiver.arena[: receiver.filled] == b"abcdefgh"


def test_byte_by_byte() -> None:
    receiver = Receiver()
    assert [event for i in range(len(STREAM)) for event in receiver.feed(STREAM[i : i + 1])] == WHOLE


@given(st.integers(0, len(STREAM) - 1), st.integers(1, 255))
def test_damage_is_found_no_later_than_at_the_end_of_its_frame(position: int, flip: int) -> None:
    damaged = bytearray(STREAM)
    damaged[position] ^= flip
    starts = [0, *accumulate(map(len, FRAMES))]
    hit = bisect(starts, position) - 1  # the frame that is damaged
    receiver = Receiver()
    assert receiver.feed(bytes(damaged[: starts[hit]])) == WHOLE[:hit]
    with pytest.raises(ProtocolError):
        receiver.feed(bytes(damaged[starts[hit] : starts[hit + 1]]))


@given(st.binary(min_size=HEADER_bytes, max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(ProtocolError):
        Receiver().feed(noise)


def forge(*, kind: int, length: int, version: int = VERSION) -> bytes:
    head = struct.pack("!4sBBHIIII", b"ftil", version, kind, 0, 0, 0, length, 0)
    return head + struct.pack("!I", crc32(head))


@pytest.mark.parametrize(
    ("kind", "length"), [(Kind.DATA, CHUNK_bytes + 1), (Kind.DATA, 0), (Kind.HELLO, 1 << 31), (Kind.GO, 1)]
)
def test_lengths_are_bounded_before_anything_is_allocated(kind: Kind, length: int) -> None:
    with pytest.raises(ProtocolError, match="are allowed"):
        Receiver().feed(forge(kind=kind, length=length))


def test_unknown_kinds_and_versions() -> None:
    with pytest.raises(ProtocolError, match="unknown kind 99"):
        Receiver().feed(forge(kind=99, length=0))
    with pytest.raises(VersionMismatch, match=r"version 1 .* this device version 3") as caught:
        Receiver().feed(forge(kind=Kind.HELLO, length=2, version=1))
    assert caught.value.exit_status == 2


def test_data_beyond_its_place_is_refused() -> None:
    decoder = Decoder(lambda head: memoryview(bytearray(3)))
    decoder.views()[0][:] = encode(Kind.DATA, b"four")[:HEADER_bytes]
    with pytest.raises(ProtocolError, match="room for 3"):
        list(decoder.advance(HEADER_bytes))


def test_a_frame_is_handled_before_the_place_of_the_next_is_asked_for() -> None:
    """Its handling may be what makes the place."""
    places: dict[int, memoryview] = {}
    decoder = Decoder(lambda head: places[head.tag])
    stream = encode_json(Kind.SHARD, {}, tag=5) + encode(Kind.SHARD_DATA, b"xyz", tag=5)
    while stream:
        count = 0
        for view in decoder.views():
            part = stream[count : count + len(view)]
            view[: len(part)] = part
            count += len(part)
        stream = stream[count:]
        for frame in decoder.advance(count):
            if frame.kind == Kind.SHARD:
                places[5] = memoryview(bytearray(3))
    assert bytes(places[5]) == b"xyz"


@pytest.mark.parametrize("payload", [b"[]", b"{,}", b"\xff\xfe"])
def test_json_that_is_none(payload: bytes) -> None:
    receiver = Receiver()
    frames = []
    piece = encode(Kind.HELLO, payload)
    for size in (HEADER_bytes, len(payload)):
        receiver.decoder.views()[0][:] = piece[:size]
        piece = piece[size:]
        frames += list(receiver.decoder.advance(size))
    with pytest.raises(ProtocolError):
        frames[0].json()
