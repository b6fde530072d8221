"""Which algorithm computes a convolution: direct, Winograd F(2x2) or F(4x4). The one place that decides it.

Errors against float64, relative to the direct kernels' (whose L2 error is some 5e-7 of the values):

                                              F(2x2)          F(4x4)
    L2, forward and input gradient            at most 0.8     at most 2.2
    L2, weight gradient (few pixels: more)    at most 1.4     at most 3.5
    largest single error                      at most 1.2     at most 2.8

`--numerics strict` leaves out F(4x4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusetile.box import extents, view4, volume
from fusetile.codegen import conv, winograd
from fusetile.codegen.calls import Lowered
from fusetile.codegen.job import Job, Numerics
from fusetile.codegen.targets import Target
from fusetile.ops import row
from fusetile.program import Buffer

DIRECT = 0
TILES: dict[Numerics, tuple[int, ...]] = {"fast": (2, 4), "strict": (2,)}  # sides of output tiles

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
class Cost:
    """What convolutions of one family cost on a CPU, in multiply-adds of the direct kernels.

    `multiply[m]`: a multiply-add of transformed operands; `far`: what it costs more if an operand that is transformed
    as a whole leaves the caches. `filter`, `input`, `output`: a transform, per product that it makes or takes.
    `weight`: what else the direct kernels spend per weight (those of the input gradient turn it). `near`: how much less
    both are if the weights stay in the caches of a core, of `cache_bytes`. `gain`: the part of the direct kernels' time
    that must be undercut. `channels`: the fewest for which Winograd is considered.
    """

    multiply: Mapping[int, float]
    filter: float
    input: float
    output: float
    weight: float = 0.0
    near: float = 1.0
    far: float = 0.0
    cache_bytes: int = 1 << 20
    gain: float = 0.9
    channels: int = 32


def _arm(cache_bytes: int, *costs: tuple[float, ...]) -> dict[str, Cost]:
    """By family: multiply[2] and [4], filter, input, output, weight, near, far."""
    made = {}
    for family, (two, four, filter, input, output, weight, near, far) in zip(_DIRECT, costs, strict=True):
        made[family] = Cost({2: two, 4: four}, filter, input, output, weight, near, far, cache_bytes, gain=1.0)
    return made


_EVEN = {2: 1.0, 4: 1.0}
_PI4 = _arm(
    1 << 20,
    (1.58, 1.57, 10, 19, 0, 80, 1, 0.56),
    (1.21, 1.25, 13, 10, 30, 370, 0.9, 1.17),
    (1.88, 1.94, 8, 22, 5, 175, 0.9, 0.61),
)
# By target. avx2: fitted to the times of 40 sizes of layers, 2x2 to 208x208, on AMD Zen 3; avx512: measured on an Intel
# Xeon. ARM: fitted to benchmarks/emulated/counts.tsv, what kernels execute and fetch under an emulator, at the prices
# in choices.py beside it; `python -m benchmarks.choices` shows how well.
_COSTS: dict[str, dict[str, Cost]] = {
    "avx512": dict.fromkeys(_DIRECT, Cost(_EVEN, filter=16, input=10, output=20)),
    "avx2": {
        "conv": Cost({2: 1.08, 4: 1.24}, filter=13, input=11, output=3, weight=45, near=0.5, channels=16),
        "conv_input_grad": Cost({2: 1.11, 4: 1.28}, filter=9, input=3, output=9, weight=270, near=0.8, channels=16),
        "conv_weight_grad": Cost({2: 1.32, 4: 1.67}, filter=8, input=10, output=0, weight=65, near=0.4, channels=16),
    },
    "pi3": _arm(
        1 << 19,
        (1.9, 2.12, 6, 8, 0, 55, 1, 0.13),
        (1.55, 1.92, 6, 12, 10, 100, 1, 0.41),
        (1.86, 2.01, 6, 27, 1, 145, 0.8, 0.41),
    ),
    "pi4": _PI4,
    "arm64": _PI4,
    "pi5": _arm(
        1 << 20,
        (1.67, 1.83, 11, 18, 0, 135, 1, 0.88),
        (1.73, 2.03, 7, 0, 16, 175, 1, 0.53),
        (2.15, 1.93, 8, 24, 30, 340, 0.7, 0.76),
    ),
    "armv7": _arm(
        1 << 19,
        (1.65, 1.87, 5, 3, 0, 15, 1, 0.02),
        (1.55, 1.65, 8, 4, 3, 115, 1, 0.13),
        (1.49, 1.53, 7, 22, 6, 65, 0.7, 0.32),
    ),
}


def lower_convolution(job: Job) -> Lowered:
    """Conv and Gemm and their gradients."""
    family = row(job.op.kind).kernel
    m = DIRECT
    if _is_winograd(job, job.output if family == "conv_weight_grad" else job.inputs[1]):
        m = tile(family, *_sizes(family, job), target=job.target, numerics=job.numerics)
    if m == DIRECT:
        return _DIRECT[family](job)
    return _WINOGRAD[family](job, m=m)


def tile(
    family: str, images: int, rows: int, columns: int, c: int, k: int, *, target: Target, numerics: Numerics
) -> int:
    """The side of the output tiles for a 3x3 convolution, or gradient, of so many pixels and channels, or DIRECT. For
    the input gradient, `c` counts the channels of dy."""
    cost = _COSTS[target.name][family]
    if min(c, k) < cost.channels:
        return DIRECT
    scale = cost.near if 4 * 9 * c * k <= cost.cache_bytes else 1.0
    best, best_cost = DIRECT, cost.gain * (9 * images * rows * columns + scale * cost.weight) * c * k
    for m in TILES[numerics]:
        tiles, area = images * -(-rows // m) * -(-columns // m), (m + 2) ** 2
        leaves = 4 * area * _transformed(family, tiles, c, k) > cost.cache_bytes
        products = (cost.multiply[m] + leaves * cost.far) * c * k + cost.input * c + cost.output * k
        total = area * (tiles * products + scale * cost.filter * c * k)
        if total < best_cost:
            best, best_cost = m, total
    return best


def _transformed(family: str, tiles: int, c: int, k: int) -> int:
    """Floats per product of what `winograd` transforms as a whole: weights or input, which many tiles or channels read
    again; of a weight gradient the larger operand."""
    if family == "conv_weight_grad":
        return tiles * max(c, k)
    return c * (tiles if 2 * tiles <= k else k)


def _sizes(family: str, job: Job) -> tuple[int, int, int, int, int]:
    """Images, rows, columns, input and output channels of the convolution that is computed."""
    gradient = family == "conv_weight_grad"
    filter_box, maps = job.need(1), job.written()
    if gradient:
        filter_box, maps = maps, filter_box
    k, c = extents(filter_box)[:2]
    images, _, rows, columns = extents(view4(maps))
    return (images, rows, columns, k, c) if family == "conv_input_grad" else (images, rows, columns, c, k)


def _is_winograd(job: Job, weights: Buffer) -> bool:
    """Whether Winograd kernels can do these iterations: 3x3, stride and dilation 1, one group, whole blocks."""
    return (
        job.op.attrs.get("strides") == (1, 1)
        and job.op.attrs["dilations"] == (1, 1)
        and job.op.attrs.get("groups", 1) == 1
        and extents(weights.box)[2:] == (3, 3)
        and weights.block[0] == weights.block[1]
        and volume(job.box) > 0
        and all(volume(job.need(i)) > 0 for i in range(len(job.inputs)))
    )
