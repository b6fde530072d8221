"""Sums of a map, or of the product of two, over the axes that another tensor lacks: the gradient of broadcasting."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from fusetile.box import Box, extents, view4
from fusetile.codegen.calls import Lowered, ref, vectors
from fusetile.codegen.elementwise import broadcast_element, broadcast_strides, has_lanes, with_lanes
from fusetile.codegen.mapped import loops_over, mapped_call, mapped_kernel
from fusetile.codegen.targets import Target
from fusetile.graph import Op
from fusetile.ops import Domain
from fusetile.program import Buffer

_SUMMED = ("images_in", "blocks_in", "rows_in", "columns_in")
_AT = ("n + i", "k + j", "h + y", "w + x")
_LOOPS = """
for i in T.serial(images_in):
    for j in T.serial(blocks_in):
        for y in T.serial(rows_in):
            for x in T.serial(columns_in):
"""


def lower_sum_to(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target
) -> Lowered:
    """Every output is one sum, in float64 and in the order of the elements."""
    full, written = domain.need(box, 0), domain.output(box)
    sizes, kept = extents(view4(full)), extents(view4(written))
    # with the channels the lanes are summed too: blocks of another map count them
    lanes = sizes[1] == kept[1]
    like = outputs[0] if lanes else _blocked(inputs, outputs[0])
    block = like.block[1]
    before, operands = with_lanes(op, [(buffer, domain.need(box, i)) for i, buffer in enumerate(inputs)], like)
    counts = (sizes[0], -(-sizes[1] // block), sizes[2], sizes[3])
    summed = [count if size != other else 1 for count, size, other in zip(counts, sizes, kept, strict=True)]
    factors, name = [], f"sum_to_{'lanes' if lanes else 'one'}"
    ints: dict[str, int] = {}
    for i, operand in enumerate(operands):
        channels = has_lanes(operand, full)
        ints |= broadcast_strides(f"F{i}", operand, full)
        factors.append(f'T.Cast("float64", {broadcast_element(f"F{i}", _AT, lanes=channels)})')
        name += "_lanes" if channels else "_alone"
    add = vectors([f"total[v] = total[v] + {' * '.join(factors)}"], block)
    pixel = vectors(["total[v] = T.float64(0)"], block) + _LOOPS.strip("\n") + "\n" + textwrap.indent(add, " " * 16)
    result = (outputs[0], written)
    if lanes:
        pixel += vectors(['{Y} = T.Cast("float32", total[v])'], block)
    else:
        at = " + ".join(f"{index} * Y_{axis}" for index, axis in zip("nhw", ("image", "row", "pixel"), strict=True))
        pixel += f"for v in T.serial(1, {block}):\n    total[0] = total[0] + total[v]\n"
        pixel += f"for v in T.serial(lanes):\n    Y[{at} + v] = T.float32(0)\n"
        pixel += f'Y[{at}] = T.Cast("float32", total[0])\n'
        ints |= broadcast_strides("Y", result, written) | {"lanes": outputs[0].block[1]}
        del ints["Y_block"]
    pointers = {f"F{i}": "float32" for i in range(len(operands))} | ({} if lanes else {"Y": "float32"})
    kernel = mapped_kernel(
        name,
        block=block,
        maps={"Y": "float32"} if lanes else {},
        pointers=pointers,
        ints=[*_SUMMED, *ints],
        scratch={"total": "float64"},
        pixel=pixel,
    )
    call = mapped_call(
        kernel,
        loops_over(written, block),
        [result] if lanes else [],
        pointers=[ref(buffer, need) for buffer, need in (*operands, *([] if lanes else [result]))],
        ints=(*summed, *ints.values()),
    )
    return Lowered((*before.calls, call), before.scratch)


def _blocked(inputs: Sequence[Buffer], output: Buffer) -> Buffer:
    """The operand whose channel block is largest."""
    return max((*inputs, output), key=lambda buffer: buffer.block[1])
