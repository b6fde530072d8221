"""Reshapes and transposes: every element comes from an index written in other digits.

Elements go one by one. Sizes of digits are constants in the kernel, so that divisions by them become multiplications.
"""

from __future__ import annotations

from collections.abc import Sequence

from fusetile.box import Box, extents, view4
from fusetile.codegen.calls import KernelCall, Lowered, make_kernel, ref
from fusetile.codegen.targets import Target
from fusetile.errors import PlanError
from fusetile.graph import Op
from fusetile.ops import Domain
from fusetile.ops.base import Digits
from fusetile.program import Buffer

_AXES = "nchw"
_INTS = (
    "channels",
    "height",
    "width",
    "padded",
    *(f"y_{axis}" for axis in _AXES),
    *(f"x_{axis}" for axis in _AXES),
    "Y_image",
    "Y_block",
    "Y_row",
    "Y_pixel",
    "X_image",
    "X_block",
    "X_row",
    "X_pixel",
)


def lower_rearrange(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target
) -> Lowered:
    """One work unit per image and channel of the output, the lanes that pad the last block included."""
    source, result, part, written = inputs[0], outputs[0], domain.need(box, 0), domain.output(box)
    if source.dtype != "float32" or result.dtype != "float32":
        raise PlanError(f"{source.name} of {source.dtype} can't be rearranged: only float32 can")
    # where the dimensions of a tensor of fewer lie among the four of its storage
    names = {axis.name: _AXES[_place(len(written), i)] for i, axis in enumerate(domain.axes)}
    index = dict.fromkeys(_AXES, "0")
    label = []
    for i, dim in enumerate(domain.reads[0]):
        assert isinstance(dim, Digits)
        terms = [
            f"({names[axis]} + y_{names[axis]}) // {inner} % {size} * {times}" for axis, inner, size, times in dim.terms
        ]
        index[_AXES[_place(len(part), i)]] = " + ".join(terms) or "0"
        label.append("_".join(f"{names[a]}{inner}x{size}x{times}" for a, inner, size, times in dim.terms) or "one")
    xl, yl = source.block[1], result.block[1]
    body = f"""
for u in T.serial(lo, hi):
    n: T.int32 = u // padded
    c: T.int32 = u % padded
    for h in T.serial(height):
        for w in T.serial(width):
            at: T.int32 = n * Y_image + c // {yl} * Y_block + h * Y_row + w * Y_pixel + c % {yl}
            if c < channels:
                from_c: T.int32 = {index["c"]} - x_c
                Y[at] = X[
                    ({index["n"]} - x_n) * X_image + from_c // {xl} * X_block + from_c % {xl}
                    + ({index["h"]} - x_h) * X_row + ({index["w"]} - x_w) * X_pixel
                ]
            else:
                Y[at] = T.float32(0)
"""
    kernel = make_kernel(
        f"rearrange_{xl}_{yl}_{'__'.join(label)}",
        pointers={"X": "float32", "Y": "float32"},
        ints=_INTS,
        body=body,
    )
    images, channels, height, width = extents(view4(written))
    padded = -(-channels // yl) * yl
    origins = [start for start, _ in (*view4(written), *view4(part))]
    # X points to the block in which the part begins: its first channel may lie within it
    first = view4(source.box)[1][0]
    origins[5] = first + (origins[5] - first) // xl * xl
    aligned = (part[0], (origins[5], part[1][1]), *part[2:]) if len(part) > 1 else ((origins[5], part[0][1]),)
    ints = (channels, height, width, padded, *origins, *result.strides, *source.strides)
    call = KernelCall(kernel, images * padded, (ref(source, aligned), ref(result, written)), ints)
    return Lowered((call,))


def _place(rank: int, dimension: int) -> int:
    """Which of the four dimensions of storage a dimension is: vectors lie along the channels."""
    return 1 if rank == 1 else dimension
