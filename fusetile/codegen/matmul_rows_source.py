"""The kernel of products of matrices whose heads are rows of maps: the lanes of a vector are rows of one product.

A work unit is a band of rows of a head of an image. Some columns of the right operand at a time, whose elements are
read one by one, serve all rows of the band. Pointers are A, B, Y.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from fusetile.codegen.calls import Kernel, indented, make_kernel
from fusetile.codegen.matmul_source import CHUNK, unrolled
from fusetile.codegen.register_tile import Vectors
from fusetile.codegen.winograd_parts import Arrays, turn_square, turning_squares

PAIR, BAND = 2, 8  # blocks of rows of a register tile, and of a work unit at most
INTS = (
    *("heads", "rows", "columns", "inner", "band", "B_start"),
    *("Y_image", "Y_block", "Y_row"),
    *(f"{key}_{stride}" for key in "AB" for stride in ("image", "head", "outer", "inner")),
)
"""Strides of A and B go from one image, head or block of rows, columns or the inner dimension to the next."""


@dataclass(frozen=True, slots=True)
class Form:
    """`wide`: columns of a register tile. The left operand is read as it is stored, or, if its lanes are the inner
    dimension (`turned`), put together first. That of the right one is `along` its lanes, or its pixels."""

    vectors: Vectors
    wide: int
    turned: bool
    along: bool

    @property
    def symbol(self) -> str:
        sides = "_turned" * self.turned + "_along" * self.along
        return f"mat_mul_rows{sides}_{self.wide}_{self.vectors.tag}"

    @property
    def by_vectors(self) -> bool:
        """Whether elements of the right operand are loaded several at a time, and multiplied by out of a register."""
        return self.along and self.vectors.lanes > 0

    def arrays(self) -> Arrays:
        """Local arrays: sums, where columns begin, elements, and turned rows."""
        v = self.vectors
        found: Arrays = {"sums": ((PAIR * self.wide * v.per_block, v.width), "float32"), "b": ((self.wide,), "int32")}
        if self.turned:
            found |= turning_squares(v) | {"a": ((BAND * CHUNK * v.block,), "float32")}
        return found | ({"e": ((self.wide, v.lanes), "float32")} if self.by_vectors else {})


@cache
def of_rows(form: Form) -> Kernel:
    """Lanes that are no rows are zero in the left operand, and so in the result."""
    block, wide = form.vectors.block, form.wide
    body = f"""
