"""Pieces of the Winograd kernels, as TVMScript: transforms, multiplication, and the loops around them.

Names are those of winograd_source: V, U and M are the arrays `v_`, `u` and `m_`; `g` is a group of tiles, `k` a tile of
output channels, `c` a block of input channels, `xi` a product, `p` a tile of a group, `r` a register, `s` a register of
a channel block, `e` and `v` lanes.
"""

from __future__ import annotations

from fusetile.codegen.calls import prefetch
from fusetile.codegen.calls import vectors as vectorized
from fusetile.codegen.register_tile import ACTIVATIONS, LINE, Vectors, indent
from fusetile.codegen.winograd_math import both_sides, local_arrays, matrices

PAD = 16  # floats after the products of a tile: strides that are powers of two would meet in one set of the cache

Arrays = dict[str, tuple[tuple[int, ...], str]]


def m_strides(v: Vectors, m: int, wide: int, long: int, *, by_xi: bool) -> tuple[int, int, int]:
    """Floats of M from one tile to the next, from one xi, and from one group: [tile][xi] is the better order for sums
    that are complete, [xi][tile] for those that more is added to."""
    row, products = wide * v.block, (m + 2) ** 2
    if not by_xi:
        return products * row + PAD, row, long * (products * row + PAD)
    m_xi = long * row + (PAD if long * row % 512 == 0 else 0)
    return row, m_xi, products * m_xi


def products(m: int) -> int:
    """Of one tile, per pair of channels."""
    return (m + 2) ** 2


def register(v: Vectors, stride: str) -> str:
    """Offset of register r, for a distance from one channel block to the next."""
    return f"(r // {v.per_block}) * {stride} + r % {v.per_block} * {v.width}"


def place_of(tile: str, m: int) -> str:
    """Image and first pixel of a tile."""
    return f"""
image: T.int32 = T.truncdiv({tile}, down * across)
h0: T.int32 = T.truncmod(T.truncdiv({tile}, across), down) * {m}
w0: T.int32 = T.truncmod({tile}, across) * {m}
"""


def transform_input_tile(v: Vectors, m: int, x: str, target: str) -> str:
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
    {indent(vectorized(statements, v.width), 4)}
"""


def transform_filters(v: Vectors, m: int, wide: int, u: str, transposed: bool) -> str:
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
        w1: T.int32 = k * {wide} * w_k + c * w_block + i * {v.block} + {register(v, "w_k")}
        u1: T.int32 = {u} + i * {wide * v.block} + r * {v.width}
        {indent(vectorized(work, v.width), 8)}
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
                {indent(prefetch_next(v, "w", "w1 + w_block", v.width * v.block), 16)}
                {indent(turn_square(v, f"turned[t1 + {{}} * {v.per_block}, T.Ramp(0, 1, {v.width})]"), 16)}
    for i in T.serial({v.block}):
        for s in T.serial({v.per_block}):
            u1: T.int32 = {u} + i * {wide * v.block} + o * {v.block} + s * {v.width}
            {indent(vectorized(work, v.width), 12)}
"""


def prefetch_next(v: Vectors, array: str, start: str, floats: int) -> str:
    """Asks for what comes in another place than the data now read; not on ARM, as in `tap_convolution`."""
    return "" if v.lanes else prefetch(*(f"{array}[{start} + {i}]" for i in range(0, floats, LINE)))


