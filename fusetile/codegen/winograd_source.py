"""TVMScript of the Winograd kernels for 3x3 convolutions of stride 1; see winograd_math.

An output tile is m x m pixels; tiles are numbered image by image, row by row. A *group* of tiles is what a register
tile multiplies at once: `long` tiles, or from group `long_groups` on one less, so that groups cover any number.
`size` = (m + 2)^2 is the number of products, numbered by `xi`. Transformed operands:

    V of inputs     [group][xi][channel block][tile][B]      Z of dy    [xi][k tile][tile][wide * B]
    U of weights    [k tile][xi][channel][wide * B]          M, D       sums of products, of one work unit

Every kernel is dynamic in all sizes and strides and static in m and its register tile. A work unit is a share of the
items; a thread that has the units [lo, hi) uses the scratch of unit `lo` for them all.
"""

from __future__ import annotations

from functools import cache

from fusetile.codegen.calls import Kernel, make_kernel, vectors
from fusetile.codegen.conv_source import ACTIVATIONS, Vectors, indent
from fusetile.codegen.winograd_math import both_sides, local_arrays, matrices

PAD = 16  # floats after the products of a tile: strides that are powers of two would meet in one set of the cache

INPUT_INTS = (
    *("blocks", "groups", "long", "long_groups", "first", "down", "across", "rows", "columns"),
    *("x_image", "x_block", "x_row", "wide", "v_group", "v_tile", "v_xi", "v_block"),
)
FILTER_INTS = ("k_tiles", "blocks", "w_k", "w_block", "u_k", "u_xi")
OUTPUT_INTS = ("down", "across", "rows", "columns", "with_bias", "y_image", "y_block", "y_row", "y_pixel")
TILES_INTS = (
    *("items", "units", "groups", "block_groups", "long_groups", "k_tiles", "blocks"),
    *("x_image", "x_block", "x_row", "v_unit", "v_group", "v_xi", "u_k", "u_xi", "m_unit"),
    *OUTPUT_INTS,
)
CHANNELS_INTS = (
    *("items", "units", "groups", "block_groups", "long_groups", "ranges", "blocks", "chunk"),
    *("w_k", "w_block", "v_group", "v_xi", "u_unit", "u_xi", "m_unit"),
    *OUTPUT_INTS,
)
GRADIENT_INTS = (
    *("items", "units", "blocks", "tiles", "v_xi", "v_block", "z_xi", "z_k", "d_unit"),
    *("d_k", "d_block", "adding"),
)


def m_strides(v: Vectors, m: int, wide: int, long: int, *, by_xi: bool) -> tuple[int, int, int]:
    """Floats of M from one tile to the next, from one xi, and from one group: [tile][xi] is the better order for sums
    that are complete, [xi][tile] for those that more is added to."""
    row, products = wide * v.block, (m + 2) ** 2
    if not by_xi:
        return products * row + PAD, row, long * (products * row + PAD)
    m_xi = long * row + (PAD if long * row % 512 == 0 else 0)
    return row, m_xi, products * m_xi


def _products(m: int) -> int:
    return (m + 2) ** 2


def _register(v: Vectors, stride: str) -> str:
    """Offset of register r, for a distance from one channel block to the next."""
    return f"(r // {v.per_block}) * {stride} + r % {v.per_block} * {v.width}"


def _place_of(tile: str, m: int) -> str:
    """Image and first pixel of a tile."""
    return f"""
image: T.int32 = T.truncdiv({tile}, down * across)
h0: T.int32 = T.truncmod(T.truncdiv({tile}, across), down) * {m}
w0: T.int32 = T.truncmod({tile}, across) * {m}
"""


def _transform_input(v: Vectors, m: int, x: str, target: str) -> str:
    """V = BT d B of one channel block of one tile. Tiles at the edges read the last row or column again: outputs that
    this reaches are beyond the edge."""
    matrix = matrices(m)[2]
    size = m + 2
    corners = [f"row{i}: T.int32 = {x} + T.min(h0 + {i}, rows + 1) * x_row" for i in range(size)]
    corners += [f"column{j}: T.int32 = T.min(w0 + {j}, columns + 1) * {v.block}" for j in range(size)]
    at = f"s * {v.width} + v"
    statements = both_sides(
        matrix,
        lambda i, j: f"x[row{i} + column{j} + {at}]",
        lambda i, j: f"v_[{target} + {i * size + j} * v_xi + {at}]",
    )
    newline = "\n"
    return f"""
{newline.join(corners)}
for s in T.serial({v.per_block}):
    {indent(vectors(statements, v.width), 4)}
"""


