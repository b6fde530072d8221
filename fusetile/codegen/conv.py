"""Lowering of convolutions, fully connected layers and their gradients to kernel calls.

Forward and input gradient are one kernel, the tap convolution. The input gradient for stride s is s * s phases: input
pixels of one phase (position + pad modulo s) meet the same taps, so a phase is a convolution of stride 1 that writes
every s-th pixel; a phase that no tap meets is zero. Each `lower_*` chooses the algorithm for its phase.

Every call computes the box of iterations that it is given, and nothing outside: a part of the reduction axis gives a
partial sum, to which the part at input channel 0 adds the bias. Zero padding is the border of the buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fusetile.box import Box, extents, view4, volume
from fusetile.codegen.calls import KernelCall, Lowered, Ref, named_call, ref, scratch_buffer
from fusetile.codegen.conv_calls import Epilogue, Sizes, gradient_calls, tap_calls
from fusetile.codegen.conv_tiles import (
    LONGEST_ROW,
    Machine,
    best_rows,
    machine,
    row_counts,
)
from fusetile.codegen.conv_views import (
    ALONE,
    NO_TAPS,
    Filter,
    FLOAT_bytes,
    Phase,
    Phases,
    Taps,
    View,
    blocks,
    filter_view,
    moved,
    padded_view,
    phases,
    taps_of,
    view,
)
from fusetile.codegen.filter_source import TRANSPOSE_INTS, transpose_filter
from fusetile.codegen.gemm import gathered, input_gradient_calls
from fusetile.codegen.job import Job
from fusetile.codegen.update import Updating
from fusetile.graph import Op
from fusetile.program import Buffer


def lower_conv(job: Job) -> Lowered:
    """Conv and Gemm: y = activation(bias + x * w)."""
    if volume(job.box) == 0:
        return Lowered()
    x, w, *bias = job.inputs
    m, weights = machine(job.target, w.block[0]), filter_view(w, job.need(1))
    written, channels = job.written(), job.reach(0)[1]
    images, _, rows, columns = extents(view4(written))
    sizes = Sizes(images, rows, columns, blocks(written[1], w.block[0]), blocks(channels, w.block[1]))
    source, taps = _nothing(x), NO_TAPS
    if volume(job.need(0)):  # else there is nothing but padding
        source, taps = padded_view(job), taps_of(job.op.attrs, weights.window)
    epilogue = Epilogue(None, job.op.attrs.get("activation", ""), float(job.op.attrs.get("alpha", 0.0)))
    if bias and channels[0] == 0:
        epilogue = replace(epilogue, bias=ref(bias[0], job.need(2)))
    y = view(job.output, written)
    return _convolve_maps(job.op, m, source, weights, y, taps, sizes, epilogue)


def lower_conv_input_grad(job: Job) -> Lowered:
    """ConvInputGrad and GemmInputGrad: dx from dy and the weights."""
    if volume(job.box) == 0:
        return Lowered()
    dy, w = job.inputs
    m, written = machine(job.target, w.block[0]), job.written()
    need, filter_box = job.need(0), job.need(1)
    k_blocks, c_blocks = blocks(filter_box[0], w.block[0]), blocks(filter_box[1], w.block[1])
    weights, size = filter_view(w, filter_box), k_blocks * c_blocks * m.vectors.block**2
    if len(written) == 2 and weights.lines == m.vectors.block:
        return _gemm_input_grad(
            job.op, m, view(dy, need), weights, view(job.output, written), written, k_blocks, c_blocks
        )
    scratch = scratch_buffer(f"{job.op.name}.transposed", size * weights.taps)
    lowered, done = Lowered((), (scratch,)), 0
    dx, (images, _, rows, columns) = view(job.output, written), view4(written)
    across = list(phases(job.op.attrs, 1, columns, weights.window[1]))
    parts = []
    for h in phases(job.op.attrs, 0, rows, weights.window[0]):
        for v in across:
            source, taps, turned = _nothing(dy), NO_TAPS, moved(ref(scratch), size * done)
            if h.taps and v.taps and volume(need):
                source = view(dy, (*need[:2], h.touched, v.touched))
                taps = Taps((h.taps, v.taps), (h.step, v.step))
                lowered = _join(lowered, Lowered((_transpose(m, weights, turned, k_blocks, c_blocks, h, v),)))
            phase_weights = _filter(m, turned, k_blocks, taps.count)
            done += h.taps * v.taps
            result = dx.moved(h.first * dx.row + v.first * dx.pixel)
            result = replace(result, row=h.stride * dx.row, pixel=v.stride * dx.pixel)
            sizes = Sizes(images[1] - images[0], h.count, v.count, c_blocks, k_blocks)
            parts.append(_Phase(source, phase_weights, result, taps, sizes))
    together = _together(parts, len(across), dx)
    for i, part in enumerate(parts[:1] if together.count > 1 else parts):
        convolved = _convolve_maps(
            job.op, m, part.x, part.w, part.y, part.taps, part.sizes, Epilogue(), label=f".{i}", phases=together
        )
        lowered = _join(lowered, convolved)
    return replace(lowered, prepared=scratch.name) if [part.taps == NO_TAPS for part in parts] == [False] else lowered


@dataclass(frozen=True, slots=True)
class _Phase:
    """The convolution of one phase of an input gradient."""

    x: View
    w: Filter
    y: View
    taps: Taps
    sizes: Sizes


def _together(parts: Sequence[_Phase], across: int, dx: View) -> Phases:
    """All phases at once if they read the same pixels: a window as large as its stride, as in U-Nets. dy is then read
    once, and neighbouring pixels of dx are written one after another."""
    first = parts[0]
    step = parts[1].w.start.offset_bytes - first.w.start.offset_bytes if len(parts) > 1 else 0
    for i, part in enumerate(parts):
        w = replace(part.w, start=Ref(part.w.start.buffer, part.w.start.offset_bytes - i * step))
        if replace(part, w=w, y=first.y) != first:
            return ALONE
    return Phases(len(parts), across, step // FLOAT_bytes, dx.row, dx.pixel)


def lower_conv_weight_grad(job: Job, *, updating: Updating | None = None) -> Lowered:
    """ConvWeightGrad and GemmWeightGrad: dw from x and dy. With `updating`, of a GemmWeightGrad, the output is not dw
    but the weights."""
    if volume(job.box) == 0:
        return Lowered()
    x, dy = job.inputs
    written, touched = job.written(), job.need(1)
    m, dw = machine(job.target, job.output.block[0]), filter_view(job.output, written)
    images, _, rows, columns = extents(view4(touched))
    right, taps = view(dy, touched), taps_of(job.op.attrs, dw.window)
    if volume(job.need(0)):
        left = padded_view(job)
    else:  # nothing but padding: no pixels, so zeros
        left, columns = _nothing(x), 0
    step = (taps.step[0] * left.row, taps.step[1] * left.pixel)
    k_blocks, c_blocks = blocks(written[0], job.output.block[0]), blocks(written[1], job.output.block[1])
    if (rows, columns, *taps.count) == (1, 1, 1, 1):  # the images are the pixels
        before, left = gathered(f"{job.op.name}.x", left, images=images, blocks=c_blocks)
        more, right = gathered(f"{job.op.name}.dy", right, images=images, blocks=k_blocks)
        sizes = Sizes(1, 1, images, k_blocks, c_blocks)
        return _join(_join(before, more), gradient_calls(job.op.name, m, left, right, dw, step, sizes, updating))
    left = replace(left, row=taps.stride[0] * left.row, pixel=taps.stride[1] * left.pixel)
    if (rows, columns) == (1, 1):
        left, right, images, columns = replace(left, pixel=left.image), replace(right, pixel=right.image), 1, images
    elif taps.count == (1, 1) and (left.row, right.row) == (columns * left.pixel, columns * right.pixel):
        merged = max(n for n in row_counts(rows) if n == 1 or n * columns <= LONGEST_ROW)
        left, right = replace(left, row=merged * left.row), replace(right, row=merged * right.row)
        rows, columns = rows // merged, columns * merged
    sizes = Sizes(images, rows, columns, k_blocks, c_blocks)
    return gradient_calls(job.op.name, m, left, right, dw, step, sizes, updating)


# -- what the phases share ------------------------------------------------------------------------------------------


def _transpose(m: Machine, w: Filter, t: Ref, k_blocks: int, c_blocks: int, down: Phase, across: Phase) -> KernelCall:
    """The call that makes the weights of a phase of the input gradient: channels swapped, window turned around."""
    first_h, first_w = w.window[0] - 1 - down.flipped, w.window[1] - 1 - across.flipped
    ints = {"k_blocks": k_blocks, "taps_h": down.taps, "taps_w": across.taps, "w_k": w.k, "w_block": w.block}
    ints |= {"w_tap_h": -down.every * w.tap_h, "w_tap_w": -across.every * w.tap_w}
    kernel = transpose_filter(vectors=m.vectors, lines=w.lines, window=(down.taps, across.taps) != (1, 1))
    start = moved(w.start, first_h * w.tap_h + first_w * w.tap_w)
    return named_call(kernel, c_blocks, (start, t), TRANSPOSE_INTS, ints)


def _filter(m: Machine, start: Ref, blocks: int, window: tuple[int, int]) -> Filter:
    """Weights from so many whole blocks of input channels, one tap after another."""
    tap = m.vectors.block**2
    block = window[0] * window[1] * tap
    return Filter(start, blocks * block, block, window[1] * tap, tap, m.vectors.block, window)


def _convolve_maps(
    op: Op,
    m: Machine,
    x: View,
    w: Filter,
    y: View,
    taps: Taps,
    sizes: Sizes,
    epilogue: Epilogue,
    *,
    label: str = "",
    phases: Phases = ALONE,
) -> Lowered:
    """A tap convolution; of one-pixel maps, the images become a row of pixels, for which x is gathered into scratch."""
    images = sizes.images
    if images == 1 or (sizes.rows, sizes.columns) != (1, 1) or taps.count != (1, 1):
        return Lowered(tap_calls(m, *_rows_in_line(m, x, w, y, taps, sizes), epilogue, phases))
    before, x = gathered(f"{op.name}.rows{label}", x, images=images, blocks=sizes.c_blocks)
    y, sizes = replace(y, image=0, pixel=y.image), replace(sizes, images=1, columns=images)
    return _join(before, Lowered(tap_calls(m, x, w, y, Taps((1, 1)), sizes, epilogue, phases)))


def _rows_in_line(
    m: Machine, x: View, w: Filter, y: View, taps: Taps, sizes: Sizes
) -> tuple[View, Filter, View, Taps, Sizes]:
    """With one tap, rows without a border are one long row: as many of them as suit the register tiles best."""
    down, across = taps.stride[0] * x.row, taps.stride[1] * x.pixel
    if taps.count != (1, 1) or (down, y.row) != (sizes.columns * across, sizes.columns * y.pixel):
        return x, w, y, taps, sizes
    steps = sizes.c_blocks * w.lines
    merged = best_rows(m, row_counts(sizes.rows), sizes.columns, sizes.k_blocks, steps=steps)
    x, y = replace(x, row=merged * x.row), replace(y, row=merged * y.row)
    return x, w, y, taps, replace(sizes, rows=sizes.rows // merged, columns=sizes.columns * merged)


def _join(first: Lowered, second: Lowered) -> Lowered:
    return Lowered(first.calls + second.calls, first.scratch + second.scratch)


def _gemm_input_grad(
    op: Op, m: Machine, dy: View, w: Filter, dx: View, written: Box, k_blocks: int, c_blocks: int
) -> Lowered:
    images = extents(written)[0]
    before, rows = gathered(f"{op.name}.rows", dy, images=images, blocks=k_blocks)
    calls = input_gradient_calls(m, rows, w, dx, images=images, k_blocks=k_blocks, c_blocks=c_blocks)
    return _join(before, Lowered(calls))


def _nothing(buffer: Buffer) -> View:
    """A view for a kernel that reads nothing."""
    return View(ref(buffer), 0, 0, 0, buffer.strides[3])
