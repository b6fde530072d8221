"""Products of matrices per image and channel: the lanes of a vector are channels, that is different products; where
there are few channels, they are columns of one product.

A register tile is some rows x some columns of the result, so that what is loaded of both operands is multiplied several
times. The columns of the right operand are first put together: they serve all rows of a band, and their addresses are
then one.
"""

from __future__ import annotations

from functools import cache

from fusetile.box import extents, view4
from fusetile.codegen.calls import Kernel, KernelCall, Lowered, indented, make_kernel, ref, vectors
from fusetile.codegen.elementwise import has_lanes, with_lanes
from fusetile.codegen.job import Job

LARGE, SMALL = (3, 4), (2, 2)  # rows and columns
ROWS, WIDE = 4, 2  # rows, and vectors of columns, where there are few channels
FEW = 4  # channels are few if they fill at most one in so many lanes: else there is little to gain
CHUNK = 128  # of the inner dimension, between which sums rest in the result
BAND_elements = 1 << 15  # of the left operand, that are gone through for every few columns: they should stay in a cache

_INTS = (
    *("blocks", "rows", "columns", "inner", "band", "channels"),
    *("Y_image", "Y_block", "Y_row", "Y_pixel"),
    *(f"{key}_{axis}" for key in "AB" for axis in ("image", "block", "outer", "inner")),
)


