"""TVMScript of the small kernels around the convolutions; see conv_source.

Where a convolution needs an operand in another order, or a result in pieces:

    transpose_filter   w -> the weights of the input gradient: channels swapped, window flipped
    sum_parts          partial weight gradients -> their sum
    gather_rows        [N][C/B][B] -> [C/B][N][B]
"""

from __future__ import annotations

from functools import cache

from fusetile.codegen.calls import Kernel, make_kernel, prefetch
from fusetile.codegen.register_tile import LINE, Vectors, indent

TRANSPOSE_INTS = ("k_blocks", "taps_h", "taps_w", "w_k", "w_block", "w_tap_h", "w_tap_w")
SUM_INTS = ("parts", "vectors", "part", "source_k", "target_k")
GATHER_INTS = ("images", "x_image", "x_block", "block")


@cache
def transpose_filter(*, vectors: Vectors, lines: int, window: bool) -> Kernel:
    """t[c][k][tap][k lane][c lane] = w[k][c][tap][c lane][k lane]; c lanes beyond `lines` are zero, and the taps of w
    have any distance, so that a start at the last one turns the window around. `window`: there is more than one.

    Lines are transposed in registers, by fours; left to itself, LLVM stores float by float. A work unit is one block of
    input channels. Pointers w, t.
    """
    v, block, quads = vectors, vectors.block, lines // 4
    deinterleaved = v.wide and block == 8
    whole = _deinterleaved(block, quads) if deinterleaved else _squares(block, quads)
    rest = f"""
for line, e in T.grid({lines % 4}, {block}):
    t[t0 + e * {block} + {quads * 4} + line] = w[w0 + ({quads * 4} + line) * {block} + e]
for line, e in T.grid({block - lines}, {block}):
    t[t0 + e * {block} + {lines} + line] = T.float32(0)
"""
    over = {"k": "k_blocks"} | ({"th": "taps_h", "tw": "taps_w"} if window else {})
    tap = f" + {v.offset('th')} * {v.offset('w_tap_h')} + {v.offset('tw')} * {v.offset('w_tap_w')}" if window else ""
    t_tap = f" + {v.offset('th * taps_w + tw')} * {block * block}" if window else ""
    taps = f" * {v.offset('taps_h * taps_w')}" if window else ""
    body = f"""
for c in T.serial(lo, hi):
    for {", ".join(over)} in T.grid({", ".join(over.values())}):
        w0: {v.index} = {v.offset("c")} * {v.offset("w_block")} + {v.offset("k")} * {v.offset("w_k")}{tap}
        t0: {v.index} = ({v.offset("c * k_blocks")} + {v.offset("k")}){taps} * {block * block}{t_tap}
        {indent(prefetch(*(f"w[w0 + {v.offset('w_k')} + {i}]" for i in range(0, lines * block, LINE))), 8)}
        {indent(whole if quads else "", 8)}
        {indent(rest if lines < block else "", 8)}
"""
    return make_kernel(
        f"transpose_filter{'_window' * window}_l{lines}_b{block}",
        pointers=dict.fromkeys(("w", "t"), "float32"),
        body=body,
        ints=TRANSPOSE_INTS,
        scratch={} if deinterleaved else {"square": ((12, 4), "float32")},
    )


def _squares(block: int, quads: int) -> str:
    """Transposes 4 x 4 floats: interleaving rows i and i + 2 into rows 2i and 2i + 1, twice."""
    quad = "T.Ramp({}, 1, 4)"
    load = [
        f"square[{i}, {quad.format(0)}] = w[{quad.format(f'w0 + (q * 4 + {i}) * {block} + g * 4')}]" for i in range(4)
    ]
    shuffles = [
        f"square[{target + 2 * i + half}, {quad.format(0)}] = T.Shuffle("
        f"[square[{source + i}, {quad.format(0)}], square[{source + i + 2}, {quad.format(0)}]], {order})"
        for source, target in ((0, 4), (4, 8))
        for i in (0, 1)
        for half, order in enumerate(([0, 4, 1, 5], [2, 6, 3, 7]))
    ]
    store = [
        f"t[{quad.format(f't0 + (g * 4 + {i}) * {block} + q * 4')}] = square[{8 + i}, {quad.format(0)}]"
        for i in range(4)
    ]
    return f"""
for q, g in T.grid({quads}, {block // 4}):
    {indent(chr(10).join([*load, *shuffles, *store]), 4)}
"""


def _deinterleaved(block: int, quads: int) -> str:
    """The same for lines of 8 floats with half the instructions, as 64-bit ARM has them: two lines are loaded with
    every fourth float in the same register (ld4), and of two such registers the even and the odd floats are rows. Rows
    are stored one after another, which takes one instruction per pair of vectors."""

    def fourths(line: int, j: int) -> str:
        return f"T.Shuffle([w[T.Ramp(w0 + {line * block}, 1, {2 * block})]], {[j, 4 + j, 8 + j, 12 + j]})"

    return "\n".join(
        f"t[T.Ramp(t0 + {i * block + 4 * q}, 1, 4)] = "
        f"T.Shuffle([{fourths(4 * q, i % 4)}, {fourths(4 * q + 2, i % 4)}], {[i // 4 + 2 * lane for lane in range(4)]})"
        for i in range(block)
        for q in range(quads)
    )


@cache
def sum_parts(*, vectors: Vectors) -> Kernel:
    """target = sum of `parts` arrays, in order. A work unit is a block of output channels. Pointers source, target."""
    v = vectors
    body = f"""
for k in T.serial(lo, hi):
    for i in T.serial(vectors):
        for u in T.unroll({v.per_block}):
            for e in T.vectorized({v.width}):
                acc[u, e] = source[k * source_k + i * {v.block} + u * {v.width} + e]
        for p in T.serial(1, parts):
            for u in T.unroll({v.per_block}):
                for e in T.vectorized({v.width}):
                    acc[u, e] = acc[u, e] + source[p * part + k * source_k + i * {v.block} + u * {v.width} + e]
        for u in T.unroll({v.per_block}):
            for e in T.vectorized({v.width}):
                target[k * target_k + i * {v.block} + u * {v.width} + e] = acc[u, e]
"""
    return make_kernel(
        f"sum_parts_{v.tag}",
        pointers=dict.fromkeys(("source", "target"), "float32"),
        body=body,
        ints=SUM_INTS,
        scratch={"acc": ((v.per_block, v.width), "float32")},
    )


@cache
def gather_rows() -> Kernel:
    """t[c][n][lane] = x[n][c][lane], `block` lanes. A work unit is one channel block. Pointers x, t."""
    body = """
for c in T.serial(lo, hi):
    for n in T.serial(images):
        for e in T.serial(block):
            t[(c * images + n) * block + e] = x[n * x_image + c * x_block + e]
"""
    return make_kernel("gather_rows", pointers=dict.fromkeys(("x", "t"), "float32"), body=body, ints=GATHER_INTS)
