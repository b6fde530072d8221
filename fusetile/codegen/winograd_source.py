"""TVMScript of the Winograd kernels for 3x3 convolutions of stride 1; see winograd_math.

An output tile is m x m pixels; tiles are numbered image by image, row by row. A *group* of tiles is what a register
tile multiplies at once: `long` tiles, or from group `long_groups` on one less, so that groups cover any number.
`size` = (m + 2)^2 is the number of products, numbered by `xi`. Transformed operands:

    V of inputs     [group][xi][channel block][tile][B]      Z of dy    [xi][k tile][tile][wide * B]
    U of weights    [k tile][xi][channel][wide * B]          M, D       sums of products, of one thread

Every kernel is dynamic in all sizes and strides and static in m and its register tile. Every thread has scratch of its
own, that of `worker`.
"""

from __future__ import annotations

from functools import cache

from fusetile.codegen.calls import Kernel, make_kernel
from fusetile.codegen.calls import vectors as vectorized
from fusetile.codegen.register_tile import Vectors, indent
from fusetile.codegen.winograd_math import both_sides, local_arrays, matrices
from fusetile.codegen.winograd_parts import (
    multiply_groups,
    multiplying_arrays,
    over_tiles,
    place_of,
    products,
    register,
    transform_filters,
    transform_input_tile,
    transform_output,
    turning_arrays,
)

INPUT_INTS = (
    *("blocks", "groups", "long", "long_groups", "first", "down", "across", "rows", "columns"),
    *("x_image", "x_block", "x_row", "wide", "v_group", "v_tile", "v_xi", "v_block"),
)
FILTER_INTS = ("k_tiles", "blocks", "w_k", "w_block", "u_k", "u_xi")
OUTPUT_INTS = ("down", "across", "rows", "columns", "with_bias", "y_image", "y_block", "y_row", "y_pixel")
TILES_INTS = (
    *("groups", "block_groups", "long_groups", "k_tiles", "blocks"),
    *("x_image", "x_block", "x_row", "v_worker", "v_group", "v_xi", "u_k", "u_xi", "m_worker"),
    *OUTPUT_INTS,
)
CHANNELS_INTS = (
    *("groups", "block_groups", "long_groups", "ranges", "blocks", "chunk"),
    *("w_k", "w_block", "v_group", "v_xi", "u_worker", "u_xi", "m_worker"),
    *OUTPUT_INTS,
)
GRADIENT_INTS = (
    *("blocks", "tiles", "v_xi", "v_block", "z_xi", "z_k", "d_worker"),
    *("d_k", "d_block", "adding"),
)


@cache
def transform_input(*, vectors: Vectors, m: int) -> Kernel:
    """V of a run of tiles from tile `first` on. A work unit is one group of tiles of one channel block. Channel block
    c, tile t of group g lies at c // wide * v_block + c % wide * B + g * v_group + t * v_tile + (t - the group's first)
    * wide * B; `wide` is 1 for the inputs. Pointers x, V."""
    return _transform_maps(f"winograd{m}_input_{vectors.tag}", vectors, m, transform_input_tile(vectors, m, "x0", "v0"))


@cache
def transform_dy(*, vectors: Vectors, m: int) -> Kernel:
    """Z = G dy GT of tiles of m x m pixels, for the weight gradient; pixels beyond the edge count as zero. Arguments
    are those of `transform_input`; rows and columns are those of dy."""
    v, size = vectors, m + 2

    def load(i: int, j: int) -> str:
        inside = f"h0 + {i} < rows and w0 + {j} < columns"
        return f"T.if_then_else({inside}, x[x1 + {i} * x_row + {j * v.block} + s * {v.width} + v], T.float32(0))"

    def store(i: int, j: int) -> str:
        return f"v_[v0 + {i * size + j} * v_xi + s * {v.width} + v]"

    work = f"""
x1: T.int32 = x0 + h0 * x_row + w0 * {v.block}
for s in T.serial({v.per_block}):
    {indent(vectorized(both_sides(matrices(m, gradient=True)[1], load, store), v.width), 4)}
"""
    return _transform_maps(f"winograd{m}_dy_{v.tag}", v, m, work)