def _transform_filters(v: Vectors, m: int, wide: int, u: str, transposed: bool) -> str:
    """U = G g GT of the `wide` blocks of output channels of tile `k`, from input channel block `c`. `transposed`: the
    weights are those of the convolution whose input gradient this is; each square of channels is turned first."""
    size, square = m + 2, v.block * v.block

    def store(i: int, j: int) -> str:
        return f"u[u1 + {i * size + j} * u_xi + v]"

    if not transposed:
        work = both_sides(matrices(m)[1], lambda i, j: f"w[w1 + {(i * 3 + j) * square} + v]", store)
        return f"""
for i in T.serial({v.block}):
    for r in T.serial({wide * v.per_block}):
        w1: T.int32 = k * {wide} * w_k + c * w_block + i * {v.block} + {_register(v, "w_k")}
        u1: T.int32 = {u} + i * {wide * v.block} + r * {v.width}
        {indent(_vectors(work, v.width), 8)}
"""
    work = both_sides(
        matrices(m)[1], lambda i, j: f"turned[({i * 3 + j} * {v.block} + i) * {v.per_block} + s, v]", store
    )
    return f"""
for o in T.serial({wide}):
    for tap in T.serial(9):
        for q in T.serial({v.per_block}):
            for s in T.serial({v.per_block}):
                w1: T.int32 = (
                    (k * {wide} + o) * w_k + c * w_block + (8 - tap) * {square}
                    + s * {v.width * v.block} + q * {v.width}
                )
                t1: T.int32 = (tap * {v.block} + q * {v.width}) * {v.per_block} + s
                {indent(_turn_square(v), 16)}
    for i in T.serial({v.block}):
        for s in T.serial({v.per_block}):
            u1: T.int32 = {u} + i * {wide * v.block} + o * {v.block} + s * {v.width}
            {indent(_vectors(work, v.width), 12)}
"""


