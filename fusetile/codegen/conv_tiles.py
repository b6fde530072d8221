"""How convolutions are cut for a CPU: register tiles and cache blocking. The one place with numbers about CPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from fusetile.codegen.conv_source import Written
from fusetile.codegen.register_tile import Tile, Vectors
from fusetile.codegen.targets import Target

LONGEST_ROW = 256  # pixels; longer rows leave nothing to choose for caches and threads
ROWS_GAIN, ROW_cycles = 0.01, 35  # what merging rows must gain; what a row costs on ARM besides its tiles
WRITTEN_LINES, WRITTEN_LINES_16, WEIGHT_REGISTERS = 36, 21, 2  # with 16 registers: a row of 7 taps of 3 channels
MIN_UNITS = 16  # work units per call that keep four threads evenly busy


@dataclass(frozen=True, slots=True)
class Machine:
    """What the choices below need to know of a CPU, for one channel block.

    `registers` is the number of vector registers. `pixels` and `lines` give, per number of channel blocks in a tile,
    the longest tile of a convolution and of a weight gradient that needs no stack. `fma` and `loads` are vector
    operations per cycle, `latency` that of an fma in cycles. `inner_bytes` and `outer_bytes` are the cache nearest to a
    core and its share of the next; `weights_bytes` is how much of the weights one may stream over. `written` is the
    most lines of a tap that kernels have written out, `row` what a row of pixels costs besides its tiles, in cycles,
    where that was counted.
    """

    vectors: Vectors
    registers: int
    pixels: Mapping[int, int]
    lines: Mapping[int, int]
    fma: float
    loads: float
    latency: float
    inner_bytes: int
    outer_bytes: int
    weights_bytes: int
    written: int = 0
    row: float = 0


@dataclass(frozen=True, slots=True)
class Cover:
    """`tiles` register tiles of channel blocks from block `first` on; each row is long_tiles long and short_tiles short
    tiles."""

    tile: Tile
    first: int
    tiles: int
    long_tiles: int
    short_tiles: int


@dataclass(frozen=True, slots=True)
class Blocking:
    """Of a convolution: input-channel blocks per chunk, rows per work unit, and whether output channels are the outer
    loop over work units."""

    chunk: int
    block_rows: int
    channels_outer: bool


@dataclass(frozen=True, slots=True)
class Parts:
    """Of a weight gradient: rows per partial sum, per turn over all work units, and per pass over a register tile;
    input-channel blocks per work unit."""

    part_rows: int
    outer_rows: int
    inner_rows: int
    unit_blocks: int


_KIB = 1024
_CACHES = {  # inner, outer, weights
    "pi3": (32 * _KIB, 192 * _KIB, 16 * _KIB),
    "pi4": (32 * _KIB, 256 * _KIB, 24 * _KIB),
    "pi5": (64 * _KIB, 512 * _KIB, 48 * _KIB),
    "arm64": (32 * _KIB, 256 * _KIB, 24 * _KIB),
    "armv7": (32 * _KIB, 192 * _KIB, 16 * _KIB),
    "avx2": (32 * _KIB, 512 * _KIB, 96 * _KIB),
    "avx512": (32 * _KIB, 1024 * _KIB, 256 * _KIB),
}


@cache
def machine(target: Target, block: int) -> Machine:
    """The numbers for a target and a plan's channel block."""
    inner, outer, weights = _CACHES[target.name]
    caches = {"inner_bytes": inner, "outer_bytes": outer, "weights_bytes": weights}
    if target.width == 4:
        vectors = Vectors(block, 4, lanes=4, wide=target.registers == 32)
        arm = {"fma": 1, "loads": 1, "latency": 4, "row": ROW_cycles}
        if target.registers == 16:
            return Machine(vectors, 16, {1: 4}, {1: 6}, **arm, **caches, written=WRITTEN_LINES_16)
        return Machine(vectors, 32, {1: 7}, {1: 12}, **arm, **caches, written=WRITTEN_LINES)
    vectors = Vectors(block, min(target.width, block), lanes=0)
    if target.registers == 32:
        pixels, lines = {1: 28, 2: 14, 4: 6}, {1: 24, 2: 14, 4: 6}
        return Machine(vectors, 32, pixels, lines, fma=2, loads=2, latency=4, **caches)
    # 4 cycles, but the 8 sums that would fill them never quite do
    return Machine(vectors, 16, {1: 12, 2: 6, 3: 4}, {1: 12, 2: 6, 3: 4}, fma=2, loads=2, latency=5, **caches)


