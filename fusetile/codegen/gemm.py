"""Fully connected layers, where they are not like convolutions: images in rows, and the input gradient.

The input gradient is a product with transposed weights, of which a copy would take as much memory as they do. So
squares of them are turned on the way, which costs little beside reading them. For one image nothing is turned: the
lanes of the weights, output channels, are summed up at the end.
"""

from __future__ import annotations

from functools import cache

from fusetile.codegen.calls import Kernel, KernelCall, Lowered, make_kernel, ref
from fusetile.codegen.conv_tiles import MIN_UNITS, Machine, cover_pixels
from fusetile.codegen.conv_views import Filter, View, moved
from fusetile.codegen.filter_source import gather_rows
from fusetile.codegen.register_tile import Tile, Vectors, indent, over_tiles, registers
from fusetile.codegen.winograd_parts import multiply, prefetch_next, turn_square, turning_squares
from fusetile.program import Buffer

# Blocks of output channels that are turned before they are multiplied. Their weights are so far apart that they meet in
# one set of a cache, which must hold them beside those that are asked for next.
CHUNK = 8
UNIT_blocks = 16  # blocks of input channels that are read in a row, of every block of output channels

INPUT_GRADIENT_INTS = (
    *("k_blocks", "tiles", "unit_tiles", "long_tiles", "short_tiles"),
    *("y_block", "w_k", "w_block", "x_image"),
)


def gathered(name: str, x: View, *, images: int, blocks: int) -> tuple[Lowered, View]:
    """One-pixel maps as rows of pixels, one per channel block, whose pixels are the images: copied into scratch of this
    name if there are several."""
    if images == 1:
        return Lowered(), View(x.start, 0, x.block, 0, x.pixel)
    scratch = Buffer(name, ((0, blocks * images * x.pixel),))
    ints = (images, x.image, x.block, x.pixel)
    call = KernelCall(gather_rows(), blocks, (x.start, ref(scratch)), ints)
    return Lowered((call,), (scratch,)), View(ref(scratch), 0, images * x.pixel, 0, x.pixel)


