"""Products of matrices per image and head. Every output is one sum over c, in order."""

from __future__ import annotations

from fusetile.box import extents, view4
from fusetile.codegen.calls import KernelCall, Lowered, ref
from fusetile.codegen.elementwise import has_lanes, with_lanes
from fusetile.codegen.job import Job
from fusetile.codegen.matmul_rows import lower_of_rows
from fusetile.codegen.matmul_source import CHUNK, of_channels
from fusetile.errors import PlanError
from fusetile.ops.matmul import RESULT, own_axis

LARGE, SMALL = (3, 4), (2, 2)  # rows and columns
BAND_elements = 1 << 15  # of the left operand, that are gone through for every few columns: they should stay in a cache


def lower_mat_mul(job: Job) -> Lowered:
    """By where the heads are stored: as channels, so that lanes belong to different products, or as rows."""
    one, other = job.op.attrs["terms"]
    if one[1] == other[1] == "k":
        return _of_channels(job)
    if one[2] == other[2] == "h":
        return lower_of_rows(job)
    raise PlanError(f"{job.op.name}: no kernel for products of {one} and {other}")


def _of_channels(job: Job) -> Lowered:
    """The first operand has the rows, the second the columns; which of them are the result's rows, strides tell."""
    block, terms, output = job.output.block[1], job.op.attrs["terms"], job.output
    before, operands = with_lanes(job.op, job.operands, output)
    sizes = dict(zip(RESULT, extents(view4(job.written())), strict=True))
    placed = dict(zip(RESULT, output.strides, strict=True))
    own = [own_axis(terms[i], terms[1 - i]) for i in (0, 1)]
    strides = [placed[axis] for axis in ("n", "k", *own)]
    for term, axis, (buffer, need) in zip(terms, own, operands, strict=True):
        counts = dict(zip(term, extents(view4(need)), strict=True))
        along = dict(zip(term, buffer.strides, strict=True))
        strides += [*(along[i] if counts[i] == sizes[i] else 0 for i in "nk"), along[axis], along["c"]]
    width, (start, stop) = min(block, job.target.width), job.domain.interval(job.box, "c")
    lanes = has_lanes(operands[0], job.written()), has_lanes(operands[1], job.written())
    tile = _tile(block // width, job.target.registers)
    fitting = BAND_elements // (min(stop - start, CHUNK) * block) // tile[0] * tile[0]
    (rows, columns), blocks = (sizes[axis] for axis in own), -(-sizes["k"] // block)
    band = min(rows, max(tile[0], fitting))
    call = KernelCall(
        of_channels(block, width, tile, lanes),
        sizes["n"] * blocks * -(-rows // band),
        (*(ref(buffer, need) for buffer, need in operands), ref(*job.result())),
        (blocks, rows, columns, stop - start, band, sizes["k"], *strides),
    )
    return Lowered((*before.calls, call), before.scratch)


def _tile(parts: int, registers: int) -> tuple[int, int]:
    """The larger tile if registers hold its sums, a column of the left operand and an element of the right one."""
    rows, columns = LARGE
    return LARGE if (rows * columns + rows + 1) * parts <= registers else SMALL