def cover_pixels(m: Machine, columns: int, blocks: int, written: Written | None = None) -> list[Cover]:
    """Register tiles for rows of so many pixels and blocks of output channels."""
    return _cover(m, columns, blocks, _longest(m, written) if written else m.pixels, unit=1)[1]


def written_lines(m: Machine, *, pixel: int, lines: int) -> Written | None:
    """How kernels have the lines of a row of pixels written out; None if they are too many. Pixels that begin with a
    vector are loaded by pairs of vectors, which are one instruction, and leave registers for more pixels."""
    if lines > m.written:
        return None
    lanes = m.vectors.lanes
    piece = next((n for n in (2 * lanes, lanes) if pixel % n == lines % n == 0), 0)
    return Written(pixel, lines, lanes, piece)


def _longest(m: Machine, written: Written) -> dict[int, int]:
    """The longest tile whose sums, lines and some weights the registers hold."""
    free = m.registers - WEIGHT_REGISTERS
    fitting = (n for n in range(2, free) if n * m.vectors.per_block + written.held(n) <= free)
    return {1: max(fitting, default=1)}


def row_counts(rows: int) -> list[int]:
    """How many of so many rows may be taken as one, so that all have the same length."""
    return [n for n in range(1, rows + 1) if rows % n == 0]


def best_rows(m: Machine, counts: Sequence[int], columns: int, blocks: int, *, steps: int) -> int:
    """How many rows of so many pixels, of the counts that are possible, to take as one for the cheapest tiles. `steps`
    are those of the inner loop."""

    def cost(rows: int) -> float:
        cycles, covers = _cover(m, rows * columns, blocks, m.pixels, unit=1)
        return (cycles + m.row / steps * sum(cover.tiles for cover in covers)) / rows

    short = [rows for rows in counts if rows == 1 or rows * columns <= LONGEST_ROW]
    best = min(short, key=lambda rows: (cost(rows), rows))
    return best if cost(best) < (1 - ROWS_GAIN) * cost(1) else 1


def cover_lines(m: Machine, lines: int, blocks: int) -> list[Cover]:
    """Register tiles for so many lines and blocks of output channels of a weight gradient."""
    return _cover(
        m, lines, blocks, m.lines, unit=m.vectors.lanes if m.vectors.lanes and lines % m.vectors.lanes == 0 else 1
    )[1]


