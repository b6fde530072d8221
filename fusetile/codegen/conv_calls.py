"""The calls of direct convolutions: their iterations cut into tiles and work units, and the kernels' arguments."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusetile.codegen.calls import KernelCall, Lowered, Ref, named_call, ref, scratch_buffer
from fusetile.codegen.conv_gradient_source import GRADIENT_INTS, UPDATING_INTS, weight_gradient
from fusetile.codegen.conv_source import TAP_INTS, tap_convolution
from fusetile.codegen.conv_tiles import (
    Machine,
    block_convolution,
    block_gradient,
    cover_lines,
    cover_pixels,
    written_lines,
)
from fusetile.codegen.conv_views import Filter, Phases, Taps, View, moved
from fusetile.codegen.filter_source import SUM_INTS, sum_parts
from fusetile.codegen.update import Updating
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


def tap_calls(
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
            **replace(x, row=taps.stride[0] * x.row).ints("x"),
            "x_tap_h": step[0],
            "x_tap_w": step[1],
            **w.ints("w"),
            **y.ints("y"),
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
        calls.append(named_call(kernel, k_tiles * row_blocks, pointers, TAP_INTS, ints, (epilogue.alpha,)))
    return tuple(calls)


def gradient_calls(
    name: str,
    m: Machine,
    x: View,
    dy: View,
    dw: Filter,
    step: tuple[int, int],
    sizes: Sizes,
    updating: Updating | None,
) -> Lowered:
    """The calls of the op `name`, a weight gradient: per width of tile one, and one more that adds partial sums."""
    lines, (taps_h, taps_w) = dw.lines, dw.window
    if step[1] == lines:
        lines, taps_w = lines * taps_w, 1  # the taps of a row are contiguous
    rows, filter_block = sizes.images * sizes.rows, dw.taps * dw.lines * m.vectors.block
    if sizes.rows == 1:
        x, dy = replace(x, row=x.image), replace(dy, row=dy.image)
    calls: list[KernelCall] = []
    partial: list[Buffer] = []
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
            partial.append(scratch_buffer(f"{name}.parts{cover.first}", count * d_part))
            start = ref(partial[-1])
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
            **x.ints("x"),
            "x_tap_h": step[0],
            "x_tap_w": step[1],
            **dy.ints("y"),
            "d_part": d_part,
            "d_k": d_k,
            "d_block": dw.block,
            "zero": 0,
        }
        pointers = [x.start, moved(dy.start, cover.first * dy.block), start]
        if updating:
            pointers += [*(moved(state, cover.first * dw.k) for state in updating.states), *updating.controls]
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
        names = (*GRADIENT_INTS, *UPDATING_INTS) if updating else GRADIENT_INTS
        calls.append(named_call(kernel, units, pointers, names, ints, floats))
        if count > 1:
            sums = {
                "parts": count,
                "vectors": d_k // m.vectors.block,
                "part": d_part,
                "source_k": d_k,
                "target_k": dw.k,
            }
            arrays = (start, moved(dw.start, cover.first * dw.k))
            calls.append(named_call(sum_parts(vectors=m.vectors), k_blocks, arrays, SUM_INTS, sums))
    return Lowered(tuple(calls), tuple(partial))
