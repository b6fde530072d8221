"""TVMScript of the convolution kernels.

Every kernel is dynamic in all sizes and strides and static in its register tile, so that one kernel serves every
layer with that tile, whatever its window, forward as well as backward. Strides are in elements.

    tap_convolution    y = activation(bias + sum over taps of x * w): forward, input gradient, fully connected
    weight_gradient    dw = sum over pixels of x * dy

A vector register holds `width` floats; a channel block is `per_block` of them. Local arrays that are indexed only by
unrolled loops become registers. A *line* is one float of x that all output channels share: the channels of a pixel or,
where a row of taps is contiguous in x and in the weights, the channels of all its taps.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from fusetile.codegen.calls import Kernel, make_kernel, prefetch


@dataclass(frozen=True, slots=True)
class Vectors:
    """How channel blocks lie in registers. `lanes` > 0: load that many lines as one vector and multiply by element
    (ARM); 0: broadcast each line (x86, where that costs nothing)."""

    block: int
    width: int
    lanes: int

    @property
    def per_block(self) -> int:
        return self.block // self.width

    @property
    def tag(self) -> str:
        return f"b{self.block}v{self.width}" + (f"l{self.lanes}" if self.lanes else "")


@dataclass(frozen=True, slots=True)
class Tile:
    """A register tile: `long` pixels or lines x `blocks` channel blocks. With `short` > 0 the kernel has tiles of that
    length as well, so that a * long + b * short covers an extent without waste."""

    long: int
    short: int
    blocks: int

    @property
    def tag(self) -> str:
        return f"{self.long}{f'_{self.short}' if self.short else ''}x{self.blocks}"


LINE = 16  # floats in a cache line

TAP_INTS = (
    *("channels_outer", "k_tiles", "row_blocks", "block_rows", "rows", "height", "long_tiles", "short_tiles"),
    *("chunk", "blocks", "taps_h", "taps_w", "lines", "with_bias", "phases", "across"),
    *("x_image", "x_block", "x_row", "x_tap_h", "x_tap_w"),
    *("w_k", "w_block", "w_tap_h", "w_tap_w", "w_phase"),
    *("y_image", "y_block", "y_row", "y_pixel", "y_down", "y_across"),
)
GRADIENT_INTS = (
    *("k_tiles", "c_blocks", "part_rows", "outer_rows", "inner_rows", "rows", "height", "columns"),
    *("long_tiles", "short_tiles", "taps_h", "taps_w", "lines"),
    *("x_image", "x_block", "x_row", "x_pixel", "x_tap_h", "x_tap_w"),
    *("y_image", "y_block", "y_row", "y_pixel", "d_part", "d_k", "d_block"),
)
WRITTEN_PRODUCTS = 64  # vectors that a written out turn of a weight gradient multiplies
ACTIVATIONS = {
    "": "{}",
    "relu": "T.max({}, T.float32(0))",
    "leaky_relu": "T.Select({0} > T.float32(0), {0}, {0} * alpha)",
}


def indent(text: str, spaces: int) -> str:
    """Indent all but the first line, for text that is put into a template after that many spaces."""
    return textwrap.indent(textwrap.dedent(text).strip("\n"), " " * spaces).lstrip(" ")


def _each(statement: str, length: int, blocks: int, v: Vectors) -> str:
    """The statement for every pixel or line p and register r of a tile, vectorized over e."""
    return f"""
for p in T.unroll({length}):
    for r in T.unroll({blocks * v.per_block}):
        for e in T.vectorized({v.width}):
            {statement}
"""


def _over_tiles(tile: Tile, index: str, body: Callable[[int, str], str]) -> str:
    """The long tiles, then the short ones; `body(length, start)` is the work of one."""
    loops = f"""
for {index} in T.serial(long_tiles):
    {indent(body(tile.long, f"{index} * {tile.long}"), 4)}
"""
    if tile.short:
        loops += f"""
for {index} in T.serial(short_tiles):
    {indent(body(tile.short, f"(long_tiles * {tile.long} + {index} * {tile.short})"), 4)}