def _turn_square(v: Vectors) -> str:
    """`turned` from t1 on = the transpose of a square of w: interleaving rows i and i + n / 2 into rows 2 i and
    2 i + 1, as often as halving n rows leaves one, transposes."""
    n, lanes = v.width, f"T.Ramp({{}}, 1, {v.width})"
    order = [lane for pair in zip(range(n), range(n, 2 * n), strict=True) for lane in pair]
    statements = [f"square[{i}, {lanes.format(0)}] = w[{lanes.format(f'w1 + {i * v.block}')}]" for i in range(n)]
    stages = n.bit_length() - 1
    for stage in range(stages):
        source, target = stage % 2 * n, (stage + 1) % 2 * n
        for i in range(n // 2):
            pair = f"[square[{source + i}, {lanes.format(0)}], square[{source + i + n // 2}, {lanes.format(0)}]]"
            for half in (0, 1):
                picked = order[half * n : half * n + n]
                statements.append(f"square[{target + 2 * i + half}, {lanes.format(0)}] = T.Shuffle({pair}, {picked})")
    last = stages % 2 * n
    statements += [
        f"turned[t1 + {i * v.per_block}, {lanes.format(0)}] = square[{last + i}, {lanes.format(0)}]" for i in range(n)
    ]
    return "\n".join(statements)


def _multiply(
    v: Vectors, wide: int, length: int, *, v_at: str, v_block: int, u_at: str, m_at: str, m_tile: int, first: str
) -> str:
    """M = (M unless `first`) + V U for one group, one xi and the input channel blocks [c_start, c_stop)."""

    def each(statement: str) -> str:
        return f"""
for p in T.unroll({length}):
    for r in T.unroll({wide * v.per_block}):
        for e in T.vectorized({v.width}):
            {statement}
"""

    at_m = f"m_[{m_at} + p * {m_tile} + r * {v.width} + e]"
    x_at = f"v_[{v_at} + c * {v_block} + p * {v.block} + {{}}]"
    w_at = f"u[{u_at} + ((c - c_first) * {v.block} + {{}}) * {wide * v.block} + r * {v.width} + e]"
    if v.lanes:
        inner = f"""
for q in T.serial({v.block // v.lanes}):
    for p in T.unroll({length}):
        for e in T.vectorized({v.lanes}):
            xv[p, e] = {x_at.format(f"q * {v.lanes} + e")}
    for j in T.unroll({v.lanes}):
        {indent(each(f"acc[p, r, e] = acc[p, r, e] + xv[p, j] * {w_at.format(f'(q * {v.lanes} + j)')}"), 8)}
"""
    else:
        inner = f"""
for i in T.serial({v.block}):
    {indent(each(f"acc[p, r, e] = acc[p, r, e] + {x_at.format('i')} * {w_at.format('i')}"), 4)}
"""
    zero = each("acc[p, r, e] = T.float32(0)")
    start = zero
    if first:
        start = f"""
if {first}:
    {indent(zero, 4)}
else:
    {indent(each(f"acc[p, r, e] = {at_m}"), 4)}
"""
    return f"""
{start}
for c in T.serial(c_start, c_stop):
    {indent(inner, 4)}
{each(f"{at_m} = acc[p, r, e]")}
"""


def _multiply_groups(v: Vectors, m: int, wide: int, long: int, *, v_base: str, u_at: str, first: str = "") -> str:
    """`_multiply` for every xi and the groups [g_start, g_stop)."""
    m_tile, m_xi, m_group = m_strides(v, m, wide, long, by_xi=bool(first))

    def body(length: int) -> str:
        return _multiply(
            v,
            wide,
            length,
            v_at=f"{v_base} + xi * v_xi",
            v_block=long * v.block,
            u_at=f"{u_at} + xi * u_xi",
            m_at=f"m0 + (g - g_start) * {m_group} + xi * {m_xi}",
            m_tile=m_tile,
            first=first,
        )

    work = body(long)
    if long > 1:
        work = f"""
if g < long_groups:
    {indent(body(long), 4)}
else:
    {indent(body(long - 1), 4)}
"""
    return f"""
for xi in T.serial({_products(m)}):
    for g in T.serial(g_start, g_stop):
        {indent(work, 8)}
"""


def _over_tiles(long: int, body: str) -> str:
    """`body` for every tile p of the groups [g_start, g_stop)."""
    return f"""
for g in T.serial(g_start, g_stop):
    for p in T.serial({long} - T.Select(g < long_groups, 0, 1)):
        tile: T.int32 = g * {long} - T.max(g - long_groups, 0) + p
        {indent(body, 8)}
"""


def _transform_output(v: Vectors, m: int, wide: int, long: int, activation: str, *, by_xi: bool) -> str:
    """y = activation(bias + AT M A) of one tile of output channels, for the tiles of the groups [g_start, g_stop)."""
    size = m + 2
    m_tile, m_xi, m_group = m_strides(v, m, wide, long, by_xi=by_xi)
    statements = both_sides(
        matrices(m)[0],
        lambda i, j: f"m_[m1 + {(i * size + j) * m_xi} + r * {v.width} + v]",
        lambda i, j: f"result[{i * m + j}, v]",
    )
    value = "(result[{}, v] + offset[0, v])"
    y_at = f"y[y1 + {{}} * y_row + {{}} * y_pixel + {_register(v, 'y_block')} + v]"
    stores = ""
    for i in range(m):
        line = ""
        for j in range(m):
            statement = f"{y_at.format(i, j)} = {ACTIVATIONS[activation].format(value.format(i * m + j))}"
            line += f"if w0 + {j} < columns:\n    {indent(vectors([statement], v.width), 4)}\n"
        stores += f"if h0 + {i} < rows:\n    {indent(line, 4)}\n"
    bias = f"k * {wide * v.block} + r * {v.width} + v"
    body = f"""
{indent(_place_of("tile", m), 0)}
m1: T.int32 = m0 + (g - g_start) * {m_group} + p * {m_tile}
y1: T.int32 = image * y_image + h0 * y_row + w0 * y_pixel + k * {wide} * y_block
for r in T.serial({wide * v.per_block}):
    if with_bias > 0:
        for v in T.vectorized({v.width}):
            offset[0, v] = bias[{bias}]
    else:
        for v in T.vectorized({v.width}):
            offset[0, v] = T.float32(0)
    {indent(vectors(statements, v.width), 4)}
    {indent(stores, 4)}
"""
    return _over_tiles(long, body)


def _square(v: Vectors) -> dict[str, tuple[tuple[int, ...], str]]:
    """Local arrays that turn weights."""
    return {
        "square": ((2 * v.width, v.width), "float32"),
        "turned": ((9 * v.block * v.per_block, v.width), "float32"),
    }


def _arrays(v: Vectors, m: int, wide: int, length: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Local arrays of a multiplying kernel."""
    arrays = local_arrays(m + 2, v.width) | {
        "acc": ((length, wide * v.per_block, v.width), "float32"),
        "result": ((m * m, v.width), "float32"),
        "offset": ((1, v.width), "float32"),
    }
    if v.lanes:
        arrays["xv"] = ((length, v.lanes), "float32")
    return arrays


@cache
def transform_input(*, vectors: Vectors, m: int) -> Kernel:
    """V of a run of tiles from tile `first` on. A work unit is one group of tiles of one channel block. Channel block
    c, tile t of group g lies at c // wide * v_block + c % wide * B + g * v_group + t * v_tile + (t - the group's first)
    * wide * B; `wide` is 1 for the inputs. Pointers x, V."""
    return _transform_maps(f"winograd{m}_input_{vectors.tag}", vectors, m, _transform_input(vectors, m, "x0", "v0"))


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
    {indent(_vectors(both_sides(matrices(m, gradient=True)[1], load, store), v.width), 4)}
"""
    return _transform_maps(f"winograd{m}_dy_{v.tag}", v, m, work)


_vectors = vectors


def _transform_maps(symbol: str, v: Vectors, m: int, work: str) -> Kernel:
    body = f"""
for unit in T.serial(lo, hi):
    block: T.int32 = T.truncdiv(unit, groups)
    g: T.int32 = T.truncmod(unit, groups)
    start: T.int32 = g * long - T.max(g - long_groups, 0)
    length: T.int32 = long - T.Select(g < long_groups, 0, 1)
    v1: T.int32 = T.truncdiv(block, wide) * v_block + T.truncmod(block, wide) * {v.block} + g * v_group + start * v_tile
    for p in T.serial(length):
        {indent(_place_of("(first + start + p)", m), 8)}
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
    {indent(_transform_filters(v, m, wide, f"k * u_k + c * {v.block * wide * v.block}", transposed), 4)}
"""
    return make_kernel(
        f"winograd{m}_filter{wide}_{v.tag}" + ("_transposed" if transposed else ""),
        pointers={"w": "float32", "u": "float32"},
        body=body,
        ints=FILTER_INTS,
        scratch=local_arrays(m + 2, v.width) | (_square(v) if transposed else {}),
    )


def _shares(body: str) -> str:
    """`body` for every item of the units [lo, hi): `items` items are divided among `units` units."""
    return f"""
for item in T.serial(T.truncdiv(lo * items, units), T.truncdiv(hi * items, units)):
    {indent(body, 4)}
"""


@cache
def convolve_tiles(*, vectors: Vectors, m: int, wide: int, long: int, activation: str = "") -> Kernel:
    """y from x and U: for many tiles. An item is a block of groups of tiles, whose V a thread makes for all channels
    and then multiplies with all of U. Pointers x, U, bias, y, scratch V and M; the float is the slope of leaky_relu."""
    v = vectors
    transform = f"""
x0: T.int32 = image * x_image + c * x_block
v0: T.int32 = lo * v_unit + (g - g_start) * v_group + c * {long * v.block} + p * {v.block}
{_transform_input(v, m, "x0", "v0")}
"""
    multiply = _multiply_groups(v, m, wide, long, v_base="lo * v_unit + (g - g_start) * v_group", u_at="k * u_k")
    body = f"""
g_start: T.int32 = item * block_groups
g_stop: T.int32 = T.min(g_start + block_groups, groups)
c_start: T.int32 = 0
c_first: T.int32 = 0
c_stop: T.int32 = blocks
m0: T.int32 = lo * m_unit
for c in T.serial(blocks):
    {indent(_over_tiles(long, _place_of("tile", m) + transform), 4)}
for k in T.serial(k_tiles):
    {indent(multiply, 4)}
    {indent(_transform_output(v, m, wide, long, activation, by_xi=False), 4)}
"""
    return make_kernel(
        f"winograd{m}_tiles{long}x{wide}_{v.tag}" + (f"_{activation}" if activation else ""),
        pointers=dict.fromkeys(("x", "u", "bias", "y", "v_", "m_"), "float32"),
        body=_shares(body),
        ints=TILES_INTS,
        floats=("alpha",),
        scratch=_arrays(v, m, wide, long),
    )


@cache
def convolve_channels(
    *, vectors: Vectors, m: int, wide: int, long: int, activation: str = "", transposed: bool = False
) -> Kernel:
    """y from V and w: for many channels. An item is one tile of output channels and a range of groups of tiles; a
    thread transforms the weights of a chunk of input channels and multiplies V with them, chunk by chunk. Pointers V,
    w, bias, y, scratch U and M; the float is the slope of leaky_relu."""
    v = vectors
    filters = _transform_filters(v, m, wide, f"u0 + (c - c_first) * {v.block * wide * v.block}", transposed)
    multiply = _multiply_groups(v, m, wide, long, v_base="g * v_group", u_at="u0", first="c_first == 0")
    body = f"""
k: T.int32 = T.truncdiv(item, ranges)
g_start: T.int32 = T.truncmod(item, ranges) * block_groups
g_stop: T.int32 = T.min(g_start + block_groups, groups)
m0: T.int32 = lo * m_unit
u0: T.int32 = lo * u_unit
for turn in T.serial(T.truncdiv(blocks + chunk - 1, chunk)):
    c_start: T.int32 = turn * chunk
    c_first: T.int32 = turn * chunk
    c_stop: T.int32 = T.min(turn * chunk + chunk, blocks)
    for c in T.serial(c_start, c_stop):
        {indent(filters, 8)}
    {indent(multiply, 4)}
{_transform_output(v, m, wide, long, activation, by_xi=True)}
"""
    return make_kernel(
        f"winograd{m}_channels{long}x{wide}_{v.tag}" + f"_{activation}" * bool(activation) + "_transposed" * transposed,
        pointers=dict.fromkeys(("v_", "w", "bias", "y", "u", "m_"), "float32"),
        body=_shares(body),
        ints=CHANNELS_INTS,
        floats=("alpha",),
        scratch=_arrays(v, m, wide, long) | (_square(v) if transposed else {}),
    )


@cache
def filter_gradient(*, vectors: Vectors, m: int, wide: int, lines: int) -> Kernel:
    """dw = (dw if `adding`) + AT (sum over tiles of V Z) A. An item is one tile of output channels x `lines`
    input channels: the register tile. Pointers V, Z, dw, scratch D."""
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
    old = _vectors([f"before[{tap}, v] = {at}" for tap, at in enumerate(dw_at)], v.width)
    zero = _vectors([f"before[{tap}, v] = T.float32(0)" for tap in range(9)], v.width)
    body = f"""
k: T.int32 = T.truncdiv(item, blocks * {parts})
c: T.int32 = T.truncmod(T.truncdiv(item, {parts}), blocks)
line: T.int32 = T.truncmod(item, {parts}) * {lines}
d0: T.int32 = lo * d_unit
for xi in T.serial({_products(m)}):
    v0: T.int32 = xi * v_xi + c * v_block + line
    z0: T.int32 = xi * z_xi + k * z_k
    {indent(each("acc[p, r, e] = T.float32(0)"), 4)}
    for t in T.serial(tiles):
        {indent(work, 8)}
    {indent(each(f"{d_at} = acc[p, r, e]"), 4)}
for i in T.serial({lines}):
    for r in T.serial({wide * v.per_block}):
        d1: T.int32 = d0 + i * {row} + r * {v.width}
        w1: T.int32 = k * {wide} * d_k + c * d_block + (line + i) * {v.block} + {_register(v, "d_k")}
        {indent(_vectors(outputs, v.width), 8)}
        if adding > 0:
            {indent(old, 12)}
        else:
            {indent(zero, 12)}
        {indent(_vectors([f"{at} = before[{tap}, v] + result[{tap}, v]" for tap, at in enumerate(dw_at)], v.width), 8)}
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
        body=_shares(body),
        ints=GRADIENT_INTS,
        scratch=arrays,
    )