def _cover(m: Machine, extent: int, blocks: int, longest: Mapping[int, int], unit: int) -> tuple[float, list[Cover]]:
    """The cheapest cover and its cost; what a number of blocks leaves over is covered by itself."""
    best: tuple[float, list[Cover]] | None = None
    for wide, limit in longest.items():
        if wide > blocks:
            continue
        cover, cost = _cut(m, extent, wide, limit, unit, blocks // wide)
        rest_cost, rest = _cover(m, extent, blocks % wide, longest, unit) if blocks % wide else (0.0, [])
        rest = [Cover(c.tile, c.first + blocks - blocks % wide, c.tiles, c.long_tiles, c.short_tiles) for c in rest]
        if best is None or cost + rest_cost < best[0]:
            best = (cost + rest_cost, [cover, *rest])
    assert best is not None, "tables have an entry for one block"
    return best


def _cut(m: Machine, extent: int, wide: int, limit: int, unit: int, tiles: int) -> tuple[Cover, float]:
    """Cut an extent into tiles that differ by at most one unit; the cost is in cycles per step of the inner loop."""
    units, most = -(-extent // unit), limit // unit
    count = -(-units // most)
    long = -(-units // count)
    long_tiles = units - count * (long - 1)
    short_tiles = count - long_tiles
    short = (long - 1) * unit if short_tiles else 0
    cover = Cover(Tile(long * unit, short, wide), 0, tiles, long_tiles, short_tiles)
    cost = long_tiles * _cycles(m, long * unit, wide) + short_tiles * _cycles(m, short, wide)
    return cover, tiles * cost


def _cycles(m: Machine, length: int, wide: int) -> float:
    vectors = wide * m.vectors.per_block
    loads = vectors + length / max(m.vectors.lanes, 1)
    return max(length * vectors / m.fma, loads / m.loads, m.latency) + 0.25 * vectors


def block_convolution(
    m: Machine, cover: Cover, *, rows: int, columns: int, blocks: int, filter_block: int, x_row: int
) -> Blocking:
    """Cache blocking. `filter_block` is the floats of the weights from one input-channel block to one output-channel
    block, `x_row` those that a row of x has in one input-channel block."""
    tile = cover.tile
    weights_bytes = 4 * filter_block * tile.blocks
    chunks = -(-blocks // max(1, min(blocks, m.weights_bytes // max(weights_bytes, 1))))
    tiles_per_row = cover.long_tiles + cover.short_tiles
    if rows * tiles_per_row <= 2:  # nothing would use a chunk of the weights again
        chunks = 1
    block_rows = -(-rows * cover.tiles // MIN_UNITS)
    if chunks > 1:
        block_rows = min(block_rows, m.outer_bytes // (16 * columns * tile.blocks * m.vectors.block))
    x_bytes, w_bytes = 4 * x_row * blocks * rows, weights_bytes * blocks * cover.tiles
    most_rows = max(1, m.outer_bytes // (8 * x_row * blocks))
    x_again = x_bytes * (cover.tiles - 1) if 2 * x_bytes > m.outer_bytes else 0
    w_again = w_bytes * (rows / min(block_rows or 1, most_rows) - 1) if 2 * w_bytes > m.outer_bytes else 0
    channels_outer = x_again <= w_again
    if not channels_outer:
        block_rows = min(block_rows, most_rows)
    block_rows = max(block_rows, -(-4 // tiles_per_row))
    return Blocking(-(-blocks // chunks), min(block_rows, rows), channels_outer)


def block_gradient(
    m: Machine, cover: Cover, *, rows: int, columns: int, blocks: int, k_tiles: int, filter_block: int
) -> Parts:
    """Cache blocking of a weight gradient; rows are divided into partial sums if there are few work units otherwise."""
    units = cover.tiles * blocks
    parts = min(-(-MIN_UNITS // units), rows, max(1, rows * columns // 256)) if 2 * units <= MIN_UNITS else 1
    part_rows = -(-rows // parts)
    x_row, y_row = 4 * columns * m.vectors.block, 4 * columns * m.vectors.block * cover.tile.blocks
    inner_rows = max(1, min(part_rows, m.inner_bytes * 3 // 4 // (x_row + y_row)))
    x_bytes, y_bytes = x_row * blocks * part_rows, y_row * k_tiles * part_rows
    d_bytes = 4 * filter_block * blocks * k_tiles * cover.tile.blocks
    outer_rows = max(inner_rows, m.outer_bytes // 2 // (x_row * blocks + y_row * k_tiles) // inner_rows * inner_rows)
    again = x_bytes * (k_tiles - 1) + (y_bytes * (blocks - 1) if 2 * y_row * part_rows > m.outer_bytes else 0)
    turns = -(-part_rows // outer_rows)
    if 2 * (x_bytes + y_bytes) <= m.outer_bytes or again <= 2 * d_bytes * turns * (2 * d_bytes > m.outer_bytes):
        outer_rows = part_rows
    unit_blocks = max(1, units * parts // MIN_UNITS) if m.row or part_rows == 1 else 1
    return Parts(part_rows, outer_rows, inner_rows, min(unit_blocks, blocks))
