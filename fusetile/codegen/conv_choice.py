"""Which algorithm computes a convolution: direct, Winograd F(2x2) or F(4x4). The one place that decides it.

Errors against float64, relative to the direct kernels' (whose L2 error is some 5e-7 of the values):

                                              F(2x2)          F(4x4)
    L2, forward and input gradient            at most 0.8     at most 2.2
    L2, weight gradient (few pixels: more)    at most 1.4     at most 3.5
    largest single error                      at most 1.2     at most 2.8

`--numerics strict` leaves out F(4x4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fusetile.box import Box, extents, view4, volume
from fusetile.codegen import conv, winograd
from fusetile.codegen.calls import Lowered
from fusetile.codegen.targets import Target
from fusetile.graph import Op
from fusetile.ops import row
from fusetile.ops.base import Domain
from fusetile.program import Buffer

Numerics = Literal["fast", "strict"]

DIRECT = 0
TILES: dict[Numerics, tuple[int, ...]] = {"fast": (2, 4), "strict": (2,)}  # sides of output tiles
MIN_CHANNELS = 32

_DIRECT = {
    "conv": conv.lower_conv,
    "conv_input_grad": conv.lower_conv_input_grad,
    "conv_weight_grad": conv.lower_conv_weight_grad,
}
_WINOGRAD = {
    "conv": winograd.lower_conv,
    "conv_input_grad": winograd.lower_conv_input_grad,
    "conv_weight_grad": winograd.lower_conv_weight_grad,
}


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


def lower_convolution(
    op: Op,
    domain: Domain,
    box: Box,
    inputs: Sequence[Buffer],
    outputs: Sequence[Buffer],
    *,
    target: Target,
    numerics: Numerics,
) -> Lowered:
    """Conv and Gemm and their gradients."""
    family = row(op.kind).kernel
    m = DIRECT
    if _is_winograd(op, domain, box, inputs, outputs[0] if family == "conv_weight_grad" else inputs[1]):
        m = tile(*_sizes(family, domain, box), target=target, numerics=numerics)
    if m == DIRECT:
        return _DIRECT[family](op, domain, box, inputs, outputs, target=target)
    return _WINOGRAD[family](op, domain, box, inputs, outputs, target=target, m=m)


def tile(images: int, rows: int, columns: int, c: int, k: int, *, target: Target, numerics: Numerics) -> int:
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


def _sizes(family: str, domain: Domain, box: Box) -> tuple[int, int, int, int, int]:
    """Images, rows, columns, input and output channels of the convolution that is computed."""
    gradient = family == "conv_weight_grad"
    filter_box, maps = domain.need(box, 1), domain.output(box)
    if gradient:
        filter_box, maps = maps, filter_box
    k, c = extents(filter_box)[:2]
    images, _, rows, columns = extents(view4(maps))
    return (images, rows, columns, k, c) if family == "conv_input_grad" else (images, rows, columns, c, k)


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
