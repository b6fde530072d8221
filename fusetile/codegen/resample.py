"""Linear maps of rows and columns by tables of taps, one vector of channels at a time."""

from __future__ import annotations

from fusetile.codegen.calls import Lowered, ref, vectors
from fusetile.codegen.job import Job
from fusetile.codegen.mapped import loops_over, mapped_call, mapped_kernel
from fusetile.codegen.reblock import conform

_TABLES = {"ROWS": "int32", "ROW_WEIGHTS": "float32", "COLUMNS": "int32", "COLUMN_WEIGHTS": "float32"}
_INTS = ("h_origin", "w_origin", "h_size", "w_size", "h_first", "w_first", "X_image", "X_block", "X_row")


def lower_resample(job: Job) -> Lowered:
    """y = sum over its taps; where every output has one tap of weight 1 or none, x or zero."""
    block, written, part = job.output.block[1], job.written(), job.need(0)
    before, [(x, _)] = conform(job.op, [job.operand(0)], job.output.block)
    tables = [job.op.attrs[key] for key in ("rows", "columns")]
    plain = all(taps in ((), (1.0,)) for table in tables for taps in table.weight)
    element = f"X[n * X_image + k * X_block + (ROWS[h_size + 1 + i] - h_first) * X_row + from_w * {block} + v]"
    add = f"total[v] + ROW_WEIGHTS[i] * COLUMN_WEIGHTS[j] * {element}"
    inner = vectors([f"total[v] = {element if plain else add}"], block).replace("\n", "\n        ")
    pixel = f"""
{vectors(["total[v] = T.float32(0)"], block)}
for i in T.serial(ROWS[h_origin + h], ROWS[h_origin + h + 1]):
    for j in T.serial(COLUMNS[w_origin + w], COLUMNS[w_origin + w + 1]):
        from_w: T.int32 = COLUMNS[w_size + 1 + j] - w_first
        {inner}
{vectors(["{Y} = total[v]"], block)}
"""
    kernel = mapped_kernel(
        "resample_plain" if plain else "resample",
        block=block,
        maps={"Y": "float32"},
        pointers={"X": "float32", **_TABLES},
        ints=_INTS,
        scratch={"total": "float32"},
        pixel=pixel,
    )
    sizes = [len(table.index) for table in tables]
    origins = (written[2][0], written[3][0], *sizes, part[2][0], part[3][0])
    call = mapped_call(
        kernel,
        loops_over(written, block),
        [job.result()],
        # a box without taps reads nothing: any address will do
        pointers=[ref(x, part if part[0][1] else None), *(ref(table) for table in job.inputs[1:])],
        ints=(*origins, *x.strides[:3]),
    )
    return Lowered((*before.calls, call), before.scratch)
