"""Nearest-neighbour upsampling by whole factors."""

from __future__ import annotations

from collections.abc import Sequence

from fusetile.box import Box
from fusetile.codegen.calls import Lowered, ref, vectors
from fusetile.codegen.mapped import loops_over, mapped_call, mapped_kernel
from fusetile.codegen.reblock import conform
from fusetile.codegen.targets import Target
from fusetile.graph import Op
from fusetile.ops import Domain
from fusetile.program import Buffer


def lower_upsample(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target
) -> Lowered:
    """y[h, w] = x[h // down, w // across], counted from the start of the image."""
    block, written = outputs[0].block[1], domain.output(box)
    before, [(x, part)] = conform(op, [(inputs[0], domain.need(box, 0))], outputs[0].block)
    at = (
        "n * X_image + k * X_block + ((h_origin + h) // down - h_first) * X_row"
        f" + ((w_origin + w) // across - w_first) * {block} + v"
    )
    kernel = mapped_kernel(
        "upsample",
        block=block,
        maps={"Y": "float32"},
        pointers={"X": "float32"},
        ints=("down", "across", "h_origin", "w_origin", "h_first", "w_first", "X_image", "X_block", "X_row"),
        pixel=vectors([f"{{Y}} = X[{at}]"], block),
    )
    origins = (written[2][0], written[3][0], part[2][0], part[3][0])
    ints = (*op.attrs["factors"], *origins, *x.strides[:3])
    call = mapped_call(kernel, loops_over(written, block), [(outputs[0], written)], pointers=[ref(x, part)], ints=ints)
    return Lowered((*before.calls, call), before.scratch)