def _transform_maps(symbol: str, v: Vectors, m: int, work: str) -> Kernel:
    body = f"""
for unit in T.serial(lo, hi):
    block: T.int32 = T.truncdiv(unit, groups)
    g: T.int32 = T.truncmod(unit, groups)
    start: T.int32 = g * long - T.max(g - long_groups, 0)
    length: T.int32 = long - T.Select(g < long_groups, 0, 1)
    v1: T.int32 = T.truncdiv(block, wide) * v_block + T.truncmod(block, wide) * {v.block} + g * v_group + start * v_tile
    for p in T.serial(length):
        {indent(place_of("(first + start + p)", m), 8)}
        x0: T.int32 = image * x_image + block * x_block
        v0: T.int32 = v1 + p * wide * {v.block}
        {indent(work, 8)}
"""
    return make_kernel(
        symbol,
        pointers={"x": "float32", "v_": "float32"},
        body=body,
        ints=INPUT_INTS,
        scratch=local_arrays(m + 2, v.width),
    )


@cache
def transform_filter(*, vectors: Vectors, m: int, wide: int, transposed: bool) -> Kernel:
    """U of all weights. A work unit is one tile of `wide` blocks of output channels x one block of input channels.
    Pointers w, U."""
    v = vectors
    body = f"""
for unit in T.serial(lo, hi):
    k: T.int32 = T.truncdiv(unit, blocks)
    c: T.int32 = T.truncmod(unit, blocks)
    {indent(transform_filters(v, m, wide, f"k * u_k + c * {v.block * wide * v.block}", transposed), 4)}
"""
    return make_kernel(
        f"winograd{m}_filter{wide}_{v.tag}" + ("_transposed" if transposed else ""),
        pointers={"w": "float32", "u": "float32"},
        body=body,
        ints=FILTER_INTS,
        scratch=local_arrays(m + 2, v.width) | (turning_arrays(v) if transposed else {}),
    )


def _units(body: str) -> str:
    return f"for unit in T.serial(lo, hi):\n    {indent(body, 4)}\n"


@cache
def convolve_tiles(*, vectors: Vectors, m: int, wide: int, long: int, activation: str = "") -> Kernel:
    """y from x and U: for many tiles. A work unit is a block of groups of tiles, whose V a thread makes for all
    channels and then multiplies with all of U. Pointers x, U, bias, y, scratch V and M; the float is the slope of
    leaky_relu."""
    v = vectors
    transform = f"""
x0: T.int32 = image * x_image + c * x_block
v0: T.int32 = worker * v_worker + (g - g_start) * v_group + c * {long * v.block} + p * {v.block}
{transform_input_tile(v, m, "x0", "v0")}
"""
    multiply = multiply_groups(v, m, wide, long, v_base="worker * v_worker + (g - g_start) * v_group", u_at="k * u_k")
    body = f"""
g_start: T.int32 = unit * block_groups
g_stop: T.int32 = T.min(g_start + block_groups, groups)
c_start: T.int32 = 0
c_first: T.int32 = 0
c_stop: T.int32 = blocks
m0: T.int32 = worker * m_worker
for c in T.serial(blocks):
    {indent(over_tiles(long, place_of("tile", m) + transform), 4)}
for k in T.serial(k_tiles):
    {indent(multiply, 4)}
    {indent(transform_output(v, m, wide, long, activation, by_xi=False), 4)}
"""
    return make_kernel(
        f"winograd{m}_tiles{long}x{wide}_{v.tag}" + (f"_{activation}" if activation else ""),
        pointers=dict.fromkeys(("x", "u", "bias", "y", "v_", "m_"), "float32"),
        body=_units(body),
        ints=TILES_INTS,
        floats=("alpha",),
        scratch=multiplying_arrays(v, m, wide, long),
    )


@cache
def convolve_channels(
    *, vectors: Vectors, m: int, wide: int, long: int, activation: str = "", transposed: bool = False
) -> Kernel:
    """y from V and w: for many channels. A work unit is one tile of output channels and a range of groups of tiles; a
    thread transforms the weights of a chunk of input channels and multiplies V with them, chunk by chunk. Pointers V,
    w, bias, y, scratch U and M; the float is the slope of leaky_relu."""
    v = vectors
    filters = transform_filters(v, m, wide, f"u0 + (c - c_first) * {v.block * wide * v.block}", transposed)
    multiply = multiply_groups(v, m, wide, long, v_base="g * v_group", u_at="u0", first="c_first == 0")
    body = f"""
k: T.int32 = T.truncdiv(unit, ranges)
g_start: T.int32 = T.truncmod(unit, ranges) * block_groups
g_stop: T.int32 = T.min(g_start + block_groups, groups)
m0: T.int32 = worker * m_worker
u0: T.int32 = worker * u_worker
for turn in T.serial(T.truncdiv(blocks + chunk - 1, chunk)):
    c_start: T.int32 = turn * chunk
    c_first: T.int32 = turn * chunk
    c_stop: T.int32 = T.min(turn * chunk + chunk, blocks)
    for c in T.serial(c_start, c_stop):
        {indent(filters, 8)}
    {indent(multiply, 4)}
{transform_output(v, m, wide, long, activation, by_xi=True)}
"""
    return make_kernel(
        f"winograd{m}_channels{long}x{wide}_{v.tag}" + f"_{activation}" * bool(activation) + "_transposed" * transposed,
        pointers=dict.fromkeys(("v_", "w", "bias", "y", "u", "m_"), "float32"),
        body=_units(body),
        ints=CHANNELS_INTS,
        floats=("alpha",),
        scratch=multiplying_arrays(v, m, wide, long) | (turning_arrays(v) if transposed else {}),
    )


