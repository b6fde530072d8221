"""Copies, sums and zeros of boxes in buffers of every kind."""

from __future__ import annotations

import numpy as np
import pytest

from fusetile.box import Box, extents
from fusetile.codegen.move import accumulate, copy, zero, zero_border
from fusetile.program import Buffer
from fusetile.runtime.storage import pack, unpack
from tests.codegen.harness import inside, place, run_calls, seeded, stored

MAP: Box = ((0, 2), (8, 27), (3, 12), (1, 9))
LAYOUTS = {
    "map": (MAP, ((0, 2), (8, 27), (5, 7), (1, 9)), (1, 8), (2, 1)),
    "column": (MAP, ((0, 2), (8, 27), (3, 12), (7, 9)), (1, 8), (1, 2)),
    "pixels": (((0, 1), (0, 3), (0, 6), (0, 5)), ((0, 1), (0, 3), (1, 4), (2, 5)), (1, 3), (1, 1)),
    "weights": (((8, 24), (0, 11), (0, 3), (0, 3)), ((16, 24), (8, 11), (0, 3), (0, 3)), (8, 8), (0, 0)),
    "vector": (((0, 20_000),), ((8, 19_999),), (1, 1), (0, 0)),
    "scalar": (((0, 1),), ((0, 1),), (1, 1), (0, 0)),
}
CASES = [(layout, "float32") for layout in LAYOUTS] + [("map", "uint8"), ("map", "float64"), ("vector", "int32")]


def filled(layout: str, dtype: str) -> tuple[list[Buffer], np.ndarray, Box, np.ndarray, np.ndarray]:
    box, part, block, border = LAYOUTS[layout]
    source = Buffer("source", box, dtype, block, border)
    staging = Buffer("staging", part, dtype, block)
    buffers, arena = place([source, staging])
    random = seeded()
    values = random.integers(0, 100, extents(box)).astype(dtype)
    pack(arena, buffers[0], box, values)
    start = random.integers(0, 100, extents(part)).astype(dtype)
    pack(arena, buffers[1], part, start)
    moved = values[tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(part, box, strict=True))]
    return buffers, arena, part, moved, start


@pytest.mark.parametrize(("layout", "dtype"), CASES)
def test_copy_to_staging_and_add_back(layout: str, dtype: str) -> None:
    buffers, arena, part, moved, _ = filled(layout, dtype)
    source, staging = buffers
    expected = arena.copy()
    pack(expected, staging, part, moved)
    inside(expected, source, part)[...] += inside(expected, staging, part)
    for threads in (1, 2):
        got = arena.copy()
        run_calls([copy(source, staging, part), accumulate(staging, source, part)], buffers, got, threads=threads)
        assert np.array_equal(got, expected)


@pytest.mark.parametrize(("layout", "dtype"), CASES)
def test_zero(layout: str, dtype: str) -> None:
    buffers, arena, *_ = filled(layout, dtype)
    source, staging = buffers
    stored(arena, source)[...] = 1
    kept = unpack(arena, source, source.box)
    run_calls([zero_border(source), zero(staging)], buffers, arena, threads=2)
    assert not stored(arena, staging).any()
    assert np.array_equal(unpack(arena, source, source.box), kept)
    inside(arena, source, source.box)[...] = 0
    assert not stored(arena, source).any()
    assert (arena[:64] == 0xFF).all() and (arena[-64:] == 0xFF).all()
