"""Blocked buffers: what pack writes is where program.Buffer says, and unpack reads it back."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusetile.box import Box, extents, slices, view4
from fusetile.errors import UserError
from fusetile.program import Buffer
from fusetile.runtime.storage import make_arena, pack, release, unpack


def test_the_arena_is_aligned_and_zero() -> None:
    for size in (1, 64, 1000):
        arena = make_arena(size)
        assert arena.size == size and arena.ctypes.data % 64 == 0 and not arena.any()


def test_no_room_for_the_arena() -> None:
    for size in (1 << 62, 1 << 65):
        with pytest.raises(UserError, match=r"gives no [0-9]+ MB of memory: compile with a smaller memory"):
            make_arena(size)


def test_what_is_released_takes_no_memory_and_the_rest_keeps_its_content() -> None:
    size = 1 << 20
    arena = make_arena(8 * size)
    arena[:] = 7
    keep = [Buffer("b", ((0, size),), "uint8", offset_bytes=at) for at in (5 * size + 64, size)]
    before = resident_bytes()
    release(arena, keep=keep)
    assert before - resident_bytes() > 5 * size
    for buffer in keep:
        assert (arena[buffer.offset_bytes :][:size] == 7).all()


def resident_bytes() -> int:
    """The memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@st.composite
def buffers(draw: st.DrawFn) -> tuple[Buffer, Box]:
    """A buffer of some rank, and a box in it that starts at a block."""
    block = (draw(st.sampled_from([1, 4])), draw(st.sampled_from([1, 3, 8])))
    rank = draw(st.integers(0, 4))
    steps = {0: (), 1: (block[1],), 2: block}.get(rank, (*block, 1, 1)[:rank])
    whole, part = [], []
    for step in steps:
        first = step * draw(st.integers(0, 2))
        size = draw(st.integers(1, 9))
        start = first + step * draw(st.integers(0, (size - 1) // step))
        whole.append((first, first + size))
        part.append((start, draw(st.integers(start + 1, first + size))))
    border = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    width = extents(view4(tuple(whole)))[3] + 2 * border[1]
    pitch = draw(st.sampled_from([0, width, width + 3]))
    dtype = draw(st.sampled_from(["float32", "int32", "uint8"]))
    return Buffer("t", tuple(whole), dtype, block, border, pitch, offset_bytes=64), tuple(part)


@given(buffers())
def test_pack_writes_each_element_to_its_place_and_nothing_else(case: tuple[Buffer, Box]) -> None:
    buffer, box = case
    arena = make_arena(64 + buffer.size_bytes + 64)
    values = np.arange(1, 1 + int(np.prod(extents(box))), dtype=buffer.dtype).reshape(extents(box))
    pack(arena, buffer, box, values)
    stored = arena[64 : 64 + buffer.size_bytes].view(buffer.dtype)
    strides, (b0, b1) = buffer.strides, buffer.block
    rest = stored.copy()
    for index, value in np.ndenumerate(values.reshape(extents(view4(box)))):
        i, j, k, m = (
            at + start - low for at, (start, _), (low, _) in zip(index, view4(box), view4(buffer.box), strict=True)
        )
        place = i // b0 * strides[0] + j // b1 * strides[1] + (k + buffer.border[0]) * strides[2]
        place += (m + buffer.border[1]) * strides[3] + j % b1 * b0 + i % b0
        assert stored[place] == value
        rest[place] = 0
    assert not rest.any() and not arena[:64].any() and not arena[-64:].any()
    np.testing.assert_array_equal(unpack(arena, buffer, box), values)


def test_part_of_a_buffer_and_conversion() -> None:
    buffer = Buffer("w", ((0, 8), (0, 6), (0, 3), (0, 3)), block=(8, 3), offset_bytes=0)
    arena = make_arena(buffer.size_bytes)
    values = np.random.default_rng(0).random((8, 6, 3, 3))
    pack(arena, buffer, buffer.box, values)
    part = ((0, 8), (3, 6), (1, 2), (0, 3))
    np.testing.assert_array_equal(unpack(arena, buffer, part), values.astype(np.float32)[slices(part)])


def test_a_box_inside_a_block_is_refused_and_an_empty_one_is_nothing() -> None:
    buffer = Buffer("x", ((0, 2), (0, 8), (0, 2), (0, 2)), block=(1, 4), offset_bytes=0)
    arena = make_arena(buffer.size_bytes)
    with pytest.raises(ValueError, match="does not start at a block"):
        unpack(arena, buffer, ((0, 2), (2, 4), (0, 2), (0, 2)))
    assert unpack(arena, buffer, ((0, 0),) * 4).size == 0
