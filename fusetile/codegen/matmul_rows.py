"""Products of matrices whose heads are rows of maps: channels are rows of the matrices, so that vectors are full."""

from __future__ import annotations

from functools import cache

from fusetile.box import Box, extents, view4
from fusetile.codegen.calls import Kernel, Lowered, indented, make_kernel, named_call, ref
from fusetile.codegen.conv_tiles import MIN_UNITS, machine
from fusetile.codegen.elementwise import Operand
from fusetile.codegen.job import Job
from fusetile.codegen.matmul_source import CHUNK, unrolled
from fusetile.codegen.reblock import conform
from fusetile.codegen.register_tile import Vectors
from fusetile.codegen.winograd_parts import Arrays, turn_square, turning_squares

PAIR, BAND = 2, 8  # blocks of rows of a register tile, and of a work unit at most
WIDEST = 6  # columns of a register tile
_INTS = (
    *("heads", "rows", "columns", "inner", "band", "B_start"),
    *("Y_image", "Y_block", "Y_row", "Y_pixel"),
    *(
        f"{key}_{stride}"
        for key in "AB"
        for stride in ("image", "head", "outer_block", "outer_lane", "inner_block", "inner_lane")
    ),
)


def lower_of_rows(job: Job) -> Lowered:
    """The operand with the axis k, whose blocks the result has too, is the left one."""
    block, terms = job.output.block[1], job.op.attrs["terms"]
    before, operands = conform(job.op, job.operands, job.output.block)
    left = 0 if "k" in terms[0] else 1
    images, rows, heads, columns = extents(view4(job.written()))
    start, stop = job.domain.interval(job.box, "c")
    ints = dict(zip(("Y_image", "Y_block", "Y_row", "Y_pixel"), job.output.strides, strict=True))
    ints |= {"heads": heads, "rows": rows, "columns": columns, "inner": stop - start}
    pointers = []
    for name, i, own in (("A", left, "k"), ("B", 1 - left, "w")):
        (buffer, need), term = operands[i], terms[i]
        aligned, lane = _aligned(operands[i])
        pointers.append(ref(buffer, aligned))
        strides, counts = dict(zip(term, buffer.strides, strict=True)), dict(zip(term, extents(need), strict=True))
        ints[f"{name}_image"] = strides["n"] if counts["n"] == images else 0
        ints[f"{name}_head"] = strides["h"] if counts["h"] == heads else 0
        for label, axis in (("outer", own), ("inner", "c")):
            in_lanes = term[1] == axis
            ints[f"{name}_{label}_block"] = strides[axis] * (1 if in_lanes else block)
            ints[f"{name}_{label}_lane"] = 1 if in_lanes else strides[axis]
        if name == "B":
            ints["B_start"] = lane
    blocks, vectors = -(-rows // block), machine(job.target, block).vectors
    ints["band"] = max(PAIR, min(BAND, images * heads * blocks // MIN_UNITS) // PAIR * PAIR)
    # registers hold the sums, vectors of rows, and an element
    wide = min(WIDEST, ((job.target.registers - 1) // vectors.per_block - PAIR) // PAIR)
    kernel = _of_rows(vectors, wide, turned=terms[left][1] != "k")
    units = images * heads * -(-blocks // ints["band"])
    call = named_call(kernel, units, [*pointers, ref(*job.result())], _INTS, ints)
    return Lowered((*before.calls, call), before.scratch)


def _aligned(operand: Operand) -> tuple[Box, int]:
    """The box from the block on in which it begins, and the lane there."""
    buffer, (images, (start, stop), *rest) = operand
    first = view4(buffer.box)[1][0]
    lane = (start - first) % buffer.block[1]
    return (images, (start - lane, stop), *rest), lane


@cache
def _of_rows(vectors: Vectors, wide: int, *, turned: bool) -> Kernel:
    """The lanes of a vector are rows of one product. A work unit is a band of rows of a head of an image. Its part of
    the left operand is read as it is stored, or, if lanes are the inner dimension (`turned`), put together first. Lanes
    that are no rows are zero there, and so in the result. Of the right operand elements are read one by one, those of
    `wide` columns for all rows of the band."""
    block, width, parts = vectors.block, vectors.width, vectors.per_block

    def of_tile(blocks: int, columns: int, first: str, column: str) -> str:
        def each(statement: str) -> str:
            return unrolled({"q": columns, "r": blocks, "s": parts}, statement, width)

        lanes = f"s * {width} + v"
        a = f"a[(({first} + r) * {CHUNK} + c) * {block} + {lanes}]"
        if not turned:
            a = f"A[a0 + ({first} + r) * A_outer_block + c * A_inner_lane + {lanes}]"
        sums = f"sums[(r * {columns} + q) * {parts} + s, v]"
        y = f"Y[y0 + ({first} + r) * Y_block + ({column} + q) * Y_pixel + {lanes}]"
        return f"""
if chunk > 0:
{indented(each(f"{sums} = {y}"), 1)}
else:
{indented(each(f"{sums} = T.float32(0)"), 1)}
for c_block in T.serial(T.truncdiv(depth + {block - 1}, {block})):
    for lane in T.serial(T.min({block}, depth - c_block * {block})):
        c: T.int32 = c_block * {block} + lane
        at: T.int32 = c_block * B_inner_block + lane * B_inner_lane
{indented(each(f"{sums} = {sums} + {a} * B[b[q] + at]"), 2)}
{each(f"{y} = {sums}")}
"""

    def of_columns(columns: int, column: str) -> str:
        return f"""
for q in T.unroll({columns}):
    b[q] = b0 + {_place("B_outer", f"(B_start + {column} + q)", block)}
for i in T.serial(T.truncdiv(blocks, {PAIR})):
{indented(of_tile(PAIR, columns, f"i * {PAIR}", column), 1)}
if blocks % {PAIR} > 0:
{indented(of_tile(1, columns, "(blocks - 1)", column), 1)}
"""

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
        a0: T.int32 = n * A_image + h * A_head + first * A_outer_block + chunk * {CHUNK // block} * A_inner_block
        b0: T.int32 = n * B_image + h * B_head + chunk * {CHUNK // block} * B_inner_block
{indented(_turn_rows(vectors), 2) if turned else ""}
        for j in T.serial(T.truncdiv(columns, {wide})):
{indented(of_columns(wide, f"j * {wide}"), 3)}
        for j in T.serial(T.truncmod(columns, {wide})):
{indented(of_columns(1, f"T.truncdiv(columns, {wide}) * {wide} + j"), 3)}
"""
    scratch: Arrays = {"sums": ((PAIR * wide * parts, width), "float32"), "b": ((wide,), "int32")}
    if turned:
        scratch |= turning_squares(vectors) | {"a": ((BAND * CHUNK * block,), "float32")}
    return make_kernel(
        f"mat_mul_rows{'_turned' if turned else ''}_{wide}_b{block}v{width}",
        pointers=dict.fromkeys("ABY", "float32"),
        ints=_INTS,
        scratch=scratch,
        body=body,
    )


def _turn_rows(v: Vectors) -> str:
    """By squares of rows and inner lanes. Lanes that are no rows become zero; those that pad the others are it."""
    square = f"a[T.Ramp(at + (q * {v.width} + {{}}) * {v.block}, 1, {v.width})]"
    return f"""
for i in T.serial(blocks):
    full: T.int32 = T.min({v.block}, rows - (first + i) * {v.block})
    for c in T.serial(T.truncdiv(depth + {v.block - 1}, {v.block})):
        start: T.int32 = a0 + i * A_outer_block + c * A_inner_block
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


def _place(name: str, index: str, block: int) -> str:
    """Where an index along an axis is that may go through lanes."""
    return f"T.truncdiv({index}, {block}) * {name}_block + T.truncmod({index}, {block}) * {name}_lane"
