"""Sums and maxima of a map, or sums of the product of two, over the axes that another tensor lacks."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from fusetile.box import Box, extents, view4
from fusetile.codegen.calls import Lowered, ref, vectors
from fusetile.codegen.elementwise import broadcast_element, broadcast_strides, has_lanes, with_lanes
from fusetile.codegen.mapped import loops_over, mapped_call, mapped_kernel
from fusetile.codegen.targets import Target
from fusetile.graph import Op
from fusetile.ops import Domain
from fusetile.program import Buffer

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
    """How elements are put together: the start, the type of the total, and both statements, on vectors and lanes."""

    name: str
    dtype: str
    start: str
    add: str
    join: str


_SUM = _Reduction("sum_to", "float64", "T.float64(0)", "total[v] + {}", "total[0] + total[v]")
_MAX = _Reduction(
    "max_to",
    "float32",
    '-T.infinity("float32")',
    # pad lanes are zero, which is no element
    "T.Select((k + j) * BLOCK + v < channels, T.Select(total[v] < {0}, {0}, total[v]), total[v])",
    "T.max(total[0], total[v])",
)


def lower_sum_to(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target
) -> Lowered:
    """Every output is one sum, in float64 and in the order of the elements."""
    return _reduce(_SUM, op, domain, box, inputs, outputs[0])


def lower_max_to(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target
) -> Lowered:
    """Every output is one maximum."""
    return _reduce(_MAX, op, domain, box, inputs, outputs[0])


def _reduce(
    reduction: _Reduction, op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], output: Buffer
) -> Lowered:
    full, written = domain.need(box, 0), domain.output(box)
    sizes, kept = extents(view4(full)), extents(view4(written))
    # with the channels the lanes are summed too: blocks of another map count them
    lanes = sizes[1] == kept[1]
    like = output if lanes else _blocked(inputs, output)
    block = like.block[1]
    before, operands = with_lanes(op, [(buffer, domain.need(box, i)) for i, buffer in enumerate(inputs)], like)
    counts = (sizes[0], -(-sizes[1] // block), sizes[2], sizes[3])
    summed = [count if size != other else 1 for count, size, other in zip(counts, sizes, kept, strict=True)]
    factors, name = [], f"{reduction.name}_{'lanes' if lanes else 'one'}"
    ints: dict[str, int] = {}
    for i, operand in enumerate(operands):
        channels = has_lanes(operand, full)
        ints |= broadcast_strides(f"F{i}", operand, full)
        factors.append(f'T.Cast("{reduction.dtype}", {broadcast_element(f"F{i}", AT, lanes=channels)})')
        name += "_lanes" if channels else "_alone"
    added = reduction.add.replace("BLOCK", str(block)).format(" * ".join(factors))
    add = vectors([f"total[v] = {added}"], block)
    pixel = (
        vectors([f"total[v] = {reduction.start}"], block) + LOOPS.strip("\n") + "\n" + textwrap.indent(add, " " * 16)
    )
    result = (output, written)
    if lanes:
        kept_lanes = 'T.Select(k * BLOCK + v < channels, T.Cast("float32", total[v]), T.float32(0))'
        pixel += vectors([f"{{Y}} = {kept_lanes.replace('BLOCK', str(block))}"], block)
    else:
        at = " + ".join(f"{index} * Y_{axis}" for index, axis in zip("nhw", ("image", "row", "pixel"), strict=True))
        pixel += f"for v in T.serial(1, {block}):\n    total[0] = {reduction.join}\n"
        pixel += f"for v in T.serial(lanes):\n    Y[{at} + v] = T.float32(0)\n"
        pixel += f'Y[{at}] = T.Cast("float32", total[0])\n'
        ints |= broadcast_strides("Y", result, written) | {"lanes": output.block[1]}
        del ints["Y_block"]
    pointers = {f"F{i}": "float32" for i in range(len(operands))} | ({} if lanes else {"Y": "float32"})
    kernel = mapped_kernel(
        name,
        block=block,
        maps={"Y": "float32"} if lanes else {},
        pointers=pointers,
        ints=[*SUMMED, "channels", *ints],
        scratch={"total": reduction.dtype},
        pixel=pixel,
    )
    call = mapped_call(
        kernel,
        loops_over(written, block),
        [result] if lanes else [],
        pointers=[ref(buffer, need) for buffer, need in (*operands, *([] if lanes else [result]))],
        ints=(*summed, sizes[1], *ints.values()),
    )
    return Lowered((*before.calls, call), before.scratch)


def _blocked(inputs: Sequence[Buffer], output: Buffer) -> Buffer:
    """The operand whose channel block is largest."""
    return max((*inputs, output), key=lambda buffer: buffer.block[1])
