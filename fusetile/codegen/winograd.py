"""Lowering of 3x3 convolutions of stride 1, and of their gradients, to Winograd kernels with tiles of m x m pixels.

A convolution transforms weights and inputs, multiplies, and transforms the products back. Whichever transformed operand
is smaller is made as a whole, in scratch; the other one piece by piece, next to the multiplication that uses it:

    many tiles      U of all weights, then per block of tiles: V of all channels, multiply with all of U
    many channels   V of all tiles, then per tile of output channels: U of a chunk of channels, multiply with all of V

The weight gradient takes the tiles in turns that fit the cache: V of x, Z of dy, then dw += their products. The input
gradient is a convolution of dy with transposed weights.

Errors (L2, against float64, relative to the direct kernel's): F(2x2) below 1, F(4x4) below 2. How tiles lie follows
from the origin of the box, so parts of a map that are computed alone differ from the whole by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fusetile.box import Box, extents, view4
from fusetile.codegen.calls import KernelCall, Lowered, Ref, ref
from fusetile.codegen.conv import Epilogue, Sizes
from fusetile.codegen.conv_tiles import Machine, machine
from fusetile.codegen.conv_views import Filter, View, blocks, filter_view, padded_view, view
from fusetile.codegen.filter_source import TRANSPOSE_INTS, transpose_filter
from fusetile.codegen.targets import Target
from fusetile.codegen.winograd_source import (
    CHANNELS_INTS,
    FILTER_INTS,
    GRADIENT_INTS,
    INPUT_INTS,
    PAD,
    TILES_INTS,
    convolve_channels,
    convolve_tiles,
    filter_gradient,
    transform_dy,
    transform_filter,
    transform_input,
)
from fusetile.ops.base import Domain
from fusetile.graph import Op
from fusetile.program import Buffer

# Scratch per work unit is why there are few: as many as keep 2, 3 and 4 threads evenly busy, or the cores of a Pi.
UNITS, UNITS_ARM = 12, 4
MIN_CHANNEL_TILES = 8  # fewer tiles of output channels than this would leave threads without work
MAX_TURNS = 32
SET = 512  # floats after which addresses may fall into the same sets of the nearest cache


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles of m x m pixels over `sizes`, in groups of `long` (`long_groups` of them) or one less."""

    m: int
    sizes: Sizes
    long: int
    long_groups: int
    groups: int

    @property
    def down(self) -> int:
        return -(-self.sizes.rows // self.m)

    @property
    def across(self) -> int:
        return -(-self.sizes.columns // self.m)

    @property
    def tiles(self) -> int:
        return self.sizes.images * self.down * self.across

    @property
    def products(self) -> int:
        return (self.m + 2) ** 2

    def ints(self) -> dict[str, int]:
        """What kernels need to find the pixels of a tile."""
        return {"down": self.down, "across": self.across, "rows": self.sizes.rows, "columns": self.sizes.columns}


def lower_conv(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target, m: int
) -> Lowered:
    """Conv: y = activation(bias + x * w)."""
    x, w, *bias = inputs
    written, channels = domain.output(box), domain.reach(box, 0)[1]
    epilogue = Epilogue(None, op.attrs.get("activation", ""), float(op.attrs.get("alpha", 0.0)))
    if bias and channels[0] == 0:
        epilogue = replace(epilogue, bias=ref(bias[0], domain.need(box, 2)))
    images, _, rows, columns = extents(written)
    sizes = Sizes(images, rows, columns, blocks(written[1], w.block[0]), blocks(channels, w.block[1]))
    source, weights = padded_view(domain, box, 0, x), filter_view(w, domain.need(box, 1))
    return _convolve(op, target, m, source, weights, view(outputs[0], written), sizes, epilogue)


def lower_conv_input_grad(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target, m: int
) -> Lowered:
    """ConvInputGrad: dx from dy and the weights, transposed and flipped."""
    dy, w = inputs
    written, filter_box = domain.output(box), domain.need(box, 1)
    images, _, rows, columns = extents(written)
    k_blocks, c_blocks = blocks(filter_box[0], w.block[0]), blocks(filter_box[1], w.block[1])
    before, weights = _transposed(op, filter_view(w, filter_box), w.block[0], k_blocks, c_blocks)
    sizes = Sizes(images, rows, columns, c_blocks, k_blocks)
    source, dx = padded_view(domain, box, 0, dy), view(outputs[0], written)
    after = _convolve(op, target, m, source, weights, dx, sizes, Epilogue())
    return Lowered(before.calls + after.calls, before.scratch + after.scratch)


def lower_conv_weight_grad(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target, m: int
) -> Lowered:
    """ConvWeightGrad: dw from x and dy."""
    x, dy = inputs
    written, touched = domain.output(box), domain.need(box, 1)
    cpu, dw = machine(target, outputs[0].block[0]), filter_view(outputs[0], written)
    images, _, rows, columns = extents(view4(touched))
    c_blocks, k_blocks = (blocks(written[1], outputs[0].block[1]), blocks(written[0], outputs[0].block[0]))
    sizes = Sizes(images, rows, columns, k_blocks, c_blocks)
    left, right = padded_view(domain, box, 0, x), view(dy, touched)
    whole = _tiling(m, sizes, cpu.vectors.block)
    wide = _wide(cpu, k_blocks)
    row = wide * cpu.vectors.block
    lines = _power_of_two(min(cpu.lines[wide], cpu.vectors.block))
    # a tile of output channels of Z stays in the outer cache
    turn = max(-(-whole.tiles // MAX_TURNS), cpu.outer_bytes // 2 // (4 * whole.products * row), 1)
    turns = -(-whole.tiles // turn)
    most = -(-whole.tiles // turns)
    v_block, z_k = _padded(most * cpu.vectors.block), _padded(most * row)
    v_xi, z_xi = _padded(c_blocks * v_block), _padded(k_blocks // wide * z_k)
    items = k_blocks // wide * c_blocks * (cpu.vectors.block // lines)
    units, d_unit = min(_units(target), items), whole.products * lines * row
    v = _scratch(f"{op.name}.inputs", whole.products * v_xi)
    z = _scratch(f"{op.name}.gradients", whole.products * z_xi)
    d = _scratch(f"{op.name}.products", units * d_unit)
    calls = []
    for i in range(turns):
        first, stop = (whole.tiles * j // turns for j in (i, i + 1))
        tiling = _grouped(whole, stop - first, cpu.vectors.block)
        for kernel, source, start, count, across, xi_stride, block_stride in (
            (transform_input, left, v, c_blocks, 1, v_xi, v_block),
            (transform_dy, right, z, k_blocks, wide, z_xi, z_k),
        ):
            ints = tiling.ints() | {
                "blocks": count,
                "groups": tiling.groups,
                "long": tiling.long,
                "long_groups": tiling.long_groups,
                "first": first,
                "x_image": source.image,
                "x_block": source.block,
                "x_row": source.row,
                "wide": across,
                "v_group": 0,
                "v_tile": across * cpu.vectors.block,
                "v_xi": xi_stride,
                "v_block": block_stride,
            }
            code = kernel(vectors=cpu.vectors, m=m)
            calls.append(_call(code, count * tiling.groups, (source.start, ref(start)), INPUT_INTS, ints))
        ints = {
            "items": items,
            "units": units,
            "blocks": c_blocks,
            "tiles": stop - first,
            "v_xi": v_xi,
            "v_block": v_block,
            "z_xi": z_xi,
            "z_k": z_k,
            "d_unit": d_unit,
            "d_k": dw.k,
            "d_block": dw.block,
            "adding": int(i > 0),
        }
        code = filter_gradient(vectors=cpu.vectors, m=m, wide=wide, lines=lines)
        calls.append(_call(code, units, (ref(v), ref(z), dw.start, ref(d)), GRADIENT_INTS, ints))
    return Lowered(tuple(calls), (v, z, d))


# -- convolution ------------------------------------------------------------------------------------------------------


def _convolve(
    op: Op, target: Target, m: int, x: View, w: Filter, y: View, sizes: Sizes, epilogue: Epilogue
) -> Lowered:
    cpu = machine(target, w.lines)
    wide = _wide(cpu, sizes.k_blocks)
    tiling = _tiling(m, sizes, cpu.pixels[wide])
    output = tiling.ints() | {
        "with_bias": int(epilogue.bias is not None),
        "y_image": y.image,
        "y_block": y.block,
        "y_row": y.row,
        "y_pixel": y.pixel,
    }
    k_tiles = sizes.k_blocks // wide
    many_channels = tiling.tiles < sizes.k_blocks * cpu.vectors.block and k_tiles >= MIN_CHANNEL_TILES
    how = _over_channels if many_channels else _over_tiles
    return how(op, cpu, _units(target), tiling, wide, x, w, y, epilogue, output)


def _over_tiles(
    op: Op,
    cpu: Machine,
    most_units: int,
    tiling: Tiling,
    wide: int,
    x: View,
    w: Filter,
    y: View,
    epilogue: Epilogue,
    output: dict[str, int],
) -> Lowered:
    """Many tiles: U as a whole."""
    block, sizes, products = cpu.vectors.block, tiling.sizes, tiling.products
    row, k_tiles = wide * block, sizes.k_blocks // wide
    v_xi, u_xi = _padded(sizes.c_blocks * tiling.long * block), _padded(sizes.c_blocks * block * row)
    m_group = tiling.long * (products * row + PAD)
    fitting = cpu.outer_bytes * 3 // 4 // (4 * (products * v_xi + m_group))
    block_groups = max(1, min(fitting, -(-tiling.groups // most_units)))
    items = -(-tiling.groups // block_groups)
    units = min(most_units, items)
    u = _scratch(f"{op.name}.weights", k_tiles * products * u_xi)
    v = _scratch(f"{op.name}.inputs", units * block_groups * products * v_xi)
    m = _scratch(f"{op.name}.products", units * block_groups * m_group)
    ints = {
        "k_tiles": k_tiles,
        "blocks": sizes.c_blocks,
        "w_k": w.k,
        "w_block": w.block,
        "u_k": products * u_xi,
        "u_xi": u_xi,
    }
    code = transform_filter(vectors=cpu.vectors, m=tiling.m, wide=wide)
    before = _call(code, k_tiles * sizes.c_blocks, (w.start, ref(u)), FILTER_INTS, ints)
    ints |= output | {
        "items": items,
        "units": units,
        "groups": tiling.groups,
        "block_groups": block_groups,
        "long_groups": tiling.long_groups,
        "x_image": x.image,
        "x_block": x.block,
        "x_row": x.row,
        "v_unit": block_groups * products * v_xi,
        "v_group": products * v_xi,
        "v_xi": v_xi,
        "m_unit": block_groups * m_group,
    }
    code = convolve_tiles(
        vectors=cpu.vectors, m=tiling.m, wide=wide, long=tiling.long, activation=epilogue.activation
    )
    pointers = (x.start, ref(u), epilogue.bias or w.start, y.start, ref(v), ref(m))
    return Lowered((before, _call(code, units, pointers, TILES_INTS, ints, (epilogue.alpha,))), (u, v, m))


def _over_channels(
    op: Op,
    cpu: Machine,
    most_units: int,
    tiling: Tiling,
    wide: int,
    x: View,
    w: Filter,
    y: View,
    epilogue: Epilogue,
    output: dict[str, int],
) -> Lowered:
    """Many channels: V as a whole."""
    block, sizes, products = cpu.vectors.block, tiling.sizes, tiling.products
    row, k_tiles = wide * block, sizes.k_blocks // wide
    v_xi = _padded(sizes.c_blocks * tiling.long * block)
    m_group = tiling.long * (products * row + PAD)
    ranges = -(-tiling.groups // max(1, cpu.outer_bytes // (4 * m_group)))
    block_groups = -(-tiling.groups // ranges)
    chunks = -(-sizes.c_blocks // max(1, cpu.outer_bytes // 4 // (4 * products * block * row)))
    chunk = -(-sizes.c_blocks // chunks)
    u_xi = _padded(chunk * block * row)
    items = k_tiles * ranges
    units = min(most_units, items)
    v = _scratch(f"{op.name}.inputs", tiling.groups * products * v_xi)
    u = _scratch(f"{op.name}.weights", units * products * u_xi)
    m = _scratch(f"{op.name}.products", units * block_groups * m_group)
    ints = output | {
        "blocks": sizes.c_blocks,
        "groups": tiling.groups,
        "long": tiling.long,
        "long_groups": tiling.long_groups,
        "first": 0,
        "x_image": x.image,
        "x_block": x.block,
        "x_row": x.row,
        "wide": 1,
        "v_group": products * v_xi,
        "v_tile": 0,
        "v_xi": v_xi,
        "v_block": tiling.long * block,
    }
    code = transform_input(vectors=cpu.vectors, m=tiling.m)
    before = _call(code, sizes.c_blocks * tiling.groups, (x.start, ref(v)), INPUT_INTS, ints)
    ints |= {
        "items": items,
        "units": units,
        "block_groups": block_groups,
        "ranges": ranges,
        "chunk": chunk,
        "w_k": w.k,
        "w_block": w.block,
        "u_unit": products * u_xi,
        "u_xi": u_xi,
        "m_unit": block_groups * m_group,
    }
    code = convolve_channels(
        vectors=cpu.vectors, m=tiling.m, wide=wide, long=tiling.long, activation=epilogue.activation
    )
    pointers = (ref(v), w.start, epilogue.bias or w.start, y.start, ref(u), ref(m))
    return Lowered((before, _call(code, units, pointers, CHANNELS_INTS, ints, (epilogue.alpha,))), (v, u, m))


def _transposed(op: Op, w: Filter, block: int, k_blocks: int, c_blocks: int) -> tuple[Lowered, Filter]:
    """The weights with channels swapped and the window flipped, in scratch."""
    square = block * block
    t = _scratch(f"{op.name}.transposed", c_blocks * k_blocks * w.taps * square)
    ints = {"k_blocks": k_blocks, "window": w.taps, "lines": w.lines, "w_k": w.k, "w_block": w.block}
    call = _call(transpose_filter(block=block), c_blocks, (w.start, ref(t)), TRANSPOSE_INTS, ints)
    result = replace(w, start=ref(t), k=k_blocks * w.taps * square, block=w.taps * square)
    return Lowered((call,), (t,)), result


# -- what all share ---------------------------------------------------------------------------------------------------


def _tiling(m: int, sizes: Sizes, longest: int) -> Tiling:
    empty = Tiling(m, sizes, 1, 0, 0)
    return _grouped(empty, empty.tiles, longest)


def _grouped(tiling: Tiling, tiles: int, longest: int) -> Tiling:
    """So many of the tiles in groups of at most `longest`, that differ by at most one."""
    groups = -(-tiles // longest)
    long = -(-tiles // groups)
    return replace(tiling, long=long, long_groups=tiles - groups * (long - 1), groups=groups)


def _wide(cpu: Machine, k_blocks: int) -> int:
    """Blocks of output channels in a register tile. On x86 two use every load of an input twice."""
    return 2 if not cpu.vectors.lanes and k_blocks % 2 == 0 else 1


def _units(target: Target) -> int:
    return UNITS_ARM if target.width == 4 else UNITS


def _power_of_two(limit: int) -> int:
    return 1 << (limit.bit_length() - 1)


def _padded(stride: int) -> int:
    """A distance between streams that go side by side, at least `stride`, that does not put them in one cache set."""
    return stride + PAD if stride % SET < PAD or stride % SET > SET - PAD else stride


def _scratch(name: str, elements: int) -> Buffer:
    return Buffer(name, ((0, elements),))


def _call(
    kernel,
    split: int,
    pointers: tuple[Ref, ...],
    names: Sequence[str],
    ints: dict[str, int],
    floats: tuple[float, ...] = (),
) -> KernelCall:
    return KernelCall(kernel, split, pointers, tuple(ints[name] for name in names), floats)
