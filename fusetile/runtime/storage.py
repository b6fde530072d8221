"""The arena, and the way between canonical arrays and blocked buffers. See `program` for how a buffer is stored."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from contextlib import suppress

import numpy as np

from fusetile.box import Box, Interval, extents, view4, volume
from fusetile.errors import UserError
from fusetile.program import Buffer


def make_arena(size_bytes: int) -> np.ndarray:
    """`size_bytes` zeros (uint8), whose memory is taken when it is first touched. They start at a page, hence at a
    multiple of the alignment which kernels assume. Raises UserError if the system does not give so much."""
    try:
        pages = mmap.mmap(-1, max(1, size_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:  # OverflowError: more than a 32-bit system can address
        raise UserError(
            f"this device gives no {size_bytes / 1e6:.0f} MB of memory: compile with a smaller memory in cluster.toml"
        ) from error
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.ndarray((size_bytes,), np.uint8, pages)


def release(arena: np.ndarray, *, keep: Iterable[Buffer]) -> None:
    """Give the memory of an arena back to the system, but for the buffers `keep`; the rest reads as zeros from then
    on, or as before."""
    assert isinstance(arena.base, mmap.mmap)
    start = 0
    for buffer in sorted(keep, key=lambda buffer: buffer.offset_bytes):
        _release_pages(arena.base, start, buffer.offset_bytes)
        start = max(start, buffer.offset_bytes + buffer.size_bytes)
    _release_pages(arena.base, start, arena.size)


def _release_pages(pages: mmap.mmap, start: int, stop: int) -> None:
    """The whole pages in [start, stop) bytes."""
    first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if first < end:
        pages.madvise(mmap.MADV_DONTNEED, first, end - first)


def clear(arena: np.ndarray, buffer: Buffer) -> None:
    """Fill a buffer with zeros, what pads it included."""
    arena[buffer.offset_bytes :][: buffer.size_bytes] = 0


class Place:
    """A box of a buffer in the arena, looked up once for what is written or read every step."""

    def __init__(self, arena: np.ndarray, buffer: Buffer, box: Box) -> None:
        self._shape, self._shape4, self._dtype = extents(box), extents(view4(box)), buffer.dtype
        self._parts = list(_parts(arena, buffer, box))

    def write(self, values: np.ndarray) -> None:
        """Write `values`, the canonical array of the box; converts the dtype. Nothing else of the buffer is touched:
        border and pad lanes stay as they are."""
        for stored, canonical in self._pairs(np.asarray(values)):
            stored[...] = canonical

    def read(self) -> np.ndarray:
        """A canonical array (a copy, in the tensor's rank) of the box."""
        values = np.empty(self._shape, self._dtype)
        for stored, canonical in self._pairs(values):
            canonical[...] = stored
        return values

    def _pairs(self, values: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        values = values.reshape(self._shape4)
        for stored, part in self._parts:
            yield stored, values[part].reshape(stored.shape)


def pack(arena: np.ndarray, buffer: Buffer, box: Box, values: np.ndarray) -> None:
    """Write the canonical array of a box of a buffer, once."""
    Place(arena, buffer, box).write(values)


def unpack(arena: np.ndarray, buffer: Buffer, box: Box) -> np.ndarray:
    """A copy of a box of a buffer as a canonical array, once."""
    return Place(arena, buffer, box).read()


def _parts(arena: np.ndarray, buffer: Buffer, box: Box) -> Iterator[tuple[np.ndarray, tuple[slice, slice]]]:
    """Views [d0/b0, b0, d1/b1, b1, d2, d3] of the buffer, and which part of the canonical array, as four dimensions,
    each of them is: up to four, because the last block of either blocked dimension may be filled in part."""
    if volume(box) == 0:
        return
    stored = arena[buffer.offset_bytes :][: buffer.size_bytes].view(buffer.dtype).reshape(buffer.storage_shape)
    box4, origin = view4(box), view4(buffer.box)
    rows, columns = (
        slice(start - low + border, stop - low + border)
        for (start, stop), (low, _), border in zip(box4[2:], origin[2:], buffer.border, strict=True)
    )
    for blocks0, lanes0, part0 in _blocks(box4[0], origin[0], buffer.block[0]):
        for blocks1, lanes1, part1 in _blocks(box4[1], origin[1], buffer.block[1]):
            inside = stored[blocks0, blocks1, rows, columns, :lanes1, :lanes0].transpose(0, 5, 1, 4, 2, 3)
            yield inside, (part0, part1)


def _blocks(interval: Interval, origin: Interval, block: int) -> Iterator[tuple[slice, int, slice]]:
    """(blocks, lanes used in each, the elements of the interval): the full blocks, then the one that is not."""
    start, stop = interval[0] - origin[0], interval[1] - origin[0]
    if start % block:
        raise ValueError(f"{interval} does not start at a block of {block} in {origin}")
    first, full = start // block, (stop - start) // block
    rest = (stop - start) % block
    if full:
        yield slice(first, first + full), block, slice(0, full * block)
    if rest:
        yield slice(first + full, first + full + 1), rest, slice(full * block, full * block + rest)