for u in T.serial(lo, hi):
    bands: T.int32 = T.truncdiv(rows + band * {block} - 1, band * {block})
    n: T.int32 = T.truncdiv(T.truncdiv(u, bands), heads)
    h: T.int32 = T.truncmod(T.truncdiv(u, bands), heads)
    first: T.int32 = T.truncmod(u, bands) * band
    blocks: T.int32 = T.min(band, T.truncdiv(rows + {block - 1}, {block}) - first)
    y0: T.int32 = n * Y_image + h * Y_row + first * Y_block
    for chunk in T.serial(T.truncdiv(inner + {CHUNK - 1}, {CHUNK})):
        depth: T.int32 = T.min(inner - chunk * {CHUNK}, {CHUNK})
        a0: T.int32 = n * A_image + h * A_head + first * A_outer + chunk * {CHUNK // block} * A_inner
        b0: T.int32 = n * B_image + h * B_head + chunk * {CHUNK // block} * B_inner
{indented(_turn_rows(form.vectors), 2) if form.turned else ""}
        for p in T.serial(T.truncdiv(columns, {wide})):
{indented(_columns(form, wide, f"p * {wide}"), 3)}
        for p in T.serial(T.truncmod(columns, {wide})):
{indented(_columns(form, 1, f"T.truncdiv(columns, {wide}) * {wide} + p"), 3)}
"""
    pointers = dict.fromkeys("ABY", "float32")
    return make_kernel(form.symbol, pointers=pointers, ints=INTS, scratch=form.arrays(), body=body)


def _columns(form: Form, columns: int, column: str) -> str:
    """Some columns of the band. Those that lie in lanes may begin at any."""
    block, index = form.vectors.block, f"(B_start + {column} + q)"
    in_lanes = f"T.truncdiv({index}, {block}) * B_outer + T.truncmod({index}, {block})"
    return f"""
for q in T.unroll({columns}):
    b[q] = b0 + {f"{index} * {block}" if form.along else in_lanes}
for j in T.serial(T.truncdiv(blocks, {PAIR})):
{indented(_tile(form, PAIR, columns, f"j * {PAIR}", column), 1)}
if blocks % {PAIR} > 0:
{indented(_tile(form, 1, columns, "(blocks - 1)", column), 1)}
"""


def _tile(form: Form, blocks: int, columns: int, first: str, column: str) -> str:
    """A register tile. Sums rest in the result between chunks of the inner dimension."""
    v = form.vectors
    block, lanes = v.block, f"s * {v.width} + v"

    def each(statement: str) -> str:
        return unrolled({"q": columns, "r": blocks, "s": v.per_block}, statement, v.width)

    sums = f"sums[(r * {columns} + q) * {v.per_block} + s, v]"
    y = f"Y[y0 + ({first} + r) * Y_block + ({column} + q) * {block} + {lanes}]"
    rows = f"a[({first} + r) * {CHUNK * block}" if form.turned else f"A[a0 + ({first} + r) * A_outer"
    product = f"{sums} = {sums} + {rows} + (i * {block} + {{}}) * {block} + {lanes}] * {{}}"
    one = each(product.format("lane", f"B[b[q] + at + lane * {1 if form.along else block}]"))
    whole = f"for lane in T.unroll({block}):\n{indented(one, 1)}"
    if form.by_vectors:
        whole = f"""
for g in T.unroll({block // v.lanes}):
    for q in T.unroll({columns}):
        for v in T.vectorized({v.lanes}):
            e[q, v] = B[b[q] + at + g * {v.lanes} + v]
    for lane in T.unroll({v.lanes}):
{indented(each(product.format(f"g * {v.lanes} + lane", "e[q, lane]")), 2)}
"""
    at = f"at: T.int32 = i * {'B_inner' if form.along else block * block}"
    return f"""
if chunk > 0:
{indented(each(f"{sums} = {y}"), 1)}
else:
{indented(each(f"{sums} = T.float32(0)"), 1)}
for i in T.serial(T.truncdiv(depth, {block})):
    {at}
{indented(whole, 1)}
for lane in T.serial(depth % {block}):
    i: T.int32 = T.truncdiv(depth, {block})
    {at}
{indented(one, 1)}
{each(f"{y} = {sums}")}
"""


def _turn_rows(v: Vectors) -> str:
    """By squares of rows and inner lanes. Lanes that are no rows become zero; those that pad the others are it."""
    square = f"a[T.Ramp(at + (q * {v.width} + {{}}) * {v.block}, 1, {v.width})]"
    return f"""
for i in T.serial(blocks):
    full: T.int32 = T.min({v.block}, rows - (first + i) * {v.block})
    for c in T.serial(T.truncdiv(depth + {v.block - 1}, {v.block})):
        start: T.int32 = a0 + i * A_outer + c * A_inner
        if full == {v.block}:
            for s, q in T.grid({v.per_block}, {v.per_block}):
                A1: T.int32 = start + s * {v.width * v.block} + q * {v.width}
                at: T.int32 = (i * {CHUNK} + c * {v.block}) * {v.block} + s * {v.width}
{indented(turn_square(v, square, "A"), 4)}
        else:
            for lane in T.serial({v.block}):
                for row in T.serial({v.block}):
                    a[(i * {CHUNK} + c * {v.block} + lane) * {v.block} + row] = T.if_then_else(
                        row < full, A[start + row * {v.block} + lane], T.float32(0)
                    )
"""
