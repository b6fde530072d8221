"""Which algorithm computes a convolution: direct, Winograd F(2x2) or F(4x4). The one place that decides it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fusetile.box import Box, extents, view4, volume
from fusetile.codegen import conv, winograd
from fusetile.codegen.calls import Lowered
from fusetile.codegen.targets import Target
from fusetile.graph import Op
from fusetile.ops.base import Domain
from fusetile.program import Buffer

Numerics = Literal["fast", "strict"]

DIRECT = 0
TILES: dict[Numerics, tuple[int, ...]] = {"fast": (2, 4), "strict": (2,)}  # F(2x2) rounds less than direct kernels
MIN_CHANNELS = 32


@dataclass(frozen=True, slots=True)
class Overhead:
    """What transforms cost on a CPU, per product that they make or take, in multiply-adds: of a weight, an input and an
    output. `gain`: the part of the direct kernel's time that must be undercut. Measured on x86; estimated on ARM, where
    transforms meet small caches and one load per cycle."""

    filter: float
    input: float
    output: float
    gain: float


_OVERHEAD = {16: Overhead(16, 10, 20, 0.9), 8: Overhead(20, 14, 26, 0.9), 4: Overhead(20, 14, 26, 0.75)}


def tile(images: int, rows: int, columns: int, c: int, k: int, *, target: Target, numerics: Numerics = "fast") -> int:
    """The side of the output tiles for a 3x3 convolution of so many pixels and channels, or DIRECT. For the input
    gradient, `c` counts the channels of dy."""
    if min(c, k) < MIN_CHANNELS:
        return DIRECT
    cost = _OVERHEAD[target.width]
    best, best_cost = DIRECT, cost.gain * 9 * images * rows * columns * c * k
    for m in TILES[numerics]:
        tiles = images * -(-rows // m) * -(-columns // m)
        per_product = tiles * (c * k + cost.input * c + cost.output * k) + cost.filter * c * k
        if (m + 2) ** 2 * per_product < best_cost:
            best, best_cost = m, (m + 2) ** 2 * per_product
    return best


def lower_conv(
    op: Op,
    domain: Domain,
    box: Box,
    inputs: Sequence[Buffer],
    outputs: Sequence[Buffer],
    *,
    target: Target,
    numerics: Numerics = "fast",
) -> Lowered:
    """Conv and Gemm."""
    m = DIRECT
    if _is_winograd(op, domain, box, inputs, inputs[1]):
        images, k, rows, columns = extents(view4(domain.output(box)))
        c = extents(domain.need(box, 0))[1]
        m = tile(images, rows, columns, c, k, target=target, numerics=numerics)
    if m == DIRECT:
        return conv.lower_conv(op, domain, box, inputs, outputs, target=target)
    return winograd.lower_conv(op, domain, box, inputs, outputs, target=target, m=m)


def lower_conv_input_grad(
    op: Op,
    domain: Domain,
    box: Box,
    inputs: Sequence[Buffer],
    outputs: Sequence[Buffer],
    *,
    target: Target,
    numerics: Numerics = "fast",
) -> Lowered:
    """ConvInputGrad and GemmInputGrad."""
    m = DIRECT
    if _is_winograd(op, domain, box, inputs, inputs[1]):
        images, c, rows, columns = extents(view4(domain.output(box)))
        k = extents(domain.need(box, 0))[1]
        m = tile(images, rows, columns, k, c, target=target, numerics=numerics)
    if m == DIRECT:
        return conv.lower_conv_input_grad(op, domain, box, inputs, outputs, target=target)
    return winograd.lower_conv_input_grad(op, domain, box, inputs, outputs, target=target, m=m)


def lower_conv_weight_grad(
    op: Op,
    domain: Domain,
    box: Box,
    inputs: Sequence[Buffer],
    outputs: Sequence[Buffer],
    *,
    target: Target,
    numerics: Numerics = "fast",
) -> Lowered:
    """ConvWeightGrad and GemmWeightGrad."""
    m = DIRECT
    if _is_winograd(op, domain, box, inputs, outputs[0]):
        images, k, rows, columns = extents(view4(domain.need(box, 1)))
        c = extents(domain.output(box))[1]
        m = tile(images, rows, columns, c, k, target=target, numerics=numerics)
    if m == DIRECT:
        return conv.lower_conv_weight_grad(op, domain, box, inputs, outputs, target=target)
    return winograd.lower_conv_weight_grad(op, domain, box, inputs, outputs, target=target, m=m)


def _is_winograd(op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], weights: Buffer) -> bool:
    """Whether Winograd kernels can do these iterations: 3x3, stride and dilation 1, one group, whole blocks."""
    return (
        op.attrs.get("strides") == (1, 1)
        and op.attrs["dilations"] == (1, 1)
        and op.attrs.get("groups", 1) == 1
        and extents(weights.box)[2:] == (3, 3)
        and weights.block[0] == weights.block[1]
        and volume(box) > 0
        and all(volume(domain.need(box, i)) > 0 for i in range(len(inputs)))
    )
