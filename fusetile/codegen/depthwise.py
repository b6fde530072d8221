"""Convolutions with one input and one output channel per group, and their gradients: vectors of channels.

The weights of a channel block lie together, [K/B][1][R][S][1][B], so that every tap is one vector. As for dense
convolutions, forward and input gradient are one kernel, and a gradient of stride s is s * s phases.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace

from fusetile.box import Box, extents, view4, volume
from fusetile.codegen.calls import Kernel, KernelCall, Lowered, Ref, make_kernel, ref, vectors
from fusetile.codegen.conv_views import NO_TAPS, Taps, View, filter_view, moved, padded_view, phases, taps_of, view
from fusetile.codegen.job import Job
from fusetile.codegen.mapped import loops_over
from fusetile.codegen.register_tile import ACTIVATIONS
from fusetile.codegen.targets import Target
from fusetile.program import Buffer

TILE = 4  # pixels at once, for which the weights are loaded once
UNROLLED = 49  # taps; larger windows are loops
FEW, MANY = 6, 16  # taps for which registers hold the weights of a channel block; registers
_X = ("x_image", "x_block", "x_row", "x_tap_h")
_W = ("w_block", "w_tap_h")
_Y = ("y_image", "y_block", "y_row")
_UNIT = """
bands: T.int32 = (rows + band - 1) // band
n: T.int32 = u // bands // blocks
k: T.int32 = u // bands % blocks
"""


@dataclass(frozen=True, slots=True)
class Steps:
    """Elements in a channel block and in what is computed at once, and from one pixel or tap of a row to the next. They
    are part of a kernel: as arguments, each of a row's addresses would be computed by itself."""

    block: int
    width: int
    x_pixel: int
    x_tap: int
    y_pixel: int
    w_tap: int = 0

    @property
    def tag(self) -> str:
        numbers = (self.x_pixel, self.x_tap, self.y_pixel, self.w_tap)
        steps = "_".join(f"m{-number}" if number < 0 else f"{number}" for number in numbers)
        return f"{steps}_b{self.block}v{self.width}"


def forward(job: Job) -> Lowered:
    """y = activation(bias + x * w)."""
    x, w, *bias = job.inputs
    weights, written = filter_view(w, job.need(1)), job.written()
    source, taps = View(ref(x), 0, 0, 0, 0), NO_TAPS
    if volume(job.need(0)):  # else there is nothing but padding
        source, taps = padded_view(job), taps_of(job.op.attrs, weights.window)
    strides = (weights.k, weights.tap_h, weights.tap_w)
    add = ref(bias[0], job.need(2)) if bias else None
    activation = (job.op.attrs.get("activation", ""), float(job.op.attrs.get("alpha", 0.0)))
    call = _convolve(
        source,
        (weights.start, strides),
        view(*job.result()),
        taps,
        written,
        job.output,
        add,
        activation,
        job.target,
    )
    return Lowered((call,))


def input_grad(job: Job) -> Lowered:
    """dx from dy and the weights, whose taps are gone through backwards."""
    dy, w = job.inputs
    need, written = job.need(0), job.written()
    weights, dx, calls = filter_view(w, job.need(1)), view(*job.result()), []
    for h in phases(job.op.attrs, 0, written[2], weights.window[0]):
        for v in phases(job.op.attrs, 1, written[3], weights.window[1]):
            source, taps, start = View(ref(dy), 0, 0, 0, 0), NO_TAPS, weights.start
            if h.taps and v.taps and volume(need):
                source = view(dy, (*need[:2], h.touched, v.touched))
                taps = Taps((h.taps, v.taps), (h.step, v.step))
                first = (weights.window[0] - 1 - h.flipped, weights.window[1] - 1 - v.flipped)
                start = moved(start, first[0] * weights.tap_h + first[1] * weights.tap_w)
            strides = (weights.k, -h.every * weights.tap_h, -v.every * weights.tap_w)
            result = dx.moved(h.first * dx.row + v.first * dx.pixel)
            result = replace(result, row=h.stride * dx.row, pixel=v.stride * dx.pixel)
            part = (*written[:2], (0, h.count), (0, v.count))
            calls.append(
                _convolve(source, (start, strides), result, taps, part, job.output, None, ("", 0.0), job.target)
            )
    return Lowered(tuple(calls))


