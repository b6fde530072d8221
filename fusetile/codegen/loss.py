"""Losses: partial sums per row in float64, added in order by a second call; and the gradient of cross-entropy.

The class index is data: training checks it against the number of classes before it reaches a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

from fusetile.box import Box, extents, view4
from fusetile.codegen.calls import KernelCall, Lowered, Ref, indented, make_kernel, ref, vectors
from fusetile.codegen.reblock import conform
from fusetile.codegen.strided import LANES, nest_of, strided_call, strided_kernel
from fusetile.codegen.targets import Target
from fusetile.graph import Op
from fusetile.ops import Domain
from fusetile.program import Buffer

_STRIDES = ("x_image", "x_block", "x_row", "x_pixel", "t_image", "t_row", "t_pixel")


def _logit(block: int, channel: str) -> str:
    """The logit of a channel at a pixel."""
    return f"X[at + {channel} // {block} * x_block + {channel} % {block}]"


def _over_pixels(block: int, statements: str) -> str:
    """Loops over pixels; statements know the greatest logit, top[0], and the label. A work unit u is a row."""
    return f"""
for u in T.serial(lo, hi):
    n: T.int32 = u // rows
    h: T.int32 = u % rows
    for w in T.serial(columns):
        at: T.int32 = n * x_image + h * x_row + w * x_pixel
        label: T.int32 = TARGET[n * t_image + h * t_row + w * t_pixel]
        top[0] = X[at]
        for c in T.serial(channels):
            top[0] = T.max(top[0], {_logit(block, "c")})
        total[0] = T.float64(0)
{indented(statements, 2)}
"""


def lower_cross_entropy(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target
) -> Lowered:
    """The sum of log(sum of exp(x - max)) - (x[label] - max) over the box's pixels, over `count`."""
    block = inputs[0].block[1]
    body = _over_pixels(
        block,
        f"""
for c in T.serial(channels):
    total[0] = total[0] + T.Cast("float64", T.exp({_logit(block, "c")} - top[0]))
loss[0] = T.log(total[0]) - T.Cast("float64", {_logit(block, "label")} - top[0])
PARTIAL[u] = T.if_then_else(w == 0, loss[0], PARTIAL[u] + loss[0])
""",
    )
    kernel = make_kernel(
        f"cross_entropy_{block}",
        pointers={"X": "float32", "TARGET": "int32", "PARTIAL": "float64"},
        ints=("channels", "rows", "columns", *_STRIDES),
        scratch={"top": ((1,), "float32"), "total": ((1,), "float64"), "loss": ((1,), "float64")},
        body=body,
    )
    images, channels, rows, columns = extents(view4(domain.need(box, 0)))
    units = images * rows
    partial = Buffer(f"{op.name}.partial", ((0, units),), "float64")
    pointers = (*_logits(domain, box, inputs), ref(partial))
    call = KernelCall(kernel, units, pointers, (channels, rows, columns, *_strides(inputs)))
    return Lowered((call, _mean(ref(partial), units, op.attrs["count"], outputs[0], domain.output(box))), (partial,))


def lower_cross_entropy_grad(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target
) -> Lowered:
    """dx = (softmax(x) - [class is the label]) / count; the exponentials wait in dx for their sum."""
    block, lanes = inputs[0].block[1], outputs[0].block[1]
    y = f"DX[to + c // {lanes} * y_block + c % {lanes}]"
    body = _over_pixels(
        block,
        f"""
to: T.int32 = n * y_image + h * y_row + w * y_pixel
for c in T.serial(channels):
    {y} = T.exp({_logit(block, "c")} - top[0])
    total[0] = total[0] + T.Cast("float64", {y})
for c in T.serial(padded):
    if c < channels:
        share: T.float32 = {y} / T.Cast("float32", total[0])
        {y} = (share - T.Select(c == label, T.float32(1), T.float32(0))) / T.Cast("float32", count)
    else:
        {y} = T.float32(0)
""",
    )
    kernel = make_kernel(
        f"cross_entropy_grad_{block}_{lanes}",
        pointers={"X": "float32", "TARGET": "int32", "DX": "float32"},
        ints=(
            *("channels", "rows", "columns", *_STRIDES, "y_image", "y_block", "y_row", "y_pixel"),
            *("padded", "count"),
        ),
        scratch={"top": ((1,), "float32"), "total": ((1,), "float64")},
        body=body,
    )
    output, written = outputs[0], domain.output(box)
    images, channels, rows, columns = extents(view4(written))
    padded = -(-channels // lanes) * lanes
    ints = (channels, rows, columns, *_strides(inputs), *output.strides, padded, op.attrs["count"])
    pointers = (*_logits(domain, box, inputs), ref(output, written))
    return Lowered((KernelCall(kernel, images * rows, pointers, ints),))


def lower_mean_squared_error(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target
) -> Lowered:
    """The sum of (y - target)^2 over the box, over `count`; pad lanes are zero in both and add nothing."""
    block = max((buffer.block for buffer in inputs[:2]), key=lambda lanes: lanes[1])
    before, operands = conform(op, [(inputs[i], domain.need(box, i)) for i in range(2)], block)
    kernel = strided_kernel(
        "squared_error",
        operands={"X": "float32", "Y": "float32"},
        constants={"PARTIAL": "float64"},
        statements=[
            'error[v] = T.Cast("float64", {X}) - T.Cast("float64", {Y})',
            "total[v] = total[v] + error[v] * error[v]",
        ],
        scratch={"error": "float64", "total": "float64"},
        before_unit=vectors(["total[v] = T.float64(0)"], LANES),
        after_unit=vectors([f"PARTIAL[u * {LANES} + v] = total[v]"], LANES),
    )
    size = nest_of(operands).units * LANES
    partial = Buffer(f"{op.name}.partial", ((0, size),), "float64")
    call = strided_call(kernel, operands, constants=[ref(partial)])
    mean = _mean(ref(partial), size, op.attrs["count"], outputs[0], domain.output(box))
    return Lowered((*before.calls, call, mean), (*before.scratch, partial))


def _mean(partial: Ref, size: int, count: int, output: Buffer, box: Box) -> KernelCall:
    """output[0] = (sum of the partial sums, in order) / count."""
    body = """
for u in T.serial(lo, hi):
    total[0] = T.float64(0)
    for i in T.serial(size):
        total[0] = total[0] + PARTIAL[i]
    for i in T.serial(lanes):
        Y[i] = T.float32(0)
    Y[0] = T.Cast("float32", total[0] / T.Cast("float64", count))
"""
    kernel = make_kernel(
        "mean_of_partials",
        pointers={"PARTIAL": "float64", "Y": "float32"},
        ints=("size", "count", "lanes"),
        scratch={"total": ((1,), "float64")},
        body=body,
    )
    return KernelCall(kernel, 1, (partial, ref(output, box)), (size, count, output.block[1]))


def _logits(domain: Domain, box: Box, inputs: Sequence[Buffer]) -> tuple[Ref, Ref]:
    return ref(inputs[0], domain.need(box, 0)), ref(inputs[1], domain.need(box, 1))


def _strides(inputs: Sequence[Buffer]) -> tuple[int, ...]:
    """Values of _STRIDES; targets [N] lie along the second storage dimension, [N, H, W] along the first three."""
    logits, labels = inputs[:2]
    s0, s1, s2, _ = labels.strides
    image, row, pixel = (s1, 0, 0) if len(labels.box) == 1 else (s0, s1, s2)
    return (*logits.strides, image, row, pixel)
