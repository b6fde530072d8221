"""Arrays on their way from all ranks to the lowest one: the result at the end, metrics of a validation before.
Used by the I/O thread of the transport."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fusetile.errors import ProtocolError
from fusetile.runtime.link import Incoming, Link, Outgoing
from fusetile.runtime.wire import Frame, Kind, encode, encode_json

Shard = tuple[dict[str, Any], memoryview]  # a description, and the bytes of an array
_LIMIT_bytes = 1 << 32


def give(link: Link, shards: list[Shard], *, last: bool) -> None:
    """Queue the arrays: how many there are, what they are, then their bytes. `last`: nothing follows."""
    link.control(encode(Kind.GATHERED, step=int(last), tag=len(shards)))
    for number, (description, view) in enumerate(shards):
        link.control(encode_json(Kind.SHARD, description | {"bytes": len(view)}, tag=number))
        link.data(Outgoing(Kind.SHARD_DATA, 0, number, view))


class Gathering:
    """What the lowest rank has of the others' arrays."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self.last = False
        self._shards: dict[int, list[Shard]] = {rank: [] for rank in ranks}
        self._done = dict.fromkeys(self._shards, 0)
        self._total: dict[int, int] = {}

    def announce(self, link: Link, frame: Frame) -> None:
        """A GATHERED frame: how many arrays come from this peer."""
        self._total[link.rank] = frame.tag
        self.last = frame.step == 1

    def expect(self, link: Link, frame: Frame) -> None:
        """A SHARD frame: make room for an array."""
        description, shards = frame.json(), self._shards[link.rank]
        size = description.pop("bytes", None)
        if not isinstance(size, int) or not 0 < size < _LIMIT_bytes or frame.tag != len(shards):
            raise ProtocolError(f"array {frame.tag} of {size} bytes, after {len(shards)} arrays")
        if frame.tag >= self._total.get(link.rank, 0):
            raise ProtocolError(f"array {frame.tag} where {self._total.get(link.rank, 0)} were announced")
        view = memoryview(bytearray(size))
        shards.append((description, view))
        link.incoming[Kind.SHARD_DATA, 0, frame.tag] = Incoming(view)

    def arrived(self, link: Link) -> None:
        """An array is complete."""
        self._done[link.rank] += 1

    def has_all_of(self, rank: int) -> bool:
        """Whether all arrays of this rank are here."""
        return self._total.get(rank) == self._done[rank]

    def has_all(self) -> bool:
        """Whether all arrays of all ranks are here."""
        return all(map(self.has_all_of, self._shards))

    def shards(self) -> list[Shard]:
        """The arrays by rank, then in the order in which they were given."""
        return [shard for rank in sorted(self._shards) for shard in self._shards[rank]]
