"""Sums and maxima of a map, or sums of products, over the axes that another tensor lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from fusetile.box import extents, view4
from fusetile.codegen.calls import Lowered, greater, indented, ref, vectors
from fusetile.codegen.elementwise import broadcast_element, broadcast_strides, translate, varying, with_lanes
from fusetile.codegen.job import Job
from fusetile.codegen.mapped import loops_over, mapped_call, mapped_kernel
from fusetile.ops.standardize import SUMS

SUMMED = ("images_in", "blocks_in", "rows_in", "columns_in")
AT = ("n + i", "k + j", "h + y", "w + x")
LOOPS = """
for i in T.serial(images_in):
    for j in T.serial(blocks_in):
        for y in T.serial(rows_in):
            for x in T.serial(columns_in):
"""


@dataclass(frozen=True, slots=True)
class _Reduction:
    """How elements are put together: the start, the type of the total, and both statements, on vectors and lanes; `o`
    numbers the outputs."""

    name: str
    dtype: str
    start: str
    add: str
    join: str


_SUM = _Reduction("sum_to", "float64", "T.float64(0)", "total{o}[v] + {0}", "total{o}[0] + total{o}[v]")
_MAX = _Reduction(
    "max_to",
    "float32",
    '-T.infinity("float32")',
    # pad lanes are zero, which is no element
    f"T.Select(T.And((k + j) * BLOCK + v < channels, {greater('{0}', 'total{o}[v]')}), {{0}}, total{{o}}[v])",
    f"T.Select({greater('total{o}[v]', 'total{o}[0]')}, total{{o}}[v], total{{o}}[0])",
)


def lower_sum_to(job: Job) -> Lowered:
    """Every output is one sum, in float64 and in the order of the elements."""
    factors = tuple(f"x{i}" for i in range(len(job.inputs)))
    return _reduce(_SUM, job, [factors])


def lower_sums(job: Job) -> Lowered:
    """Sums of products of expressions, whose factors are float32."""
    return _reduce(replace(_SUM, name=job.op.kind.lower()), job, SUMS[job.op.kind])


def lower_max_to(job: Job) -> Lowered:
    """Every output is one maximum."""
    return _reduce(_MAX, job, [("x0",)])


def _reduce(reduction: _Reduction, job: Job, results: Sequence[tuple[str, ...]]) -> Lowered:
    """`results`: per output, the factors of what is put together, in the inputs x0, x1, ..."""
    full, written = job.need(0), job.written()
    sizes, kept = extents(view4(full)), extents(view4(written))
    # with the channels the lanes are summed too: blocks of another map count them
    lanes = sizes[1] == kept[1]
    like = job.output if lanes else max((*job.inputs, *job.outputs), key=lambda buffer: buffer.block[1])
    block = like.block[1]
    before, operands = with_lanes(job.op, job.operands, like)
    counts = (sizes[0], -(-sizes[1] // block), sizes[2], sizes[3])
    summed = [count if size != other else 1 for count, size, other in zip(counts, sizes, kept, strict=True)]
    elements, name = {}, f"{reduction.name}_{'lanes' if lanes else 'one'}"
    ints: dict[str, int] = {}
    for i, operand in enumerate(operands):
        axes = varying(operand, full)
        ints |= broadcast_strides(f"F{i}", operand, full)
        elements[f"x{i}"] = broadcast_element(f"F{i}", AT, axes)
        name += f"_{axes or 'one'}"
    pixel = (
        vectors([f"total{o}[v] = {reduction.start}" for o in range(len(job.outputs))], block) + LOOPS.strip("\n") + "\n"
    )
    for o, factors in enumerate(results):
        values = [translate(factor, {})[1].format_map(elements) for factor in factors]
        product = " * ".join(f'T.Cast("{reduction.dtype}", {value})' for value in values)
        added = reduction.add.replace("BLOCK", str(block)).format(product, o=o)
        pixel += indented(vectors([f"total{o}[v] = {added}"], block), 4) + "\n"
    pointers = {f"F{i}": "float32" for i in range(len(operands))}
    maps: dict[str, str] = {}
    for o, output in enumerate(job.outputs):
        value = f'T.Cast("{output.dtype}", total{o}[{{}}])'
        if lanes:
            real = f'T.Select(k * {block} + v < channels, {value.format("v")}, T.Cast("{output.dtype}", 0))'
            pixel += vectors([f"{{Y{o}}} = {real}"], block)
            maps[f"Y{o}"] = output.dtype
            continue
        at = " + ".join(f"{index} * Y{o}_{axis}" for index, axis in zip("nhw", ("image", "row", "pixel"), strict=True))
        pixel += f"for v in T.serial(1, {block}):\n    total{o}[0] = {reduction.join.format(o=o)}\n"
        pixel += f'for v in T.serial(lanes):\n    Y{o}[{at} + v] = T.Cast("{output.dtype}", 0)\n'
        pixel += f"Y{o}[{at}] = {value.format(0)}\n"
        ints |= broadcast_strides(f"Y{o}", (output, written), written)
        del ints[f"Y{o}_block"]
        pointers[f"Y{o}"] = output.dtype
    if not lanes:
        ints["lanes"] = job.output.block[1]
    kernel = mapped_kernel(
        name,
        block=block,
        maps=maps,
        pointers=pointers,
        ints=[*SUMMED, "channels", *ints],
        scratch={f"total{o}": reduction.dtype for o in range(len(job.outputs))},
        pixel=pixel,
    )
    result = [(output, written) for output in job.outputs]
    call = mapped_call(
        kernel,
        loops_over(written, block, each=prod(summed)),
        result if lanes else [],
        pointers=[ref(buffer, need) for buffer, need in (*operands, *([] if lanes else result))],
        ints=(*summed, sizes[1], *ints.values()),
    )
    return Lowered((*before.calls, call), before.scratch)
