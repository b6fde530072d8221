"""Products of matrices whose heads are rows of maps: channels are rows of the matrices, so that vectors are full."""

from __future__ import annotations

from fusetile.box import Box, extents, view4
from fusetile.codegen.calls import Lowered, named_call, ref
from fusetile.codegen.conv_tiles import MIN_UNITS, Machine, machine
from fusetile.codegen.elementwise import Operand
from fusetile.codegen.job import Job
from fusetile.codegen.matmul_rows_source import BAND, INTS, PAIR, Form, of_rows
from fusetile.codegen.reblock import conform


def lower_of_rows(job: Job) -> Lowered:
    """The operand with the axis k, whose blocks the result has too, is the left one."""
    block, terms = job.output.block[1], job.op.attrs["terms"]
    before, operands = conform(job.op, job.operands, job.output.block)
    left = 0 if "k" in terms[0] else 1
    images, rows, heads, columns = extents(view4(job.written()))
    start, stop = job.domain.interval(job.box, "c")
    ints = dict(zip(("Y_image", "Y_block", "Y_row"), job.output.strides, strict=False))
    ints |= {"heads": heads, "rows": rows, "columns": columns, "inner": stop - start}
    pointers = []
    for name, i, own in (("A", left, "k"), ("B", 1 - left, "w")):
        (buffer, need), term = operands[i], terms[i]
        aligned, ints[f"{name}_start"] = _aligned(operands[i])
        pointers.append(ref(buffer, aligned))
        strides, counts = dict(zip(term, buffer.strides, strict=True)), dict(zip(term, extents(need), strict=True))
        ints[f"{name}_image"] = strides["n"] if counts["n"] == images else 0
        ints[f"{name}_head"] = strides["h"] if counts["h"] == heads else 0
        for label, axis in (("outer", own), ("inner", "c")):
            ints[f"{name}_{label}"] = strides[axis] * (1 if term[1] == axis else block)
    blocks, m = -(-rows // block), machine(job.target, block)
    ints["band"] = max(PAIR, min(BAND, images * heads * blocks // MIN_UNITS) // PAIR * PAIR)
    form = Form(m.vectors, _columns(m), turned=terms[left][1] == "c", along=terms[1 - left][1] == "c")
    units = images * heads * -(-blocks // ints["band"])
    call = named_call(of_rows(form), units, [*pointers, ref(*job.result())], INTS, ints)
    return Lowered((*before.calls, call), before.scratch)


def _columns(m: Machine) -> int:
    """Columns of a register tile. Registers hold its sums, the vectors of rows and, where elements are not read from
    memory (ARM), one of each column; the number is even, as those of tokens mostly are."""
    vectors = PAIR * m.vectors.per_block
    return (m.registers - 2 - vectors) // (vectors + (m.vectors.lanes > 0)) // 2 * 2


def _aligned(operand: Operand) -> tuple[Box, int]:
    """The box from the block on in which it begins, and the lane there."""
    buffer, (images, (start, stop), *rest) = operand
    first = view4(buffer.box)[1][0]
    lane = (start - first) % buffer.block[1]
    return (images, (start - lane, stop), *rest), lane
