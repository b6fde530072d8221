"""One node has the data, the source: what it sends the others of every batch.

A batch goes to each node as one message: its boxes of the batch, one after the other, as they are stored (images as
bytes; what is made of them, the node does itself). The message for the next batch travels while a step computes. A
validation's batches have tags of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from fusetile.box import Box, contains, extents, slices, volume, whole
from fusetile.errors import ProtocolError
from fusetile.program import Feed, Routine
from fusetile.runtime.io_thread import SAMPLES, SAMPLES_tags
from fusetile.runtime.transport import Transport

Wanted = list[tuple[str, Box]]
"""What a node wants of every batch: boxes of the arrays of these names."""


def tag_of(rank: int, validation: bool, batch: int) -> int:
    """Of a batch's message to a node: two may be on their way at a time."""
    return SAMPLES + SAMPLES_tags * rank + 2 * validation + batch % 2


def wanted_by(routine: Routine) -> Wanted:
    """By the feeds of this node."""
    feeds = [feed for feed in routine.feeds if feed.role in ("input", "target") and volume(feed.buffer.box)]
    return [(feed.key, feed.buffer.box) for feed in feeds]


def read_wanted(found: Any, feeds: Sequence[Feed]) -> Wanted:
    """What another node says that it wants. Raises ProtocolError if there is no such thing."""
    shapes = {feed.key: feed.shape for feed in feeds}
    try:
        wanted = [(str(key), tuple((int(start), int(stop)) for start, stop in box)) for key, box in found]
        right = all(contains(whole(shapes[key]), box) and volume(box) for key, box in wanted)
    except (KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise ProtocolError(f"a node wants {found} of the samples, which have {shapes}")
    return wanted


class Outlet:
    """The source's end: to the nodes that want something, by rank."""

    def __init__(self, transport: Transport, wanted: Mapping[int, Wanted], *, validation: bool) -> None:
        self._transport, self._validation = transport, validation
        self._wanted = {rank: boxes for rank, boxes in wanted.items() if boxes}
        self._sent: set[int] = set()  # batches that may still be on their way

    def send(self, batch: int, full: Mapping[str, np.ndarray]) -> None:
        """To all nodes, from any thread: `full` are the arrays of the whole batch."""
        for rank, boxes in self._wanted.items():
            parts = [np.ascontiguousarray(full[key][slices(box)]) for key, box in boxes]
            message = b"".join(part.reshape(-1).view(np.uint8).data for part in parts)
            self._transport.send_samples(rank, tag_of(rank, self._validation, batch), batch, memoryview(message))
        self._sent.add(batch)

    def await_room(self, batch: int) -> None:
        """Wait until all nodes have the batch before the last one, whose tags this one will have."""
        if batch - 2 in self._sent:
            self._transport.finish([tag_of(rank, self._validation, batch) for rank in self._wanted])
            self._sent.discard(batch - 2)


class Inlet:
    """A node's end: messages of `wanted` boxes, of arrays of these types."""

    def __init__(self, transport: Transport, wanted: Wanted, types: Mapping[str, str], *, rank: int, validation: bool):
        self._transport, self._rank, self._validation = transport, rank, validation
        self._parts = [(extents(box), np.dtype(types[key])) for key, box in wanted]
        self._bytes = sum(prod(shape) * dtype.itemsize for shape, dtype in self._parts)
        self._coming: dict[int, bytearray] = {}

    def expect(self, batch: int) -> None:
        """Make room for a batch."""
        if self._bytes and batch not in self._coming:
            self._coming[batch] = place = bytearray(self._bytes)
            self._transport.recv_samples(tag_of(self._rank, self._validation, batch), batch, memoryview(place))

    def take(self, batch: int) -> list[np.ndarray]:
        """The boxes of a batch, once it is there."""
        self.expect(batch)
        if not self._bytes:
            return []
        self._transport.finish([tag_of(self._rank, self._validation, batch)])
        place, start, found = self._coming.pop(batch), 0, []
        for shape, dtype in self._parts:
            found.append(np.frombuffer(place, dtype, prod(shape), start).reshape(shape))
            start += found[-1].nbytes
        return found
