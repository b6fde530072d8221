"""The kernel of products of matrices whose heads are channels.

A register tile is some rows x some columns of the result, so that what is loaded of both operands is multiplied several
times. The columns of the right operand are first put together: they serve all rows of a band, and their addresses are
then one. Pointers are A, B, Y. Each operand has lanes, or one channel that all share.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from fusetile.codegen.calls import Kernel, indented, make_kernel, vectors

CHUNK = 128  # of the inner dimension, between which sums rest in the result
INTS = (
    *("blocks", "rows", "columns", "inner", "band", "channels"),
    *("Y_image", "Y_block", "Y_row", "Y_pixel"),
    *(f"{key}_{axis}" for key in "AB" for axis in ("image", "block", "outer", "inner")),
)
Lanes = tuple[bool, bool]


@cache
def of_channels(block: int, width: int, tile: tuple[int, int], lanes: Lanes) -> Kernel:
    """The lanes of a vector are channels, that is different products; `tile`: rows and columns. A work unit is a band
    of rows of one channel block of one image."""
    parts, (long, wide) = block // width, tile
    lane = f"s * {width} + v"
    of_channel = [f" + {lane}" if has else "" for has in lanes]
    held = block if lanes[1] else 1

    def of_tile(rows: int, columns: int, row: str, column: str) -> str:
        def each(statement: str) -> str:
            return unrolled({"q": columns, "r": rows, "s": parts}, statement, width)

        sums = f"sums[(r * {columns} + q) * {parts} + s, v]"
        y = f"Y[y0 + r * Y_row + q * Y_pixel + {lane}]"
        a = f"A[a0 + r * A_outer + c * A_inner{of_channel[0]}]"
        b = f"b[(c * {columns} + q) * {held}{of_channel[1]}]"
        return f"""
a0: T.int32 = n * A_image + k * A_block + ({row}) * A_outer + chunk * {CHUNK} * A_inner
y0: T.int32 = n * Y_image + k * Y_block + ({row}) * Y_row + ({column}) * Y_pixel
if chunk > 0:
{indented(each(f"{sums} = {y}"), 1)}
else:
{indented(each(f"{sums} = T.float32(0)"), 1)}
for c in T.serial(depth):
{indented(each(f"{sums} = {sums} + {a} * {b}"), 1)}
{each(f"{y} = T.Select(k * {block} + {lane} < channels, {sums}, T.float32(0))")}
"""

    def of_some(columns: int, column: str) -> str:
        gather = vectors([f"b[(c * {columns} + q) * {held} + v] = B[b0 + q * B_outer + c * B_inner + v]"], held)
        return f"""
b0: T.int32 = n * B_image + k * B_block + ({column}) * B_outer + chunk * {CHUNK} * B_inner
for c in T.serial(depth):
    for q in T.serial({columns}):
{indented(gather, 2)}
for i in T.serial(T.truncdiv(height, {long})):
{indented(of_tile(long, columns, f"first + i * {long}", column), 1)}
for i in T.serial(T.truncmod(height, {long})):
{indented(of_tile(1, columns, f"first + T.truncdiv(height, {long}) * {long} + i", column), 1)}
"""

    of_chunk = f"""
for j in T.serial(T.truncdiv(columns, {wide})):
{indented(of_some(wide, f"j * {wide}"), 1)}
for j in T.serial(T.truncmod(columns, {wide})):
{indented(of_some(1, f"T.truncdiv(columns, {wide}) * {wide} + j"), 1)}
"""
    scratch = {"sums": (long * wide * parts, width), "b": (CHUNK * wide * held,)}
    return _kernel(lanes, f"{long}x{wide}_b{block}v{width}", of_chunk, scratch)


def unrolled(counts: Mapping[str, int], statement: str, width: int) -> str:
    """A statement for every element of a register tile, whose loops have these counts."""
    loops = "".join(f"{'    ' * i}for {name} in T.unroll({count}):\n" for i, (name, count) in enumerate(counts.items()))
    return loops + indented(vectors([statement], width), len(counts))


def _kernel(lanes: Lanes, tag: str, of_chunk: str, scratch: Mapping[str, tuple[int, ...]]) -> Kernel:
    """With the loops around: images `n`, channel blocks `k`, bands of rows, chunks of the inner dimension."""
    body = f"""
for u in T.serial(lo, hi):
    bands: T.int32 = T.truncdiv(rows + band - 1, band)
    n: T.int32 = T.truncdiv(T.truncdiv(u, bands), blocks)
    k: T.int32 = T.truncmod(T.truncdiv(u, bands), blocks)
    first: T.int32 = T.truncmod(u, bands) * band
    height: T.int32 = T.min(band, rows - first)
    for chunk in T.serial(T.truncdiv(inner + {CHUNK - 1}, {CHUNK})):
        depth: T.int32 = T.min(inner - chunk * {CHUNK}, {CHUNK})
{indented(of_chunk, 2)}
"""
    names = "".join("_lanes" if has else "_alone" for has in lanes)
    return make_kernel(
        f"mat_mul{names}_{tag}",
        pointers=dict.fromkeys("ABY", "float32"),
        ints=INTS,
        scratch={array: (shape, "float32") for array, shape in scratch.items()},
        body=body,
    )