"""
    return loops


def segment(length: int, pixel: int, lines: int, lanes: int) -> list[int]:
    """The vectors that hold the lines of a row of pixels, counted from its start. Pixels share lines if they are closer
    than a pixel has lines."""
    return sorted({(p * pixel + i) // lanes for p in range(length) for i in range(lines)})


@cache
def tap_convolution(
    *,
    vectors: Vectors,
    tile: Tile,
    pixel: int,
    loops: int,
    lines: int = 0,
    activation: str = "",
    ragged: bool = False,
) -> Kernel:
    """y = activation(bias + sum over blocks of input channels and taps of x * w), for `blocks` blocks, in chunks.

    A work unit is one tile of output channels x one block of rows; rows are counted over all images. `k_tiles` counts
    the tiles of all `phases`: convolutions of the same x whose results lie between each other, `across` of them from
    left to right. Between chunks of input channels the sums rest in y. `pixel` is the distance in x from one output
    pixel to the next. `loops` is how many axes of the window have more than one tap. `lines` is their number if they
    are written out, for ARM, where LLVM would cut a loop over them badly; without, `ragged` says that they are no
    multiple of the lanes. Pointers x, w, bias, y; the float is the slope of leaky_relu.
    """
    v = vectors
    over = {"c": "T.min(chunk, blocks - chunk_index * chunk)", "th": "taps_h", "tw": "taps_w"}
    over = dict([*over.items()][: 1 + loops])
    x_tap, w_tap = ("".join(f" + {tap} * {o}_tap_{tap[1]}" for tap in [*over][1:]) for o in "xw")
    at = f"(r // {v.per_block}) * {{}} + r % {v.per_block} * {v.width} + e"
    y_at = "y[y0 + p * y_pixel + " + at.format("y_block") + "]"

    def multiply(x_value: str, line: str, length: int) -> str:
        value = f"acc[p, r, e] + {x_value} * w[w0 + {line} * {v.block} + {at.format('w_k')}]"
        return _each(f"acc[p, r, e] = {value}", length, tile.blocks, v)

    def written_out(length: int) -> str:
        """The lines of a row of pixels in registers, then the products line by line."""
        end, text = (length - 1) * pixel + lines, ""
        for q in segment(length, pixel, lines, v.lanes):
            many = min(v.lanes, end - q * v.lanes)  # the last vector must not read beyond the row
            loop = f"T.vectorized({v.lanes})" if many == v.lanes else f"T.unroll({many})"
            text += f"for j in {loop}:\n    xv[{q}, j] = x[x1 + {q * v.lanes} + j]\n"
        for i in range(lines):
            line = f"(p * {pixel} + {i})"
            text += multiply(f"xv[{line} // {v.lanes}, {line} % {v.lanes}]", str(i), length)
        return text

    def looped(length: int) -> str:
        one = f"""
for i in T.serial({f"T.truncdiv(lines, {v.lanes}) * {v.lanes}" if v.lanes else "0"}, lines):
    {indent(multiply(f"x[x1 + p * {pixel} + i]", "i", length), 4)}
"""
        if not v.lanes:
            return one
        return f"""
for q in T.serial(T.truncdiv(lines, {v.lanes})):
    for p in T.unroll({length}):
        for j in T.vectorized({v.lanes}):
            xv[p, j] = x[x1 + p * {pixel} + q * {v.lanes} + j]
    for j in T.unroll({v.lanes}):
        {indent(multiply("xv[p, j]", f"(q * {v.lanes} + j)", length), 8)}
{one if ragged else ""}
"""

    def next_tile(length: int) -> str:
        """Asks for the pixels after these of the same channels: a block's pixels are too few, and blocks too far apart,
        for a processor to foresee. Left out for ARM, whose loads of vectors leave no time for it."""
        addresses = [f"x[x1 + {length * pixel + i}]" for i in range(0, length * pixel, LINE)]
        return "" if v.lanes else prefetch(*addresses)

    def tile_body(length: int, start: str) -> str:
        def each(statement: str) -> str:
            return _each(statement, length, tile.blocks, v)

        store = each(f"{y_at} = acc[p, r, e]")
        if activation:
            store = f"""
if chunk_index == chunks - 1:
    {indent(each(f"{y_at} = {ACTIVATIONS[activation].format('acc[p, r, e]')}"), 4)}
else:
    {indent(store, 4)}
"""
        return f"""
y0: T.int32 = y_start + {start} * y_pixel
if chunk_index > 0:
    {indent(each(f"acc[p, r, e] = {y_at}"), 4)}