def input_gradient_calls(
    m: Machine, dy: View, w: Filter, dx: View, *, images: int, k_blocks: int, c_blocks: int
) -> tuple[KernelCall, ...]:
    """The calls of an input gradient, of gathered dy: one per width of tile."""
    if images == 1:
        kernel, units = input_gradient_of_one(vectors=m.vectors), -(-c_blocks // UNIT_blocks)
        pointers = (dy.start, w.start, dx.start)
        return (KernelCall(kernel, units, pointers, (k_blocks, c_blocks, dy.block, w.k, w.block)),)
    calls = []
    for cover in cover_pixels(m, images, c_blocks):
        unit_tiles = max(1, min(UNIT_blocks // cover.tile.blocks, cover.tiles // MIN_UNITS))
        sizes = (k_blocks, cover.tiles, unit_tiles, cover.long_tiles, cover.short_tiles)
        pointers = (dy.start, moved(w.start, cover.first * w.block), moved(dx.start, cover.first * dx.block))
        kernel = input_gradient(vectors=m.vectors, tile=cover.tile)
        ints = (*sizes, dy.block, w.k, w.block, dx.image)
        calls.append(KernelCall(kernel, -(-cover.tiles // unit_tiles), pointers, ints))
    return tuple(calls)


@cache
def input_gradient(*, vectors: Vectors, tile: Tile) -> Kernel:
    """dx[n][c] = sum over k of dy[k][n] * w[k][c]; dy is [block of k][n][B]. A register tile is images x blocks of c.

    A work unit is `unit_tiles` of the `tiles` tiles of c. Sums rest in dx between chunks of k. Pointers dy, w, dx.
    """
    v, row = vectors, tile.blocks * vectors.block
    turned = f"u[T.Ramp(u1 + {{}} * {row}, 1, {v.width})]"

    def images(length: int, start: str) -> str:
        return multiply(
            v,
            tile.blocks,
            length,
            v_at=f"{start} * {v.block}",
            v_block="y_block",
            u_at="0",
            m_at=f"x0 + {start} * x_image",
            m_tile="x_image",
            first="c_first == 0",
        )

    body = f"""
for unit in T.serial(lo, hi):
    for turn in T.serial(T.truncdiv(k_blocks + {CHUNK - 1}, {CHUNK})):
        c_first: T.int32 = turn * {CHUNK}
        c_start: T.int32 = c_first
        c_stop: T.int32 = T.min(c_first + {CHUNK}, k_blocks)
        for j in T.serial(T.min(unit_tiles, tiles - unit * unit_tiles)):
            first_block: T.int32 = (unit * unit_tiles + j) * {tile.blocks}
            x0: T.int32 = first_block * {v.block}
            for c in T.serial(c_start, c_stop):
                for o in T.serial({tile.blocks}):
                    for s, q in T.grid({v.per_block}, {v.per_block}):
                        w1: T.int32 = (
                            c * w_k + (first_block + o) * w_block + s * {v.width * v.block} + q * {v.width}
                        )
                        u1: T.int32 = (
                            ((c - c_first) * {v.block} + q * {v.width}) * {row} + o * {v.block} + s * {v.width}
                        )
                        {indent(prefetch_next(v, "w", f"w1 + {tile.blocks} * w_block", v.width * v.block), 24)}
                        {indent(turn_square(v, turned), 24)}
            {indent(over_tiles(tile, "t", images), 12)}
"""
    turned_weights = {"u": ((CHUNK * v.block * row,), "float32")}
    return make_kernel(
        f"gemm_input_gradient_t{tile.tag}_{v.tag}",
        pointers=dict.fromkeys(("v_", "w", "m_"), "float32"),
        body=body,
        ints=INPUT_GRADIENT_INTS,
        scratch=turned_weights | registers(tile, v, tile.long) | turning_squares(v),
    )


@cache
def input_gradient_of_one(*, vectors: Vectors) -> Kernel:
    """The same for one image. The weights of `UNIT_blocks` blocks of c, a work unit, are read in a row, k after k."""
    v = vectors
    product = "acc[c * {0} + line, e] = acc[c * {0} + line, e] + w[w1 + line * {0} + s * {1} + e] * y[s, e]"
    body = f"""
for unit in T.serial(lo, hi):
    first: T.int32 = unit * {UNIT_blocks}
    count: T.int32 = T.min({UNIT_blocks}, c_blocks - first)
    for line in T.serial(count * {v.block}):
        for e in T.vectorized({v.width}):
            acc[line, e] = T.float32(0)
    for k in T.serial(k_blocks):
        for s in T.unroll({v.per_block}):
            for e in T.vectorized({v.width}):
                y[s, e] = v_[k * y_block + s * {v.width} + e]
        for c in T.serial(count):
            w1: T.int32 = k * w_k + (first + c) * w_block
            {indent(prefetch_next(v, "w", "w1 + w_k", v.block * v.block), 12)}
            for line in T.unroll({v.block}):
                for s in T.unroll({v.per_block}):
                    for e in T.vectorized({v.width}):
                        {product.format(v.block, v.width)}
    for line in T.serial(count * {v.block}):
        total[0] = acc[line, 0]
        for e in T.serial(1, {v.width}):
            total[0] = total[0] + acc[line, e]
        m_[first * {v.block} + line] = total[0]
"""
    return make_kernel(
        f"gemm_input_gradient_one_{v.tag}",
        pointers=dict.fromkeys(("v_", "w", "m_"), "float32"),
        body=body,
        ints=("k_blocks", "c_blocks", "y_block", "w_k", "w_block"),
        scratch={
            "acc": ((UNIT_blocks * v.block, v.width), "float32"),
            "y": ((v.per_block, v.width), "float32"),
            "total": ((1,), "float32"),
        },
    )
