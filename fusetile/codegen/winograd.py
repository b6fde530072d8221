"""Lowering of 3x3 convolutions of stride 1, and of their gradients, to Winograd kernels with tiles of m x m pixels.

A convolution transforms weights and inputs, multiplies, and transforms the products back. Whichever transformed operand
is smaller is made as a whole, in scratch; the other one piece by piece, next to the multiplication that uses it:

    many tiles      U of all weights, then per block of tiles: V of all channels, multiply with all of U
    many channels   V of all tiles, then per tile of output channels: U of a chunk of channels, multiply with all of V

The weight gradient takes the tiles in turns that fit the cache: V of x, Z of dy, then dw += their products. The input
gradient is a convolution of dy with transposed weights. `lean`: slower, with less scratch; the results are the same
bits.

How tiles lie follows from the origin of the box, so parts of a map that are computed alone differ from the whole by
rounding; conv_choice states the errors.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from fusetile.box import extents, view4
from fusetile.codegen.calls import Kernel, KernelCall, Lowered, Ref, named_call, ref, scratch_buffer
from fusetile.codegen.conv_calls import Epilogue, Sizes
from fusetile.codegen.conv_tiles import machine
from fusetile.codegen.conv_views import Filter, View, blocks, filter_view, moved, padded_view, view
from fusetile.codegen.job import Job
from fusetile.codegen.targets import Target
from fusetile.codegen.winograd_source import (
    CHANNELS_INTS,
    FILTER_INTS,
    GRADIENT_INTS,
    INPUT_INTS,
    TILES_INTS,
    convolve_channels,
    convolve_tiles,
    filter_gradient,
    transform_dy,
    transform_filter,
    transform_input,
)
from fusetile.codegen.winograd_tiles import (
    MAX_TURNS,
    MIN_CHANNEL_TILES,
    Convolution,
    Tiling,
    grouped,
    longest,
    padded,
    power_of_two,
    tiled,
    widths,
    workers_of,
)
from fusetile.graph import Op

SMALL_floats = 1 << 18  # of scratch: less is not worth another call
LEAN_BANDS = 8  # at most so many times are the inputs transformed where memory is scarce


def lower_conv(job: Job, *, m: int) -> Lowered:
    """Conv: y = activation(bias + x * w)."""
    _, w, *bias = job.inputs
    written, channels = job.written(), job.reach(0)[1]
    epilogue = Epilogue(None, job.op.attrs.get("activation", ""), float(job.op.attrs.get("alpha", 0.0)))
    if bias and channels[0] == 0:
        epilogue = replace(epilogue, bias=ref(bias[0], job.need(2)))
    images, _, rows, columns = extents(written)
    sizes = Sizes(images, rows, columns, blocks(written[1], w.block[0]), blocks(channels, w.block[1]))
    source, weights = padded_view(job), filter_view(w, job.need(1))
    return _convolve(job.op, job.target, m, source, weights, view(job.output, written), sizes, epilogue, lean=job.lean)


def lower_conv_input_grad(job: Job, *, m: int) -> Lowered:
    """ConvInputGrad: dx from dy and the weights, transposed and flipped."""
    w = job.inputs[1]
    written, filter_box = job.written(), job.need(1)
    images, _, rows, columns = extents(written)
    k_blocks, c_blocks = blocks(filter_box[0], w.block[0]), blocks(filter_box[1], w.block[1])
    weights = filter_view(w, filter_box)
    weights = replace(weights, k=weights.block, block=weights.k)
    sizes = Sizes(images, rows, columns, c_blocks, k_blocks)
    source, dx = padded_view(job), view(job.output, written)
    return _convolve(job.op, job.target, m, source, weights, dx, sizes, Epilogue(), lean=job.lean, transposed=True)


def lower_conv_weight_grad(job: Job, *, m: int) -> Lowered:
    """ConvWeightGrad: dw from x and dy."""
    dy = job.inputs[1]
    written, touched = job.written(), job.need(1)
    cpu, dw = machine(job.target, job.output.block[0]), filter_view(job.output, written)
    images, _, rows, columns = extents(view4(touched))
    c_blocks, k_blocks = (blocks(written[1], job.output.block[1]), blocks(written[0], job.output.block[0]))
    sizes = Sizes(images, rows, columns, k_blocks, c_blocks)
    left, right = padded_view(job), view(dy, touched)
    whole = tiled(m, sizes, cpu.vectors.block)
    wide = widths(cpu, k_blocks)[-1]
    row = wide * cpu.vectors.block
    lines = power_of_two(min(cpu.lines[wide], cpu.vectors.block))
    # a tile of output channels of Z stays in the outer cache
    turn = max(-(-whole.tiles // MAX_TURNS), cpu.outer_bytes // 2 // (4 * whole.products * row), 1)
    turns = -(-whole.tiles // turn)
    most = -(-whole.tiles // turns)
    v_block, z_k = padded(most * cpu.vectors.block), padded(most * row)
    # Z of a band of tiles of output channels at a time: no more than V; with `lean` V of a band of channels, too
    k_tiles, least = k_blocks // wide, SMALL_floats // whole.products
    c_band = max(-(-c_blocks // LEAN_BANDS), min(c_blocks, least // v_block)) if job.lean else c_blocks
    v_xi = padded(c_band * v_block)
    k_band = max(1, min(k_tiles, max(v_xi, least) // z_k))
    z_xi = padded(k_band * z_k)
    per_block = cpu.vectors.block // lines
    workers, d_worker = workers_of(job.target), whole.products * lines * row
    v = scratch_buffer(f"{job.op.name}.inputs", whole.products * v_xi)
    z = scratch_buffer(f"{job.op.name}.gradients", whole.products * z_xi)
    d = scratch_buffer(f"{job.op.name}.products", workers * d_worker)
    codes = transform_input(vectors=cpu.vectors, m=m), transform_dy(vectors=cpu.vectors, m=m)
    multiply = filter_gradient(vectors=cpu.vectors, m=m, wide=wide, lines=lines)
    calls = []
    for i, c in product(range(turns), range(0, c_blocks, c_band)):
        first, stop = (whole.tiles * j // turns for j in (i, i + 1))
        tiling, c_count = grouped(whole, stop - first, cpu.vectors.block), min(c_band, c_blocks - c)
        strides = {"wide": 1, "v_tile": cpu.vectors.block, "v_xi": v_xi, "v_block": v_block}
        calls.append(_transform(codes[0], tiling, first, left, c, c_count, ref(v), strides))
        for k in range(0, k_tiles, k_band):
            tiles = min(k_band, k_tiles - k)
            strides = {"wide": wide, "v_tile": row, "v_xi": z_xi, "v_block": z_k}
            calls.append(_transform(codes[1], tiling, first, right, k * wide, tiles * wide, ref(z), strides))
            sums = {
                "blocks": c_count,
                "tiles": stop - first,
                "v_xi": v_xi,
                "v_block": v_block,
                "z_xi": z_xi,
                "z_k": z_k,
                "d_worker": d_worker,
                "d_k": dw.k,
                "d_block": dw.block,
                "adding": int(i > 0),
            }
            pointers = (ref(v), ref(z), moved(dw.start, k * wide * dw.k + c * dw.block), ref(d))
            units = tiles * c_count * per_block
            calls.append(named_call(multiply, units, pointers, GRADIENT_INTS, sums, workers=workers))
    return Lowered(tuple(calls), (v, z, d))


def _transform(
    code: Kernel, tiling: Tiling, first: int, x: View, block: int, count: int, target: Ref, strides: dict[str, int]
) -> KernelCall:
    """`count` channel blocks of x, or dy, from `block` on; the tiles from `first` on."""
    ints = tiling.ints() | {"first": first, "v_group": 0, "blocks": count}
    ints |= {"x_image": x.image, "x_block": x.block, "x_row": x.row} | strides
    return named_call(code, count * tiling.groups, (moved(x.start, block * x.block), target), INPUT_INTS, ints)


# -- convolution ------------------------------------------------------------------------------------------------------


def _convolve(
    op: Op,
    target: Target,
    m: int,
    x: View,
    w: Filter,
    y: View,
    sizes: Sizes,
    epilogue: Epilogue,
    *,
    lean: bool,
    transposed: bool = False,
) -> Lowered:
    cpu, workers = machine(target, w.lines), workers_of(target)
    options = [
        Convolution(op.name, cpu, workers, tiled(m, sizes, longest(cpu, wide)), wide, x, w, y, epilogue, transposed)
        for wide in widths(cpu, sizes.k_blocks)
    ]
    for one in options:
        if one.has_many_channels and one.k_tiles >= MIN_CHANNEL_TILES:
            return _over_channels(one)
    return _over_tiles(options[-1], lean=lean)


def _over_tiles(one: Convolution, *, lean: bool) -> Lowered:
    """Many tiles: U as a whole, or with `lean` of a band of output channels at a time, for each of which V is made
    again."""
    tiling, v_group = one.tiling, one.tiling.products * one.v_xi
    c_blocks = tiling.sizes.c_blocks
    u_xi = padded(c_blocks * one.block * one.row)
    m_group, block_groups = one.m_group(by_xi=False), one.block_groups
    units = -(-tiling.groups // block_groups)
    workers = min(one.workers, units)
    u_k = tiling.products * u_xi
    band = max(-(-one.k_tiles // LEAN_BANDS), min(one.k_tiles, SMALL_floats // u_k)) if lean else one.k_tiles
    u = scratch_buffer(f"{one.name}.weights", band * u_k)
    v = scratch_buffer(f"{one.name}.inputs", workers * block_groups * v_group)
    m = scratch_buffer(f"{one.name}.products", workers * block_groups * m_group)
    ints = one.ints() | {
        "block_groups": block_groups,
        "u_k": u_k,
        "u_xi": u_xi,
        "v_worker": block_groups * v_group,
        "v_group": v_group,
        "m_worker": block_groups * m_group,
    }
    vectors, activation = one.cpu.vectors, one.epilogue.activation
    weights = transform_filter(vectors=vectors, m=tiling.m, wide=one.wide, transposed=one.transposed)
    kernel = convolve_tiles(vectors=vectors, m=tiling.m, wide=one.wide, long=tiling.long, activation=activation)
    calls = []
    for k in range(0, one.k_tiles, band):
        ints["k_tiles"] = tiles = min(band, one.k_tiles - k)
        w, y = moved(one.w.start, k * one.wide * one.w.k), one.y.moved(k * one.wide * one.y.block)
        bias = moved(one.epilogue.bias, k * one.row) if one.epilogue.bias else w
        calls += [
            named_call(weights, tiles * c_blocks, (w, ref(u)), FILTER_INTS, ints),
            named_call(
                kernel,
                units,
                (one.x.start, ref(u), bias, y.start, ref(v), ref(m)),
                TILES_INTS,
                ints,
                (one.epilogue.alpha,),
                workers=workers,
            ),
        ]
    return Lowered(tuple(calls), (u, v, m), prepared=u.name if band == one.k_tiles else "")


def _over_channels(one: Convolution) -> Lowered:
    """Many channels: V as a whole."""
    tiling, c_blocks = one.tiling, one.tiling.sizes.c_blocks
    m_group = one.m_group(by_xi=True)
    ranges = one.ranges
    block_groups = -(-tiling.groups // ranges)
    chunk_bytes = 4 * tiling.products * one.block * one.row
    chunks = -(-c_blocks // max(1, one.cpu.outer_bytes * max(one.wide, 2) // 8 // chunk_bytes))
    chunk = -(-c_blocks // chunks)
    u_xi = padded(chunk * one.block * one.row)
    units = one.k_tiles * ranges
    workers = min(one.workers, units)
    v = scratch_buffer(f"{one.name}.inputs", tiling.groups * tiling.products * one.v_xi)
    u = scratch_buffer(f"{one.name}.weights", workers * tiling.products * u_xi)
    m = scratch_buffer(f"{one.name}.products", workers * block_groups * m_group)
    ints = one.ints() | {
        "block_groups": block_groups,
        "ranges": ranges,
        "chunk": chunk,
        "first": 0,
        "wide": 1,
        "v_group": tiling.products * one.v_xi,
        "v_tile": 0,
        "v_block": tiling.long * one.block,
        "u_worker": tiling.products * u_xi,
        "u_xi": u_xi,
        "m_worker": block_groups * m_group,
    }
    kernel = convolve_channels(
        vectors=one.cpu.vectors,
        m=tiling.m,
        wide=one.wide,
        long=tiling.long,
        activation=one.epilogue.activation,
        transposed=one.transposed,
    )
    pointers = (ref(v), one.w.start, one.epilogue.bias or one.w.start, one.y.start, ref(u), ref(m))
    inputs = transform_input(vectors=one.cpu.vectors, m=tiling.m)
    calls = (
        named_call(inputs, c_blocks * tiling.groups, (one.x.start, ref(v)), INPUT_INTS, ints),
        named_call(kernel, units, pointers, CHANNELS_INTS, ints, (one.epilogue.alpha,), workers=workers),
    )
    return Lowered(calls, (v, u, m))
