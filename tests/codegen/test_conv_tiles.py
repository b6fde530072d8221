"""Register tiles cover what they should, and nothing twice."""

from __future__ import annotations

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
    parts = cover_pixels(m, extent, blocks, pixel=pixel, lines=lines)
    check_cover(parts, extent, blocks)
    for tile in (part.tile for part in parts):
        if lines > m.written:
            assert tile.long <= m.pixels[tile.blocks]
        elif tile.long > 1:
            inputs = {(p * pixel + i) // m.vectors.lanes for p in range(tile.long) for i in range(lines)}
            assert tile.long * m.vectors.per_block * tile.blocks + len(inputs) < m.registers


@settings(deadline=None)
@given(m=machines, rows=sizes, columns=sizes, blocks=sizes)
def test_rows_are_merged_for_fewer_tiles_and_never_into_very_long_ones(m, rows, columns, blocks):
    merged = best_rows(m, row_counts(rows), columns, blocks)
    assert rows % merged == 0 and (merged == 1 or merged * columns <= LONGEST_ROW)


def test_a_small_map_is_one_row():
    for name in ("avx2", "avx512"):
        assert best_rows(machine(TARGETS[name], 8), (1, 7), 7, 8) == 7


@settings(deadline=None)
@given(m=machines, rows=sizes, columns=sizes, k=sizes, c=sizes, taps=st.integers(1, 49))
def test_blocking_is_legal(m, rows, columns, k, c, taps):
    filter_block = taps * m.vectors.block**2
    for part in cover_pixels(m, columns, k, pixel=8, lines=24):
        cut = block_convolution(
            m, part, rows=rows, columns=columns, blocks=c, filter_block=filter_block, x_row=columns * m.vectors.block
        )
        assert 1 <= cut.chunk <= c and 1 <= cut.block_rows <= rows
    for part in cover_lines(m, m.vectors.block, k):
        parts = block_gradient(
            m, part, rows=rows, columns=columns, blocks=c, k_tiles=part.tiles, filter_block=filter_block
        )
        assert 1 <= parts.inner_rows <= parts.outer_rows <= parts.part_rows <= rows