@cache
def filter_gradient(*, vectors: Vectors, m: int, wide: int, lines: int) -> Kernel:
    """dw = (dw if `adding`) + AT (sum over tiles of V Z) A. A work unit is one tile of output channels x
    `lines` input channels: the register tile. Pointers V, Z, dw, scratch D."""
    v, size = vectors, m + 2

    def each(statement: str) -> str:
        return f"""
for p in T.unroll({lines}):
    for r in T.unroll({wide * v.per_block}):
        for e in T.vectorized({v.width}):
            {statement}
"""

    z_at = f"z[z0 + t * {wide * v.block} + r * {v.width} + e]"
    x_at = f"v_[v0 + t * {v.block} + {{}}]"
    if v.lanes:
        work = f"""
for q in T.unroll({lines // v.lanes}):
    for e in T.vectorized({v.lanes}):
        xv[q, e] = {x_at.format(f"q * {v.lanes} + e")}
{each(f"acc[p, r, e] = acc[p, r, e] + xv[p // {v.lanes}, p % {v.lanes}] * {z_at}")}
"""
    else:
        work = each(f"acc[p, r, e] = acc[p, r, e] + {x_at.format('p')} * {z_at}")
    row, parts = wide * v.block, v.block // lines
    d_at = f"d[d0 + (xi * {lines} + p) * {row} + r * {v.width} + e]"
    outputs = both_sides(
        matrices(m, gradient=True)[0],
        lambda i, j: f"d[d1 + {(i * size + j) * lines * row} + v]",
        lambda i, j: f"result[{i * 3 + j}, v]",
    )
    dw_at = [f"dw[w1 + {tap * v.block * v.block} + v]" for tap in range(9)]
    old = vectorized([f"before[{tap}, v] = {at}" for tap, at in enumerate(dw_at)], v.width)
    adding = [f"{at} = before[{tap}, v] + result[{tap}, v]" for tap, at in enumerate(dw_at)]
    zero = vectorized([f"before[{tap}, v] = T.float32(0)" for tap in range(9)], v.width)
    body = f"""
k: T.int32 = T.truncdiv(unit, blocks * {parts})
c: T.int32 = T.truncmod(T.truncdiv(unit, {parts}), blocks)
line: T.int32 = T.truncmod(unit, {parts}) * {lines}
d0: T.int32 = worker * d_worker
for xi in T.serial({products(m)}):
    v0: T.int32 = xi * v_xi + c * v_block + line
    z0: T.int32 = xi * z_xi + k * z_k
    {indent(each("acc[p, r, e] = T.float32(0)"), 4)}
    for t in T.serial(tiles):
        {indent(work, 8)}
    {indent(each(f"{d_at} = acc[p, r, e]"), 4)}
for i in T.serial({lines}):
    for r in T.serial({wide * v.per_block}):
        d1: T.int32 = d0 + i * {row} + r * {v.width}
        w1: T.int32 = k * {wide} * d_k + c * d_block + (line + i) * {v.block} + {register(v, "d_k")}
        {indent(vectorized(outputs, v.width), 8)}
        if adding > 0:
            {indent(old, 12)}
        else:
            {indent(zero, 12)}
        {indent(vectorized(adding, v.width), 8)}
"""
    arrays = local_arrays(size, v.width) | {
        "acc": ((lines, wide * v.per_block, v.width), "float32"),
        "result": ((9, v.width), "float32"),
        "before": ((9, v.width), "float32"),
    }
    if v.lanes:
        arrays["xv"] = ((lines // v.lanes, v.lanes), "float32")
    return make_kernel(
        f"winograd{m}_gradient{lines}x{wide}_{v.tag}",
        pointers=dict.fromkeys(("v_", "z", "dw", "d"), "float32"),
        body=_units(body),
        ints=GRADIENT_INTS,
        scratch=arrays,
    )