def weight_grad(job: Job) -> Lowered:
    """dw from x and dy: a partial sum per band of rows, then their sums in order."""
    x, dy = job.inputs
    touched, block = job.need(1), dy.block[1]
    dw, right, loops = filter_view(*job.result()), view(dy, touched), loops_over(touched, block)
    taps, columns = taps_of(job.op.attrs, dw.window), loops.columns
    if volume(job.need(0)):
        left = padded_view(job)
    else:  # nothing but padding: no pixels, so zeros
        left, columns = View(ref(x), 0, 0, 0, 0), 0
    partial = Buffer(f"{job.op.name}.partial", ((0, loops.units * dw.taps * block),))
    ints = (loops.blocks, loops.rows, columns, loops.band, *_reads(left, taps))
    ints += (right.image, right.block, right.row)
    steps = _steps(job.target, block, left, taps, right)
    shared = steps.x_pixel == steps.x_tap  # loads, by pixels of a row, which then take registers besides the sums
    fits = not shared and dw.taps * (block // job.target.width + 1) < job.target.registers
    kernel = _gradient(dw.window, replace(steps, width=block if fits else min(block, job.target.width)))
    summed = KernelCall(kernel, loops.units, (left.start, right.start, ref(partial)), ints)
    numbers = (loops.images, loops.blocks, loops.bands, dw.taps, dw.k)
    finish = KernelCall(_finish(block), loops.blocks, (ref(partial), dw.start), numbers)
    return Lowered((summed, finish), (partial,))


def _reads(x: View, taps: Taps) -> tuple[int, ...]:
    """The strides _X of a window over x."""
    return (x.image, x.block, taps.stride[0] * x.row, taps.step[0] * x.row)


def _steps(target: Target, block: int, x: View, taps: Taps, y: View, w_tap: int = 0) -> Steps:
    """A row of a map is gone through once per vector of its channels if registers then hold what pixels share: all
    taps, and pixels if their windows overlap."""
    pixel, tap = taps.stride[1] * x.pixel, taps.step[1] * x.pixel
    many = taps.count[0] * taps.count[1] > FEW and (pixel == tap or target.registers > MANY)
    return Steps(block, min(block, target.width) if many else block, pixel, tap, y.pixel, w_tap)


def _convolve(
    x: View,
    w: tuple[Ref, tuple[int, int, int]],
    y: View,
    taps: Taps,
    written: Box,
    output: Buffer,
    bias: Ref | None,
    activation: tuple[str, float],
    target: Target,
) -> KernelCall:
    block = output.block[1]
    _, _, rows, columns = extents(view4(written))
    loops = loops_over(written, block)
    start, strides = w
    ints = (loops.blocks, rows, columns, loops.band, *_reads(x, taps), *strides[:2], y.image, y.block, y.row)
    steps = _steps(target, block, x, taps, y, strides[2])
    kernel = _convolution(taps.count, activation[0], steps, with_bias=bias is not None)
    pointers = (x.start, start, bias or start, y.start)
    return KernelCall(kernel, loops.units, pointers, ints, (activation[1],))


def _over_taps(window: tuple[int, int], statement: str) -> str:
    """Statements for all taps a, b: written out, or as loops."""
    if window[0] * window[1] > UNROLLED:
        loops = f"for a in T.serial({window[0]}):\n    for b in T.serial({window[1]}):\n"
        return loops + textwrap.indent(statement.format(a="a", b="b", tap=f"(a * {window[1]} + b)"), " " * 8)
    taps = [(a, b) for a in range(window[0]) for b in range(window[1])]
    return "".join(statement.format(a=a, b=b, tap=a * window[1] + b) for a, b in taps)


def _convolution(window: tuple[int, int], activation: str, steps: Steps, *, with_bias: bool) -> Kernel:
    block, width = steps.block, steps.width
    lane = f"part * {width} + v"

    def pixels(count: int, first: str) -> str:
        lanes = range(count)
        start = f"BIAS[k * {block} + {lane}]" if with_bias else "T.float32(0)"
        x = f"X[x0 + ({first} + {{p}}) * {steps.x_pixel} + {{{{a}}}} * x_tap_h + {{{{b}}}} * {steps.x_tap} + {lane}]"
        weight = f"W[k * w_block + {{a}} * w_tap_h + {{b}} * {steps.w_tap} + {lane}]"
        taps = vectors([f"s{p}[v] = s{p}[v] + {x.format(p=p)} * {weight}" for p in lanes], width)
        store = [
            f"Y[y0 + ({first} + {p}) * {steps.y_pixel} + {lane}] = {ACTIVATIONS[activation].format(f's{p}[v]')}"
            for p in lanes
        ]
        return vectors([f"s{p}[v] = {start}" for p in lanes], width) + _over_taps(window, taps) + vectors(store, width)

    body = f"""
for u in T.serial(lo, hi):
{textwrap.indent(_UNIT.strip(), " " * 4)}
    for r in T.serial(T.min(band, rows - u % bands * band)):
        h: T.int32 = u % bands * band + r
        x0: T.int32 = n * x_image + k * x_block + h * x_row
        y0: T.int32 = n * y_image + k * y_block + h * y_row
        for part in T.serial({block // width}):
            for q in T.serial(columns // {TILE}):
{textwrap.indent(pixels(TILE, f"q * {TILE}"), " " * 16)}
            for q in T.serial(columns % {TILE}):
{textwrap.indent(pixels(1, f"columns // {TILE} * {TILE} + q"), " " * 16)}
"""
    name = f"depthwise_{window[0]}x{window[1]}{'_bias' * with_bias}{'_' * bool(activation)}{activation}"
    return make_kernel(
        f"{name}_{steps.tag}",
        pointers=dict.fromkeys(("X", "W", "BIAS", "Y"), "float32"),
        ints=("blocks", "rows", "columns", "band", *_X, *_W, *_Y),
        floats=("alpha",),
        scratch={f"s{p}": ((width,), "float32") for p in range(TILE)},
        body=body,
    )


def _gradient(window: tuple[int, int], steps: Steps) -> Kernel:
    taps, block, width = window[0] * window[1], steps.block, steps.width
    lane = f"part * {width} + v"
    add = (
        f"sums[{{tap}} * {block} + {lane}] = sums[{{tap}} * {block} + {lane}]"
        f" + X[x0 + w * {steps.x_pixel} + {{a}} * x_tap_h + {{b}} * {steps.x_tap} + {lane}]"
        f" * DY[y0 + w * {steps.y_pixel} + {lane}]"
    )
    clear = f"for t in T.serial({taps}):\n" + textwrap.indent(
        vectors([f"sums[t * {block} + v] = T.float32(0)"], block), "    "
    )
    store = f"for t in T.serial({taps}):\n" + textwrap.indent(
        vectors([f"PARTIAL[(u * {taps} + t) * {block} + v] = sums[t * {block} + v]"], block), "    "
    )
    body = f"""
for u in T.serial(lo, hi):
{textwrap.indent(_UNIT.strip(), " " * 4)}
{textwrap.indent(clear, " " * 4)}
    for r in T.serial(T.min(band, rows - u % bands * band)):
        h: T.int32 = u % bands * band + r
        x0: T.int32 = n * x_image + k * x_block + h * x_row
        y0: T.int32 = n * y_image + k * y_block + h * y_row
        for part in T.serial({block // width}):
            for w in T.serial(columns):
{textwrap.indent(_over_taps(window, vectors([add], width)), " " * 16)}
{textwrap.indent(store, " " * 4)}
"""
    return make_kernel(
        f"depthwise_gradient_{window[0]}x{window[1]}_{steps.tag}",
        pointers=dict.fromkeys(("X", "DY", "PARTIAL"), "float32"),
        ints=("blocks", "rows", "columns", "band", *_X, *_Y),
        scratch={"sums": ((taps * block,), "float32")},
        body=body,
    )


def _finish(block: int) -> Kernel:
    add = vectors(
        [f's[v] = s[v] + T.Cast("float64", PARTIAL[(((n * blocks + k) * bands + i) * taps + t) * {block} + v])'], block
    )
    body = f"""
for k in T.serial(lo, hi):
    for t in T.serial(taps):
        for v in T.vectorized({block}):
            s[v] = T.float64(0)
        for n in T.serial(images):
            for i in T.serial(bands):
{textwrap.indent(add, " " * 16)}
        for v in T.vectorized({block}):
            DW[k * w_block + t * {block} + v] = T.Cast("float32", s[v])
"""
    return make_kernel(
        f"depthwise_finish_{block}",
        pointers={"PARTIAL": "float32", "DW": "float32"},
        ints=("images", "blocks", "bands", "taps", "w_block"),
        scratch={"s": ((block,), "float64")},
        body=body,
    )