else:
    if with_bias > 0:
        {indent(each(f"acc[p, r, e] = bias[k_tile * {tile.blocks * v.block} + r * {v.width} + e]"), 8)}
    else:
        {indent(each("acc[p, r, e] = T.float32(0)"), 8)}
for {", ".join(over)} in T.grid({", ".join(over.values())}):
    x1: T.int32 = x_start + {start} * {pixel} + c * x_block{x_tap}
    w0: T.int32 = w_start + c * w_block{w_tap}
    {indent(next_tile(length), 4)}
    {indent(written_out(length) if lines else looped(length), 4)}
{store}
"""

    body = f"""
for unit in T.serial(lo, hi):
    turn: T.int32 = T.truncmod(T.truncdiv(unit, T.Select(channels_outer > 0, row_blocks, 1)), k_tiles)
    row_block: T.int32 = T.truncmod(T.truncdiv(unit, T.Select(channels_outer > 0, 1, k_tiles)), row_blocks)
    k_tile: T.int32 = T.truncdiv(turn, phases)
    phase: T.int32 = T.truncmod(turn, phases)
    y_phase: T.int32 = T.truncdiv(phase, across) * y_down + T.truncmod(phase, across) * y_across
    chunks: T.int32 = T.truncdiv(blocks + chunk - 1, chunk)
    for chunk_index in T.serial(chunks):
        w_start: T.int32 = k_tile * {tile.blocks} * w_k + phase * w_phase + chunk_index * chunk * w_block
        for row in T.serial(row_block * block_rows, T.min(row_block * block_rows + block_rows, rows)):
            image: T.int32 = T.truncdiv(row, height)
            h: T.int32 = T.truncmod(row, height)
            x_start: T.int32 = image * x_image + h * x_row + chunk_index * chunk * x_block
            y_start: T.int32 = image * y_image + h * y_row + k_tile * {tile.blocks} * y_block + y_phase
            {indent(_over_tiles(tile, "t", tile_body), 12)}
"""
    scratch: dict[str, tuple[tuple[int, ...], str]] = {
        "acc": ((tile.long, tile.blocks * v.per_block, v.width), "float32")
    }
    if v.lanes:
        vectors_of_x = segment(tile.long, pixel, lines, v.lanes)[-1] + 1 if lines else tile.long
        scratch["xv"] = ((vectors_of_x, v.lanes), "float32")
    suffix = (f"_{activation}" if activation else "") + ("_ragged" if ragged else "")
    return make_kernel(
        f"conv{loops}_p{pixel}_l{lines}_t{tile.tag}_{v.tag}{suffix}",
        pointers=dict.fromkeys(("x", "w", "bias", "y"), "float32"),
        body=body,
        ints=TAP_INTS,
        floats=("alpha",),
        scratch=scratch,
    )


@cache
def weight_gradient(*, vectors: Vectors, tile: Tile, pixel: int = 0) -> Kernel:
    """dw = sum over rows and columns of x * dy, for the tiles of lines of every row of taps.

    A work unit is one part of the rows x one tile of output channels x one block of input channels; a part writes its
    own dw, `d_part` elements from the next. Rows (over all images) are taken in outer chunks, for the outer cache, in
    which all units of a thread take their turn, and inner chunks, which the innermost cache holds; between inner
    chunks the sums rest in dw. With `pixel` > 0, that is the distance in x from one pixel to the next, in dy it is a
    block, and several pixels are written out. Pointers x, dy, dw.
    """
    v = vectors
    turn = max(1, WRITTEN_PRODUCTS // (tile.long * tile.blocks * v.per_block)) if pixel else 1
    x_pixel, y_pixel = (str(pixel), str(v.block)) if pixel else ("x_pixel", "y_pixel")
    at = f"(r // {v.per_block}) * {{}} + r % {v.per_block} * {v.width} + e"

    def tile_body(length: int, start: str) -> str:
        d_at = f"dw[d0 + ({start} + p) * {v.block} + {at.format('d_k')}]"

        def each(statement: str) -> str:
            return _each(statement, length, tile.blocks, v)

        def work(at_pixel: int) -> str:
            x_at = f"x1 + {at_pixel * pixel}"
            y_at = f"dy[y0 + {at_pixel * v.block} + {at.format('y_block')}]"
            groups = length // v.lanes if v.lanes else 0
            grouped = groups * v.lanes
            text = ""
            if groups:
                text += f"""
