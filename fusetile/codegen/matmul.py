"""Products of matrices per image and channel."""

from __future__ import annotations

from fusetile.box import extents, view4
from fusetile.codegen.calls import KernelCall, Lowered, ref
from fusetile.codegen.elementwise import has_lanes, with_lanes
from fusetile.codegen.job import Job
from fusetile.codegen.matmul_source import CHUNK, ROWS, of_channels, of_columns

LARGE, SMALL = (3, 4), (2, 2)  # rows and columns
FEW = 4  # channels are few if they fill at most one in so many lanes: else there is little to gain
BAND_elements = 1 << 15  # of the left operand, that are gone through for every few columns: they should stay in a cache


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
        kernel, long = of_columns(block, width, lanes), ROWS
    else:
        tile = _tile(block // width, job.target.registers)
        kernel, long = of_channels(block, width, tile, lanes), tile[0]
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