def turn_square(v: Vectors, row: str, of: str = "w") -> str:
    """`row`, with a number in it, becomes a row of the transpose of the square of w at w1, or of another pointer:
    interleaving rows i and i + n / 2 into rows 2 i and 2 i + 1, as often as halving n rows leaves one, transposes."""
    n, lanes = v.width, f"T.Ramp({{}}, 1, {v.width})"
    order = [lane for pair in zip(range(n), range(n, 2 * n), strict=True) for lane in pair]
    statements = [f"square[{i}, {lanes.format(0)}] = {of}[{lanes.format(f'{of}1 + {i * v.block}')}]" for i in range(n)]
    stages = n.bit_length() - 1
    for stage in range(stages):
        source, target = stage % 2 * n, (stage + 1) % 2 * n
        for i in range(n // 2):
            pair = f"[square[{source + i}, {lanes.format(0)}], square[{source + i + n // 2}, {lanes.format(0)}]]"
            for half in (0, 1):
                picked = order[half * n : half * n + n]
                statements.append(f"square[{target + 2 * i + half}, {lanes.format(0)}] = T.Shuffle({pair}, {picked})")
    last = stages % 2 * n
    statements += [f"{row.format(i)} = square[{last + i}, {lanes.format(0)}]" for i in range(n)]
    return "\n".join(statements)


def multiply(
    v: Vectors,
    wide: int,
    length: int,
    *,
    v_at: str,
    v_block: int | str,
    u_at: str,
    m_at: str,
    m_tile: int | str,
    first: str,
    v_next: str = "",
) -> str:
    """M = (M unless `first`) + V U for one group of tiles and the input channel blocks [c_start, c_stop). `v_next`: how
    much further on is what will be needed of V, if a processor can't foresee it."""

    def each(statement: str) -> str:
        return f"""
for p in T.unroll({length}):
    for r in T.unroll({wide * v.per_block}):
        for e in T.vectorized({v.width}):
            {statement}
"""

    at_m = f"m_[{m_at} + p * {m_tile} + r * {v.width} + e]"
    x_at = f"v_[v_c + p * {v.block} + {{}}]"
    w_at = f"u[u_c + {{}} * {wide * v.block} + r * {v.width} + e]"
    if v.lanes:
        inner = f"""
for q in T.unroll({v.block // v.lanes}):
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
    needed_next = prefetch_next(v, "v_", f"{v_at} + {v_next} + c * {v_block}", length * v.block) if v_next else ""
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
    v_c: T.int32 = {v_at} + c * {v_block}
    u_c: T.int32 = {u_at} + (c - c_first) * {v.block * wide * v.block}
    {indent(needed_next, 4)}
    {indent(inner, 4)}
{each(f"{at_m} = acc[p, r, e]")}
"""


def multiply_groups(v: Vectors, m: int, wide: int, long: int, *, v_base: str, u_at: str, first: str = "") -> str:
    """`multiply` for every xi and the groups [g_start, g_stop)."""
    m_tile, m_xi, m_group = m_strides(v, m, wide, long, by_xi=bool(first))

    def body(length: int) -> str:
        return multiply(
            v,
            wide,
            length,
            v_at=f"{v_base} + xi * v_xi",
            v_block=long * v.block,
            u_at=f"{u_at} + xi * u_xi",
            m_at=f"m0 + (g - g_start) * {m_group} + xi * {m_xi}",
            m_tile=m_tile,
            first=first,
            v_next="v_xi",  # the products of the next xi are far from these, and may not be in the nearest caches
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
for xi in T.serial({products(m)}):
    for g in T.serial(g_start, g_stop):
        {indent(work, 8)}
"""


def over_tiles(long: int, body: str) -> str:
    """`body` for every tile p of the groups [g_start, g_stop)."""
    return f"""
for g in T.serial(g_start, g_stop):
    for p in T.serial({long} - T.Select(g < long_groups, 0, 1)):
        tile: T.int32 = g * {long} - T.max(g - long_groups, 0) + p
        {indent(body, 8)}
"""


def transform_output(v: Vectors, m: int, wide: int, long: int, activation: str, *, by_xi: bool) -> str:
    """y = activation(bias + AT M A) of one tile of output channels, for the tiles of the groups [g_start, g_stop)."""
    size = m + 2
    m_tile, m_xi, m_group = m_strides(v, m, wide, long, by_xi=by_xi)
    statements = both_sides(
        matrices(m)[0],
        lambda i, j: f"m_[m1 + {(i * size + j) * m_xi} + r * {v.width} + v]",
        lambda i, j: f"result[{i * m + j}, v]",
    )
    value = "(result[{}, v] + offset[0, v])"
    y_at = f"y[y1 + {{}} * y_row + {{}} * y_pixel + {register(v, 'y_block')} + v]"
    stores = ""
    for i in range(m):
        line = ""
        for j in range(m):
            statement = f"{y_at.format(i, j)} = {ACTIVATIONS[activation].format(value.format(i * m + j))}"
            line += f"if w0 + {j} < columns:\n    {indent(vectorized([statement], v.width), 4)}\n"
        stores += f"if h0 + {i} < rows:\n    {indent(line, 4)}\n"
    bias = f"k * {wide * v.block} + r * {v.width} + v"
    body = f"""
{indent(place_of("tile", m), 0)}
m1: T.int32 = m0 + (g - g_start) * {m_group} + p * {m_tile}
y1: T.int32 = image * y_image + h0 * y_row + w0 * y_pixel + k * {wide} * y_block
for r in T.serial({wide * v.per_block}):
    if with_bias > 0:
        for v in T.vectorized({v.width}):
            offset[0, v] = bias[{bias}]
    else:
        for v in T.vectorized({v.width}):
            offset[0, v] = T.float32(0)
    {indent(vectorized(statements, v.width), 4)}
    {indent(stores, 4)}
"""
    return over_tiles(long, body)


def turning_squares(v: Vectors) -> Arrays:
    """The local array of `turn_square`."""
    return {"square": ((2 * v.width, v.width), "float32")}


def turning_arrays(v: Vectors) -> Arrays:
    """Local arrays that turn weights."""
    return turning_squares(v) | {"turned": ((9 * v.block * v.per_block, v.width), "float32")}


def multiplying_arrays(v: Vectors, m: int, wide: int, length: int) -> Arrays:
    """Local arrays of a multiplying kernel."""
    arrays = local_arrays(m + 2, v.width) | {
        "acc": ((length, wide * v.per_block, v.width), "float32"),
        "result": ((m * m, v.width), "float32"),
        "offset": ((1, v.width), "float32"),
    }
    if v.lanes:
        arrays["xv"] = ((length, v.lanes), "float32")
    return arrays
