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
from fusetile.codegen.calls import KernelCall, Lowered, Ref, ref
from fusetile.codegen.conv_source import GRADIENT_INTS, TAP_INTS, tap_convolution, weight_gradient
from fusetile.codegen.conv_tiles import (
    LONGEST_ROW,
    Machine,
    best_rows,
    block_convolution,
    block_gradient,
    cover_lines,
    cover_pixels,
    machine,
    row_counts,
    written_lines,
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
from fusetile.codegen.filter_source import SUM_INTS, TRANSPOSE_INTS, sum_parts, transpose_filter
from fusetile.codegen.gemm import gathered, input_gradient_calls
from fusetile.codegen.targets import Target
from fusetile.codegen.update import Updating
from fusetile.graph import Op
from fusetile.ops.base import Domain
from fusetile.program import Buffer


@dataclass(frozen=True, slots=True)
class Sizes:
    """Iterations of a tap convolution: images, rows, columns, blocks of output channels and of input channels."""

    images: int
    rows: int
    columns: int
    k_blocks: int
    c_blocks: int


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What a tap convolution does besides."""

    bias: Ref | None = None
    activation: str = ""
    alpha: float = 0.0


def lower_conv(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target
) -> Lowered:
    """Conv and Gemm: y = activation(bias + x * w)."""
    if volume(box) == 0:
        return Lowered()
    x, w, *bias = inputs
    m, weights = machine(target, w.block[0]), filter_view(w, domain.need(box, 1))
    written, channels = domain.output(box), domain.reach(box, 0)[1]
    images, _, rows, columns = extents(view4(written))
    sizes = Sizes(images, rows, columns, blocks(written[1], w.block[0]), blocks(channels, w.block[1]))
    source, taps = _nothing(x), NO_TAPS
    if volume(domain.need(box, 0)):  # else there is nothing but padding
        source, taps = padded_view(domain, box, 0, x), taps_of(op.attrs, weights.window)
    epilogue = Epilogue(None, op.attrs.get("activation", ""), float(op.attrs.get("alpha", 0.0)))
    if bias and channels[0] == 0:
        epilogue = replace(epilogue, bias=ref(bias[0], domain.need(box, 2)))
    y = view(outputs[0], written)
    return _convolve_maps(op, m, source, weights, y, taps, sizes, epilogue)


def lower_conv_input_grad(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target
) -> Lowered:
    """ConvInputGrad and GemmInputGrad: dx from dy and the weights."""
    if volume(box) == 0:
        return Lowered()
    dy, w = inputs
    m, written = machine(target, w.block[0]), domain.output(box)
    need, filter_box = domain.need(box, 0), domain.need(box, 1)
    k_blocks, c_blocks = blocks(filter_box[0], w.block[0]), blocks(filter_box[1], w.block[1])
    weights, size = filter_view(w, filter_box), k_blocks * c_blocks * m.vectors.block**2
    if len(written) == 2 and weights.lines == m.vectors.block:
        return _gemm_input_grad(op, m, view(dy, need), weights, view(outputs[0], written), written, k_blocks, c_blocks)
    scratch = _scratch(f"{op.name}.transposed", size * weights.taps)
    lowered, done = Lowered((), (scratch,)), 0
    dx, (images, _, rows, columns) = view(outputs[0], written), view4(written)
    across = list(phases(op.attrs, 1, columns, weights.window[1]))
    parts = []
    for h in phases(op.attrs, 0, rows, weights.window[0]):
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
            op, m, part.x, part.w, part.y, part.taps, part.sizes, Epilogue(), label=f".{i}", phases=together
        )
        lowered = _join(lowered, convolved)
    return lowered


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


def lower_conv_weight_grad(
    op: Op,
    domain: Domain,
    box: Box,
    inputs: Sequence[Buffer],
    outputs: Sequence[Buffer],
    *,
    target: Target,
    updating: Updating | None = None,
) -> Lowered:
    """ConvWeightGrad and GemmWeightGrad: dw from x and dy. With `updating`, of a GemmWeightGrad, the output is not dw
    but the weights."""
    if volume(box) == 0:
        return Lowered()
    x, dy = inputs
    written, touched = domain.output(box), domain.need(box, 1)
    m, dw = machine(target, outputs[0].block[0]), filter_view(outputs[0], written)
    images, _, rows, columns = extents(view4(touched))
    right, taps = view(dy, touched), taps_of(op.attrs, dw.window)
    if volume(domain.need(box, 0)):
        left = padded_view(domain, box, 0, x)
    else:  # nothing but padding: no pixels, so zeros
        left, columns = _nothing(x), 0
    step = (taps.step[0] * left.row, taps.step[1] * left.pixel)
    k_blocks, c_blocks = blocks(written[0], outputs[0].block[0]), blocks(written[1], outputs[0].block[1])
    if (rows, columns, *taps.count) == (1, 1, 1, 1):  # the images are the pixels
        before, left = gathered(f"{op.name}.x", left, images=images, blocks=c_blocks)
        more, right = gathered(f"{op.name}.dy", right, images=images, blocks=k_blocks)
        sizes = Sizes(1, 1, images, k_blocks, c_blocks)
        return _join(_join(before, more), _gradient(op, m, left, right, dw, step, sizes, updating))
    left = replace(left, row=taps.stride[0] * left.row, pixel=taps.stride[1] * left.pixel)
    if (rows, columns) == (1, 1):
        left, right, images, columns = replace(left, pixel=left.image), replace(right, pixel=right.image), 1, images
    elif taps.count == (1, 1) and (left.row, right.row) == (columns * left.pixel, columns * right.pixel):
        merged = max(n for n in row_counts(rows) if n == 1 or n * columns <= LONGEST_ROW)
        left, right = replace(left, row=merged * left.row), replace(right, row=merged * right.row)
        rows, columns = rows // merged, columns * merged
    return _gradient(op, m, left, right, dw, step, Sizes(images, rows, columns, k_blocks, c_blocks), updating)


# -- calls ------------------------------------------------------------------------------------------------------------


def _convolve(
    m: Machine, x: View, w: Filter, y: View, taps: Taps, sizes: Sizes, epilogue: Epilogue, phases: Phases
) -> tuple[KernelCall, ...]:
    """The calls of a tap convolution: one, and more if the output channels do not divide into equal tiles."""
    step = (taps.step[0] * x.row, taps.step[1] * x.pixel)
    lines, (taps_h, taps_w), pixel = w.lines, taps.count, taps.stride[1] * x.pixel
    contiguous = taps_w > 1 and step[1] == w.lines and w.tap_w == w.lines * m.vectors.block
    if contiguous and (not m.written or lines * taps_w <= m.written):  # a row of taps is like one of more lines
        lines, taps_w = lines * taps_w, 1
    calls = []
    rows = sizes.images * sizes.rows
    written = written_lines(m, pixel=pixel, lines=lines)
    for cover in cover_pixels(m, sizes.columns, sizes.k_blocks, written):
        k_tiles = phases.count * cover.tiles
        blocking = block_convolution(
            m,
            replace(cover, tiles=k_tiles),
            rows=rows,
            columns=sizes.columns,
            blocks=sizes.c_blocks,
            filter_block=taps.count[0] * taps.count[1] * w.lines * m.vectors.block,
            x_row=sizes.columns * taps.stride[0] * taps.stride[1] * x.pixel,
        )
        row_blocks = -(-rows // blocking.block_rows)
        ints = {
            "channels_outer": int(blocking.channels_outer),
            "k_tiles": k_tiles,
            "row_blocks": row_blocks,
            "block_rows": blocking.block_rows,
            "rows": rows,
            "height": sizes.rows,
            "long_tiles": cover.long_tiles,
            "short_tiles": cover.short_tiles,
            "chunk": blocking.chunk,
            "blocks": sizes.c_blocks,
            "taps_h": taps_h,
            "taps_w": taps_w,
            "lines": lines,
            "with_bias": int(epilogue.bias is not None),
            "x_image": x.image,
            "x_block": x.block,
            "x_row": taps.stride[0] * x.row,
            "x_tap_h": step[0],
            "x_tap_w": step[1],
            "w_k": w.k,
            "w_block": w.block,
            "w_tap_h": w.tap_h,
            "w_tap_w": w.tap_w,
            "y_image": y.image,
            "y_block": y.block,
            "y_row": y.row,
            "y_pixel": y.pixel,
            "phases": phases.count,
            "across": phases.across,
            "w_phase": phases.w,
            "y_down": phases.y_down,
            "y_across": phases.y_across,
        }
        kernel = tap_convolution(
            vectors=m.vectors,
            tile=cover.tile,
            pixel=pixel,
            loops=2 if taps_w != 1 else int(taps_h != 1),
            written=written,
            activation=epilogue.activation,
            ragged=bool(m.vectors.lanes and not written and lines % m.vectors.lanes),
        )
        bias = w.start if epilogue.bias is None else moved(epilogue.bias, cover.first * m.vectors.block)
        pointers = (x.start, moved(w.start, cover.first * w.k), bias, moved(y.start, cover.first * y.block))
        calls.append(KernelCall(kernel, k_tiles * row_blocks, pointers, _order(TAP_INTS, ints), (epilogue.alpha,)))
    return tuple(calls)


def _gradient(
    op: Op,
    m: Machine,
    x: View,
    dy: View,
    dw: Filter,
    step: tuple[int, int],
    sizes: Sizes,
    updating: Updating | None,
) -> Lowered:
    """The calls of a weight gradient: per width of tile one, and one more that adds partial sums."""
    lines, (taps_h, taps_w) = dw.lines, dw.window
    if step[1] == lines:
        lines, taps_w = lines * taps_w, 1  # the taps of a row are contiguous
    rows, filter_block = sizes.images * sizes.rows, dw.taps * dw.lines * m.vectors.block
    calls: list[KernelCall] = []
    scratch: list[Buffer] = []
    for cover in cover_lines(m, lines, sizes.k_blocks):
        parts = block_gradient(
            m,
            cover,
            rows=rows,
            columns=max(sizes.columns, 1),
            blocks=sizes.c_blocks,
            k_tiles=cover.tiles,
            filter_block=filter_block,
        )
        count = -(-rows // parts.part_rows)
        k_blocks = cover.tiles * cover.tile.blocks
        start, d_k, d_part = moved(dw.start, cover.first * dw.k), dw.k, 0
        if count > 1:
            d_k = sizes.c_blocks * filter_block
            d_part = k_blocks * d_k
            scratch.append(_scratch(f"{op.name}.parts{cover.first}", count * d_part))
            start = ref(scratch[-1])
        ints = {
            "k_tiles": cover.tiles,
            "c_blocks": sizes.c_blocks,
            "unit_blocks": parts.unit_blocks,
            "part_rows": parts.part_rows,
            "outer_rows": parts.outer_rows,
            "inner_rows": parts.inner_rows,
            "rows": rows,
            "height": sizes.rows,
            "columns": sizes.columns,
            "long_tiles": cover.long_tiles,
            "short_tiles": cover.short_tiles,
            "taps_h": taps_h,
            "taps_w": taps_w,
            "lines": lines,
            "x_image": x.image,
            "x_block": x.block,
            "x_row": x.row if sizes.rows > 1 else x.image,
            "x_pixel": x.pixel,
            "x_tap_h": step[0],
            "x_tap_w": step[1],
            "y_image": dy.image,
            "y_block": dy.block,
            "y_row": dy.row if sizes.rows > 1 else dy.image,
            "y_pixel": dy.pixel,
            "d_part": d_part,
            "d_k": d_k,
            "d_block": dw.block,
        }
        pointers = [x.start, moved(dy.start, cover.first * dy.block), start]
        numbers = list(_order(GRADIENT_INTS, ints))
        if updating:
            pointers += [*(moved(state, cover.first * dw.k) for state in updating.states), *updating.controls]
            numbers.append(0)
        in_rows = m.written and dy.pixel == m.vectors.block
        kernel = weight_gradient(
            vectors=m.vectors,
            tile=cover.tile,
            pixel=x.pixel if in_rows else 0,
            in_line=bool(m.written and 1 in (sizes.images, sizes.rows)),
            window=not m.written or (taps_h, taps_w) != (1, 1),
            update=updating.arithmetic if updating else None,
        )
        units = count * cover.tiles * -(-sizes.c_blocks // parts.unit_blocks)
        floats = updating.floats if updating else ()
        calls.append(KernelCall(kernel, units, tuple(pointers), tuple(numbers), floats))
        if count > 1:
            sums = {
                "parts": count,
                "vectors": d_k // m.vectors.block,
                "part": d_part,
                "source_k": d_k,
                "target_k": dw.k,
            }
            arrays = (start, moved(dw.start, cover.first * dw.k))
            calls.append(KernelCall(sum_parts(vectors=m.vectors), k_blocks, arrays, _order(SUM_INTS, sums)))
    return Lowered(tuple(calls), tuple(scratch))


def _transpose(m: Machine, w: Filter, t: Ref, k_blocks: int, c_blocks: int, down: Phase, across: Phase) -> KernelCall:
    """The call that makes the weights of a phase of the input gradient: channels swapped, window turned around."""
    first_h, first_w = w.window[0] - 1 - down.flipped, w.window[1] - 1 - across.flipped
    ints = {"k_blocks": k_blocks, "taps_h": down.taps, "taps_w": across.taps, "w_k": w.k, "w_block": w.block}
    ints |= {"w_tap_h": -down.every * w.tap_h, "w_tap_w": -across.every * w.tap_w}
    kernel = transpose_filter(vectors=m.vectors, lines=w.lines, window=(down.taps, across.taps) != (1, 1))
    start = moved(w.start, first_h * w.tap_h + first_w * w.tap_w)
    return KernelCall(kernel, c_blocks, (start, t), _order(TRANSPOSE_INTS, ints))


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
        return Lowered(_convolve(m, *_rows_in_line(m, x, w, y, taps, sizes), epilogue, phases))
    before, x = gathered(f"{op.name}.rows{label}", x, images=images, blocks=sizes.c_blocks)
    y, sizes = replace(y, image=0, pixel=y.image), replace(sizes, images=1, columns=images)
    return _join(before, Lowered(_convolve(m, x, w, y, Taps((1, 1)), sizes, epilogue, phases)))


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


def _scratch(name: str, elements: int) -> Buffer:
    return Buffer(name, ((0, elements),))


def _order(names: Sequence[str], values: dict[str, int]) -> tuple[int, ...]:
    """The values in the kernel's order of arguments."""
    return tuple(values[name] for name in names)