for q in T.unroll({groups}):
    for j in T.vectorized({v.lanes}):
        xv[q, j] = x[{x_at} + q * {v.lanes} + j]
{_each(f"acc[p, r, e] = acc[p, r, e] + xv[p // {v.lanes}, p % {v.lanes}] * {y_at}", grouped, tile.blocks, v)}
"""
            if grouped < length:
                shifted = f"acc[{grouped} + p, r, e] = acc[{grouped} + p, r, e] + x[{x_at} + {grouped} + p] * {y_at}"
                text += _each(shifted, length - grouped, tile.blocks, v)
            return text

        one_by_one = f"""
for column in T.serial({f"T.truncdiv(columns, {turn}) * {turn}" if turn > 1 else "0"}, columns):
    x1: T.int32 = x0 + column * {x_pixel}
    y0: T.int32 = y_start + column * {y_pixel}
    {indent(work(0), 4)}
"""
        in_turns = f"""
for q in T.serial(T.truncdiv(columns, {turn})):
    x1: T.int32 = x0 + q * {turn * pixel}
    y0: T.int32 = y_start + q * {turn * v.block}
    {indent("".join(work(i) for i in range(turn)), 4)}
"""
        return f"""
if first > 0:
    {indent(each("acc[p, r, e] = T.float32(0)"), 4)}
else:
    {indent(each(f"acc[p, r, e] = {d_at}"), 4)}
first_image: T.int32 = T.truncdiv(row_start, height)
for i in T.serial(T.truncdiv(row_stop + height - 1, height) - first_image):
    image: T.int32 = first_image + i
    h_start: T.int32 = T.max(row_start - image * height, 0)
    for j in T.serial(T.min(row_stop - image * height, height) - h_start):
        h: T.int32 = h_start + j
        x0: T.int32 = x_start + image * x_image + h * x_row + {start}
        y_start: T.int32 = y_tile + image * y_image + h * y_row
        {indent(in_turns if turn > 1 else "", 8)}
        {indent(one_by_one, 8)}
{each(f"{d_at} = acc[p, r, e]")}
"""

    body = f"""
for outer in T.serial(T.truncdiv(part_rows + outer_rows - 1, outer_rows)):
    for unit in T.serial(lo, hi):
        part: T.int32 = T.truncdiv(unit, k_tiles * c_blocks)
        k_tile: T.int32 = T.truncmod(T.truncdiv(unit, c_blocks), k_tiles)
        c_block: T.int32 = T.truncmod(unit, c_blocks)
        part_stop: T.int32 = T.min(part * part_rows + part_rows, rows)
        outer_start: T.int32 = part * part_rows + outer * outer_rows
        outer_stop: T.int32 = T.min(outer_start + outer_rows, part_stop)
        y_tile: T.int32 = k_tile * {tile.blocks} * y_block
        for inner in T.serial(T.truncdiv(outer_stop - outer_start + inner_rows - 1, inner_rows)):
            first: T.int32 = T.Select(outer + inner == 0, 1, 0)
            row_start: T.int32 = outer_start + inner * inner_rows
            row_stop: T.int32 = T.min(row_start + inner_rows, outer_stop)
            for th, tw in T.grid(taps_h, taps_w):
                x_start: T.int32 = c_block * x_block + th * x_tap_h + tw * x_tap_w
                d0: T.int32 = (
                    part * d_part + k_tile * {tile.blocks} * d_k + c_block * d_block
                    + (th * taps_w + tw) * lines * {v.block}
                )
                {indent(_over_tiles(tile, "t", tile_body), 16)}
"""
    scratch: dict[str, tuple[tuple[int, ...], str]] = {
        "acc": ((tile.long, tile.blocks * v.per_block, v.width), "float32")
    }
    if v.lanes:
        scratch["xv"] = ((max(tile.long // v.lanes, 1), v.lanes), "float32")
    return make_kernel(
        f"conv_gradient_p{pixel}_t{tile.tag}_{v.tag}",
        pointers=dict.fromkeys(("x", "dy", "dw"), "float32"),
        body=body,
        ints=GRADIENT_INTS,
        scratch=scratch,
    )
