"""The protocol between two devices, with no socket in it: bytes -> frames.

A stream of frames, each a header of 28 bytes, big-endian, and a payload:

    magic "ftil" (4 bytes), version (1), kind (1), zero (2), step (4), tag (4), length of the payload (4),
    CRC-32 of the payload (4), CRC-32 of the 24 bytes of header before it (4)

A header is checked before anything is done about its payload: version, then its CRC, then the kind's bounds on the
length. The first frame each way is HELLO. DATA travels only against credit, so that its place is known when it comes:
`Decoder.views` says where the next bytes are to be received, which for data is the arena itself.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any
from zlib import crc32

from fusetile.errors import ProtocolError

MAGIC = b"ftil"
VERSION = 3
CHUNK_bytes = 1 << 14


class Kind(IntEnum):
    """Frame kinds. Step and tag are 0 where they are not mentioned."""

    HELLO = 1  # JSON: who I am and what I run
    READY = 2  # to the lowest rank, JSON: all my connections are up, and I can start from these steps
    GO = 3  # from the lowest rank, JSON: everybody's are, and the start is this
    CREDIT = 4  # step (here the number of the turn, see Transport), tag; u64: so many bytes of this transfer may come
    DATA = 5  # step (the turn), tag: the transfer's next bytes
    HEARTBEAT = 6  # u64 progress, u8 state (Activity)
    SHARD = 7  # tag: number of the shard; JSON that describes an array of the result
    SHARD_DATA = 8  # tag: number of the shard; its next bytes
    GATHERED = 9  # tag: how many shards I send; step: 1 if they are the last
    ABORT = 10  # JSON: why the run ends
    BYE = 11  # I have done all I had to; nothing follows
    VERDICT = 12  # from the lowest rank, JSON: what follows from all shards that are not the last


_LENGTHS = {  # bounds of the payload, in bytes
    Kind.HELLO: (2, 1 << 16),
    Kind.READY: (2, 4096),
    Kind.GO: (2, 4096),
    Kind.CREDIT: (8, 8),
    Kind.DATA: (1, CHUNK_bytes),
    Kind.HEARTBEAT: (9, 9),
    Kind.SHARD: (2, 4096),
    Kind.SHARD_DATA: (1, CHUNK_bytes),
    Kind.GATHERED: (0, 0),
    Kind.ABORT: (2, 4096),
    Kind.BYE: (0, 0),
    Kind.VERDICT: (2, 4096),
}
IN_PLACE = (Kind.DATA, Kind.SHARD_DATA)  # the receiver has a place for these payloads

_HEAD = struct.Struct("!4sBBHIIII")
_CRC = struct.Struct("!I")
HEADER_bytes = _HEAD.size + _CRC.size
_CREDIT = struct.Struct("!Q")
_HEARTBEAT = struct.Struct("!QB")


class VersionMismatch(ProtocolError):
    """The peer runs another version of fusetile."""

    exit_status = 2


@dataclass(frozen=True, slots=True)
class Header:
    """What precedes a payload of `length` bytes."""

    kind: Kind
    step: int
    tag: int
    length: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Frame:
    """A whole frame whose checksums are right. The payload of a frame IN_PLACE is the place it was received into."""

    kind: Kind
    step: int
    tag: int
    payload: memoryview

    def json(self) -> dict[str, Any]:
        """The payload of a frame of JSON."""
        try:
            value = json.loads(bytes(self.payload))
        except ValueError as error:
            raise ProtocolError(f"a {self.kind.name} frame that is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ProtocolError(f"a {self.kind.name} frame that holds {value!r}")
        return value

    def credit(self) -> int:
        """Bytes that a CREDIT allows."""
        return int(_CREDIT.unpack(self.payload)[0])

    def heartbeat(self) -> tuple[int, int]:
        """Progress and activity of a HEARTBEAT."""
        progress, activity = _HEARTBEAT.unpack(self.payload)
        return progress, activity


def header(kind: Kind, payload: bytes | memoryview = b"", *, step: int = 0, tag: int = 0) -> bytes:
    """The header that goes before this payload."""
    head = _HEAD.pack(MAGIC, VERSION, kind, 0, step, tag, len(payload), crc32(payload))
    return head + _CRC.pack(crc32(head))


def encode(kind: Kind, payload: bytes = b"", *, step: int = 0, tag: int = 0) -> bytes:
    """A whole frame."""
    return header(kind, payload, step=step, tag=tag) + payload


def encode_json(kind: Kind, value: dict[str, Any], *, tag: int = 0) -> bytes:
    """A frame of JSON."""
    return encode(kind, json.dumps(value).encode(), tag=tag)


def encode_credit(*, step: int, tag: int, size_bytes: int) -> bytes:
    """A CREDIT frame."""
    return encode(Kind.CREDIT, _CREDIT.pack(size_bytes), step=step, tag=tag)


def encode_heartbeat(*, progress: int, activity: int) -> bytes:
    """A HEARTBEAT frame."""
    return encode(Kind.HEARTBEAT, _HEARTBEAT.pack(progress, activity))


class Decoder:
    """The receiving end of a stream.

    Receive bytes into `views()`, in order, then pass the number of bytes to `advance` and handle the frames that it
    yields, one by one: `place(header)`, which says where the payload of a frame IN_PLACE goes, is asked after the
    frames before it were handled. Whoever stops in between leaves the rest of the stream whole: `frames` goes on with
    what was received, and must have been exhausted before the next `views()`. Raises ProtocolError, after which the
    stream is of no more use.
    """

    def __init__(self, place: Callable[[Header], memoryview]) -> None:
        self._place = place
        self._head = memoryview(bytearray(HEADER_bytes))
        self._head_bytes = 0
        self._header: Header | None = None
        self._payload = self._rest = memoryview(b"")

    def views(self) -> list[memoryview]:
        """Where the next bytes go: the rest of a payload, then the next header, so that one system call gets both."""
        head = self._head[self._head_bytes :]
        return [head] if self._header is None else [self._rest, head]

    def advance(self, count: int) -> Iterator[Frame]:
        """`count` bytes were received into the views: the frames that they complete."""
        took = min(count, len(self._rest))
        self._rest = self._rest[took:]
        self._head_bytes += count - took  # now, not after a frame was handled: its handler may take no more from here
        return self.frames()

    def frames(self) -> Iterator[Frame]:
        """The frames that were received and not yet handled."""
        while self._header is not None or self._head_bytes == HEADER_bytes:
            if self._header is None:
                self._head_bytes = 0
                self._header = self._read_header()
                self._payload = self._rest = self._target(self._header)
            if len(self._rest):
                return
            yield self._finish(self._header)

    def _read_header(self) -> Header:
        magic, version, kind, _, step, tag, length, checksum = _HEAD.unpack_from(self._head)
        if magic != MAGIC:
            raise ProtocolError(
                f"the peer does not speak fusetile's protocol: it sent {magic!r} where {MAGIC!r} belongs"
            )
        if version != VERSION:
            raise VersionMismatch(
                f"the peer speaks version {version} of the protocol, this device version {VERSION}: "
                "install the same version of fusetile on all devices"
            )
        if crc32(self._head[: _HEAD.size]) != _CRC.unpack_from(self._head, _HEAD.size)[0]:
            raise ProtocolError("a frame header arrived damaged: its checksum is wrong")
        if kind not in _LENGTHS:
            raise ProtocolError(f"a frame of unknown kind {kind}")
        low, high = _LENGTHS[kind]
        if not low <= length <= high:
            raise ProtocolError(f"a {Kind(kind).name} frame of {length} bytes; {low} to {high} are allowed")
        return Header(Kind(kind), step, tag, length, checksum)

    def _target(self, head: Header) -> memoryview:
        if head.kind not in IN_PLACE:
            return memoryview(bytearray(head.length))
        place = self._place(head)
        if len(place) != head.length:
            raise ProtocolError(f"{head.length} bytes for transfer {head.tag} that has room for {len(place)}")
        return place

    def _finish(self, head: Header) -> Frame:
        self._header = None
        if crc32(self._payload) != head.checksum:
            raise ProtocolError(
                f"a {head.kind.name} frame (step {head.step}, tag {head.tag}) arrived damaged: checksum"
            )
        return Frame(head.kind, head.step, head.tag, self._payload)