def lower_mat_mul(job: Job) -> Lowered:
    """Every output is one sum over c, in order."""
    block, written = job.output.block[1], job.written()
    before, operands = with_lanes(job.op, job.operands, job.output)
    images, channels, rows, columns = extents(view4(written))
    strides: list[int] = []
    for i, (buffer, need) in enumerate(operands):
        counts = extents(view4(need))[:2]
        image, depth, row, pixel = buffer.strides
        # a is [h, c] and b is [c, w], as long as they are not turned
        outer, inner = (pixel, row) if job.op.attrs["turned"][i] == (i == 0) else (row, pixel)
        strides += [image if counts[0] == images else 0, depth if counts[1] == channels else 0, outer, inner]
    width, (start, stop) = min(block, job.target.width), job.domain.interval(job.box, "c")
    lanes = has_lanes(operands[0], written), has_lanes(operands[1], written)
    blocks, few = -(-channels // block), channels * FEW <= block and columns > 1
    if few:
        kernel, long = _few_channels(block, width, lanes), ROWS
    else:
        tile = _tile(block // width, job.target.registers)
        kernel, long = _product(block, width, tile, lanes), tile[0]
    fitting = BAND_elements // (min(stop - start, CHUNK) * block) // long * long
    band = min(rows, max(long, fitting))
    call = KernelCall(
        kernel,
        images * blocks * -(-rows // band),
        (*(ref(buffer, need) for buffer, need in operands), ref(*job.result())),
        (blocks, rows, columns, stop - start, band, channels, *job.output.strides, *strides),
    )
    return Lowered((*before.calls, call), before.scratch)


def _tile(parts: int, registers: int) -> tuple[int, int]:
    """The larger tile if registers hold its sums, a column of the left operand and an element of the right one."""
    rows, columns = LARGE
    return LARGE if (rows * columns + rows + 1) * parts <= registers else SMALL


@cache
def _product(block: int, width: int, tile: tuple[int, int], lanes: tuple[bool, bool]) -> Kernel:
    """Pointers A, B, Y. A work unit is a band of rows of one channel block of one image."""
    parts, (long, wide) = block // width, tile
    lane = f"s * {width} + v"
    of_channel = [f" + {lane}" if has else "" for has in lanes]
    held = block if lanes[1] else 1

    def of_tile(rows: int, columns: int, row: str, column: str) -> str:
        def each(statement: str) -> str:
            loops = "".join(
                f"{'    ' * i}for {name} in T.unroll({count}):\n"
                for i, (name, count) in enumerate((("q", columns), ("r", rows), ("s", parts)))
            )
            return loops + indented(vectors([statement], width), 3)

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

    def of_columns(columns: int, column: str) -> str:
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

    body = f"""
for u in T.serial(lo, hi):
    bands: T.int32 = T.truncdiv(rows + band - 1, band)
    n: T.int32 = T.truncdiv(T.truncdiv(u, bands), blocks)
    k: T.int32 = T.truncmod(T.truncdiv(u, bands), blocks)
    first: T.int32 = T.truncmod(u, bands) * band
    height: T.int32 = T.min(band, rows - first)
    for chunk in T.serial(T.truncdiv(inner + {CHUNK - 1}, {CHUNK})):
        depth: T.int32 = T.min(inner - chunk * {CHUNK}, {CHUNK})
        for j in T.serial(T.truncdiv(columns, {wide})):
{indented(of_columns(wide, f"j * {wide}"), 3)}
        for j in T.serial(T.truncmod(columns, {wide})):
{indented(of_columns(1, f"T.truncdiv(columns, {wide}) * {wide} + j"), 3)}
"""
    names = "".join("_lanes" if has else "_alone" for has in lanes)
    return make_kernel(
        f"mat_mul{names}_{long}x{wide}_b{block}v{width}",
        pointers=dict.fromkeys("ABY", "float32"),
        ints=_INTS,
        scratch={"sums": ((long * wide * parts, width), "float32"), "b": ((CHUNK * wide * held,), "float32")},
        body=body,
    )


@cache
def _few_channels(block: int, width: int, lanes: tuple[bool, bool]) -> Kernel:
    """Pointers A, B, Y. A work unit is a band of rows of one image. Before the first of its channels is written, pixels
    are cleared as a whole: lanes that are no channels are zero."""
    wide = WIDE * width
    of_channel = [" + lane" if has else "" for has in lanes]

    def of_rows(rows: int, row: str) -> str:
        def each(statement: str) -> str:
            loops = f"for r in T.unroll({rows}):\n    for s in T.unroll({WIDE}):\n"
            return loops + indented(vectors([statement], width), 2)

        t, sums = f"t[r * {wide} + s * {width} + v]", f"sums[r * {WIDE} + s, v]"
        product = f"A[a0 + r * A_outer + c * A_inner] * b[c * {wide} + s * {width} + v]"
        return f"""
a0: T.int32 = n * A_image + ({row}) * A_outer + chunk * {CHUNK} * A_inner{of_channel[0]}
y0: T.int32 = n * Y_image + ({row}) * Y_row + j * {wide} * Y_pixel
if chunk > 0:
    for r in T.serial({rows}):
        for q in T.serial(count):
            t[r * {wide} + q] = Y[y0 + r * Y_row + q * Y_pixel + lane]
{indented(each(f"{sums} = {t}"), 1)}
else:
{indented(each(f"{sums} = T.float32(0)"), 1)}
for c in T.serial(depth):
{indented(each(f"{sums} = {sums} + {product}"), 1)}
{each(f"{t} = {sums}")}
for r in T.serial({rows}):
    for q in T.serial(count):
        if lane + chunk == 0:
{indented(vectors(["Y[y0 + r * Y_row + q * Y_pixel + v] = T.float32(0)"], block), 3)}
        Y[y0 + r * Y_row + q * Y_pixel + lane] = t[r * {wide} + q]
"""

    body = f"""
for u in T.serial(lo, hi):
    bands: T.int32 = T.truncdiv(rows + band - 1, band)
    n: T.int32 = T.truncdiv(u, bands)
    first: T.int32 = T.truncmod(u, bands) * band
    height: T.int32 = T.min(band, rows - first)
    for chunk in T.serial(T.truncdiv(inner + {CHUNK - 1}, {CHUNK})):
        depth: T.int32 = T.min(inner - chunk * {CHUNK}, {CHUNK})
        for j in T.serial(T.truncdiv(columns + {wide - 1}, {wide})):
            count: T.int32 = T.min(columns - j * {wide}, {wide})
            for lane in T.serial(channels):
                b0: T.int32 = n * B_image + j * {wide} * B_outer + chunk * {CHUNK} * B_inner{of_channel[1]}
                for c in T.serial(depth):
                    for q in T.serial(count):
                        b[c * {wide} + q] = B[b0 + q * B_outer + c * B_inner]
                for i in T.serial(T.truncdiv(height, {ROWS})):
{indented(of_rows(ROWS, f"first + i * {ROWS}"), 5)}
                for i in T.serial(T.truncmod(height, {ROWS})):
{indented(of_rows(1, f"first + T.truncdiv(height, {ROWS}) * {ROWS} + i"), 5)}
"""
    names = "".join("_lanes" if has else "_alone" for has in lanes)
    return make_kernel(
        f"mat_mul_few{names}_b{block}v{width}",
        pointers=dict.fromkeys("ABY", "float32"),
        ints=_INTS,
        scratch={
            "sums": ((ROWS * WIDE, width), "float32"),
            "b": ((CHUNK * wide,), "float32"),
            "t": ((ROWS * wide,), "float32"),
        },
        body=body,
    )
