"""Register tiles cover what they should, and nothing twice."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from fusetile.codegen.conv_tiles import (
    LONGEST_ROW,
    WRITTEN_LINES,
    best_rows,
    block_convolution,
    block_gradient,
    cover_lines,
    cover_pixels,
    machine,
    row_counts,
    written_lines,
)
from fusetile.codegen.targets import TARGETS

machines = st.sampled_from(sorted(TARGETS)).map(lambda name: machine(TARGETS[name], 8))
sizes = st.integers(1, 130)


def check_cover(parts, extent, blocks):
    found = []
    for part in parts:
        tile = part.tile
        assert part.long_tiles * tile.long + part.short_tiles * tile.short == extent
        assert 0 <= tile.short < tile.long
        found += range(part.first, part.first + part.tiles * tile.blocks)
    assert found == list(range(blocks))


@settings(deadline=None)
@given(m=machines, extent=sizes, blocks=sizes)
def test_covers_lines_exactly(m, extent, blocks):
    parts = cover_lines(m, extent, blocks)
    check_cover(parts, extent, blocks)
    assert all(part.tile.long <= m.lines[part.tile.blocks] for part in parts)


@settings(deadline=None)
@given(m=machines, extent=sizes, blocks=sizes, pixel=st.integers(1, 24), lines=st.integers(1, WRITTEN_LINES))
def test_covers_pixels_exactly(m, extent, blocks, pixel, lines):
    written = written_lines(m, pixel=pixel, lines=lines)
    assert (written is None) == (lines > m.written)
    parts = cover_pixels(m, extent, blocks, written)
    check_cover(parts, extent, blocks)
    for tile in (part.tile for part in parts):
        if written is None:
            assert tile.long <= m.pixels[tile.blocks]
        elif tile.long > 1:
            assert tile.long * m.vectors.per_block * tile.blocks + written.held(tile.long) < m.registers


@settings(deadline=None)
@given(pixel=st.integers(1, 24), lines=st.integers(1, WRITTEN_LINES), length=st.integers(1, 9))
def test_written_lines_are_all_multiplied_from_the_register_that_holds_them(pixel, lines, length):
    written = written_lines(machine(TARGETS["pi3"], 8), pixel=pixel, lines=lines)
    assert sorted(line for turn in written.turns for line in turn) == [*range(lines)]
    for turn in written.turns:
        vectors = written.vectors(length, turn)
        for line, p in product(turn, range(length)):
            place, lane = eval(written.register(line, turn), {"p": p})
            assert vectors[(p * pixel + line) // written.lanes] == place < written.places(length)
            assert (p * pixel + line) % written.lanes == lane


@settings(deadline=None)
@given(m=machines, rows=sizes, columns=sizes, blocks=sizes, steps=sizes)
def test_rows_are_merged_for_fewer_tiles_and_never_into_very_long_ones(m, rows, columns, blocks, steps):
    merged = best_rows(m, row_counts(rows), columns, blocks, steps=steps)
    assert rows % merged == 0 and (merged == 1 or merged * columns <= LONGEST_ROW)


def test_a_small_map_is_one_row():
    for name in ("avx2", "avx512"):
        assert best_rows(machine(TARGETS[name], 8), (1, 7), 7, 8, steps=64) == 7


@settings(deadline=None)
@given(m=machines, rows=sizes, columns=sizes, k=sizes, c=sizes, taps=st.integers(1, 49))
def test_blocking_is_legal(m, rows, columns, k, c, taps):
    filter_block = taps * m.vectors.block**2
    for part in cover_pixels(m, columns, k, written_lines(m, pixel=8, lines=24)):
        cut = block_convolution(
            m, part, rows=rows, columns=columns, blocks=c, filter_block=filter_block, x_row=columns * m.vectors.block
        )
        assert 1 <= cut.chunk <= c and 1 <= cut.block_rows <= rows
    for part in cover_lines(m, m.vectors.block, k):
        parts = block_gradient(
            m, part, rows=rows, columns=columns, blocks=c, k_tiles=part.tiles, filter_block=filter_block
        )
        assert 1 <= parts.inner_rows <= parts.outer_rows <= parts.part_rows <= rows
