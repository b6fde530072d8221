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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from fusetile.codegen.calls import Kernel, make_kernel, prefetch
from fusetile.codegen.calls import vectors as each_vector
from fusetile.codegen.update import Arithmetic


@dataclass(frozen=True, slots=True)
class Vectors:
    """How channel blocks lie in registers. `lanes` > 0: load that many lines as one vector and multiply by element
    (ARM); 0: broadcast each line (x86, where that costs nothing). With `wide`, addresses are computed in 64 bits: of 32
    bits LLVM makes sums that it extends again and again (ARM with 64 bits)."""

    block: int
    width: int
    lanes: int
    wide: bool = False

    @property
    def index(self) -> str:
        """The type of an offset."""
        return "T.int64" if self.wide else "T.int32"

    def offset(self, value: str) -> str:
        """A 32-bit value as an offset, or as a factor of one."""
        return f"T.Cast('int64', {value})" if self.wide else f"({value})"

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
    *("k_tiles", "c_blocks", "unit_blocks", "part_rows", "outer_rows", "inner_rows", "rows", "height", "columns"),
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


def over_tiles(tile: Tile, index: str, body: Callable[[int, str], str]) -> str:
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


@dataclass(frozen=True, slots=True)
class Written:
    """The written out lines of a row of pixels, `pixel` lines from one pixel to the next, and how they are loaded: as
    vectors of `lanes`, `piece` lines of a pixel at a time with those of the other taps that lie at the same place of
    other pixels; if `piece` is 0, all at once."""

    pixel: int
    lines: int
    lanes: int
    piece: int

    @property
    def turns(self) -> list[list[int]]:
        """The lines that are multiplied after each round of loads."""
        if not self.piece:
            return [[*range(self.lines)]]
        starts = range(0, min(self.pixel, self.lines), self.piece)
        return [[i for i in range(self.lines) if r <= i % self.pixel < r + self.piece] for r in starts]

    def vectors(self, length: int, turn: Sequence[int]) -> dict[int, int]:
        """The vectors of lines that so many pixels need for a turn, counted from the start of the row, and their places
        in the array that becomes registers."""
        needed = sorted({(p * self.pixel + i) // self.lanes for p in range(length) for i in turn})
        return {vector: place if self.piece else vector for place, vector in enumerate(needed)}

    def held(self, length: int) -> int:
        """How many vectors are in registers at a time."""
        return max(len(self.vectors(length, turn)) for turn in self.turns)

    def places(self, length: int) -> int:
        """How many places the array has."""
        return 1 + max(max(self.vectors(length, turn).values()) for turn in self.turns)

    def register(self, line: int, turn: Sequence[int]) -> str:
        """The place and lane of a line of pixel p."""
        if not self.piece:
            return f"(p * {self.pixel} + {line}) // {self.lanes}, (p * {self.pixel} + {line}) % {self.lanes}"
        many, inside = self.piece // self.lanes, line % self.pixel - turn[0]
        return f"(p + {line // self.pixel}) * {many} + {inside // self.lanes}, {inside % self.lanes}"


@cache
def tap_convolution(
    *,
    vectors: Vectors,
    tile: Tile,
    pixel: int,
    loops: int,
    written: Written | None = None,
    activation: str = "",
    ragged: bool = False,
) -> Kernel:
    """y = activation(bias + sum over blocks of input channels and taps of x * w), for `blocks` blocks, in chunks.

    A work unit is one tile of output channels x one block of rows; rows are counted over all images. `k_tiles` counts
    the tiles of all `phases`: convolutions of the same x whose results lie between each other, `across` of them from
    left to right. Between chunks of input channels the sums rest in y. `pixel` is the distance in x from one output
    pixel to the next. `loops` is how many axes of the window have more than one tap; if none, the weights of one block
    of input channels follow those of another. `written` are the lines if they are written out, for ARM, where LLVM
    would cut a loop over them badly; without, `ragged` says that they are no multiple of the lanes. Pointers x, w,
    bias, y; the float is the slope of leaky_relu.
    """
    v = vectors
    over = {"c": "T.min(chunk, blocks - chunk_index * chunk)", "th": "taps_h", "tw": "taps_w"}
    over = dict([*over.items()][: 1 + loops])
    x_tap, w_tap = (
        "".join(f" + {v.offset(tap)} * {v.offset(f'{o}_tap_{tap[1]}')}" for tap in [*over][1:]) for o in "xw"
    )
    at = f"(r // {v.per_block}) * {{}} + r % {v.per_block} * {v.width} + e"
    y_at = f"y[y0 + p * {v.offset('y_pixel')} + " + at.format(v.offset("y_block")) + "]"
    w_block = v.offset("w_block") if loops or not written else f"{written.lines * v.block}"

    def multiply(x_value: str, line: str, length: int) -> str:
        value = f"acc[p, r, e] + {x_value} * w[w0 + {line} * {v.block} + {at.format(v.offset('w_k'))}]"
        return _each(f"acc[p, r, e] = {value}", length, tile.blocks, v)

    def written_out(length: int, lines: Written) -> str:
        """Lines of a row of pixels in registers, then the products line by line."""
        end, text = (length - 1) * pixel + lines.lines, ""
        for turn in lines.turns:
            for q, place in lines.vectors(length, turn).items():
                many = min(v.lanes, end - q * v.lanes)  # the last vector must not read beyond the row
                loop = f"T.vectorized({v.lanes})" if many == v.lanes else f"T.unroll({many})"
                text += f"for j in {loop}:\n    xv[{place}, j] = x[x1 + {q * v.lanes} + j]\n"
            for i in turn:
                text += multiply(f"xv[{lines.register(i, turn)}]", str(i), length)
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
y0: {v.index} = {v.offset("y_start")} + {v.offset(start)} * {v.offset("y_pixel")}
if chunk_index > 0:
    {indent(each(f"acc[p, r, e] = {y_at}"), 4)}
else:
    if with_bias > 0:
        {indent(each(f"acc[p, r, e] = bias[k_tile * {tile.blocks * v.block} + r * {v.width} + e]"), 8)}
    else:
        {indent(each("acc[p, r, e] = T.float32(0)"), 8)}
for {", ".join(over)} in T.grid({", ".join(over.values())}):
    x1: {v.index} = {v.offset(f"x_start + {start} * {pixel}")} + {v.offset("c")} * {v.offset("x_block")}{x_tap}
    w0: {v.index} = {v.offset("w_start")} + {v.offset("c")} * {w_block}{w_tap}
    {indent(next_tile(length), 4)}
    {indent(written_out(length, written) if written else looped(length), 4)}
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
            {indent(over_tiles(tile, "t", tile_body), 12)}
"""
    scratch: dict[str, tuple[tuple[int, ...], str]] = {
        "acc": ((tile.long, tile.blocks * v.per_block, v.width), "float32")
    }
    if v.lanes:
        scratch["xv"] = ((written.places(tile.long) if written else tile.long, v.lanes), "float32")
    suffix = (f"_{activation}" if activation else "") + ("_ragged" if ragged else "")
    lines = f"{written.lines}" + f"_{written.piece}" * bool(written.piece) if written else "0"
    return make_kernel(
        f"conv{loops}_p{pixel}_l{lines}_t{tile.tag}_{v.tag}{suffix}",
        pointers=dict.fromkeys(("x", "w", "bias", "y"), "float32"),
        body=body,
        ints=TAP_INTS,
        floats=("alpha",),
        scratch=scratch,
    )


@cache
def weight_gradient(
    *,
    vectors: Vectors,
    tile: Tile,
    pixel: int = 0,
    in_line: bool = False,
    window: bool = True,
    update: Arithmetic | None = None,
) -> Kernel:
    """dw = sum over rows and columns of x * dy, for the tiles of lines of every row of taps.

    A work unit is one part of the rows x one tile of output channels x `unit_blocks` blocks of input channels; a part
    writes its own dw, `d_part` elements from the next. Rows (over all images) are taken in outer chunks, for the outer
    cache, in which all units of a thread take their turn, and inner chunks, which the innermost cache holds; between
    inner chunks the sums rest in dw. With `pixel` > 0, that is the distance in x from one pixel to the next, in dy it
    is a block, and several pixels are written out. `in_line`: all rows are `x_row` and `y_row` apart, as those of a
    single image are; `window`: there is more than one tap. With `update` there is one row, and the arrays that the
    update changes, which lie like dw, take its place: dw itself is nowhere. Pointers x, dy, dw (or those arrays and
    the update's controls).
    """
    v = vectors
    turn = max(1, WRITTEN_PRODUCTS // (tile.long * tile.blocks * v.per_block)) if pixel else 1
    x_pixel, y_pixel = (str(pixel), str(v.block)) if pixel else ("x_pixel", "y_pixel")
    at = f"(r // {v.per_block}) * {{}} + r % {v.per_block} * {v.width} + {{}}"

    def tile_body(length: int, start: str) -> str:
        line = f"d0 + ({start} + p) * {v.block}"
        d_at = f"dw[{line} + {at.format(v.offset('d_k'), 'e')}]"

        def each(statement: str) -> str:
            return _each(statement, length, tile.blocks, v)

        def work(at_pixel: int) -> str:
            x_at = f"x1 + {at_pixel * pixel}"
            y_at = f"dy[y0 + {at_pixel * v.block} + {at.format(v.offset('y_block'), 'e')}]"
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
    x1: {v.index} = x0 + {v.offset("column")} * {x_pixel}
    y0: {v.index} = y_start + {v.offset("column")} * {y_pixel}
    {indent(work(0), 4)}
"""
        in_turns = f"""
for q in T.serial(T.truncdiv(columns, {turn})):
    x1: {v.index} = x0 + {v.offset("q")} * {turn * pixel}
    y0: {v.index} = y_start + {v.offset("q")} * {turn * v.block}
    {indent("".join(work(i) for i in range(turn)), 4)}
"""
        row = (in_turns if turn > 1 else "") + one_by_one
        rows = f"""
for h in T.serial(row_start, row_stop):
    x0: {v.index} = {v.offset(f"x_start + {start}")} + {v.offset("h")} * {v.offset("x_row")}
    y_start: {v.index} = {v.offset("y_tile")} + {v.offset("h")} * {v.offset("y_row")}
    {indent(row, 4)}
"""
        rows_of_images = f"""
first_image: T.int32 = T.truncdiv(row_start, height)
for i in T.serial(T.truncdiv(row_stop + height - 1, height) - first_image):
    image: T.int32 = first_image + i
    h_start: T.int32 = T.max(row_start - image * height, 0)
    for j in T.serial(T.min(row_stop - image * height, height) - h_start):
        h: T.int32 = h_start + j
        x0: {v.index} = {v.offset(f"x_start + image * x_image + h * x_row + {start}")}
        y_start: {v.index} = {v.offset("y_tile + image * y_image + h * y_row")}
        {indent(row, 8)}
"""
        begin, end = each("acc[p, r, e] = T.float32(0)"), each(f"{d_at} = acc[p, r, e]")
        if update:
            end = updated(update, length, f"{line} + {at.format(v.offset('d_k'), 'v')}")
        else:
            begin = f"""
if first > 0:
    {indent(begin, 4)}
else:
    {indent(each(f"acc[p, r, e] = {d_at}"), 4)}
"""
        return f"{begin}\n{rows if in_line else rows_of_images}\n{end}"

    def updated(update: Arithmetic, length: int, element: str) -> str:
        places = {"g": "acc[p, r, v]"} | {name: f"{name}[{element}]" for name in update.changed}
        statements = [statement.format_map(places) for statement in update.statements]
        return f"""
for p in T.unroll({length}):
    for r in T.unroll({tile.blocks * v.per_block}):
        {indent(each_vector(statements, v.width), 8)}
"""

    tap = f"""
x_start: T.int32 = c_block * x_block{{}}
d0: {v.index} = {v.offset("d_start")} + {v.offset("c_block")} * {v.offset("d_block")}{{}}
{over_tiles(tile, "t", tile_body)}
"""
    d_tap = v.offset(f"(th * taps_w + tw) * lines * {v.block}")
    over_taps = f"""
for th, tw in T.grid(taps_h, taps_w):
    {indent(tap.format(" + th * x_tap_h + tw * x_tap_w", f" + {d_tap}"), 4)}
"""
    body = f"""
for outer in T.serial(T.truncdiv(part_rows + outer_rows - 1, outer_rows)):
    for unit in T.serial(lo, hi):
        turns: T.int32 = T.truncdiv(c_blocks + unit_blocks - 1, unit_blocks)
        part: T.int32 = T.truncdiv(unit, k_tiles * turns)
        k_tile: T.int32 = T.truncmod(T.truncdiv(unit, turns), k_tiles)
        c_start: T.int32 = T.truncmod(unit, turns) * unit_blocks
        c_stop: T.int32 = T.min(c_start + unit_blocks, c_blocks)
        part_stop: T.int32 = T.min(part * part_rows + part_rows, rows)
        outer_start: T.int32 = part * part_rows + outer * outer_rows
        outer_stop: T.int32 = T.min(outer_start + outer_rows, part_stop)
        y_tile: T.int32 = k_tile * {tile.blocks} * y_block
        d_start: T.int32 = part * d_part + k_tile * {tile.blocks} * d_k
        for inner in T.serial(T.truncdiv(outer_stop - outer_start + inner_rows - 1, inner_rows)):
            first: T.int32 = T.Select(outer + inner == 0, 1, 0)
            row_start: T.int32 = outer_start + inner * inner_rows
            row_stop: T.int32 = T.min(row_start + inner_rows, outer_stop)
            for c_block in T.serial(c_start, c_stop):
                {indent(over_taps if window else tap.format("", ""), 16)}
"""
    scratch: dict[str, tuple[tuple[int, ...], str]] = {
        "acc": ((tile.long, tile.blocks * v.per_block, v.width), "float32")
    }
    if v.lanes:
        scratch["xv"] = ((max(tile.long // v.lanes, 1), v.lanes), "float32")
    if update:
        scratch |= {f"t{i}": ((v.width,), "float32") for i in range(update.scratch)}
    return make_kernel(
        f"conv_gradient{'_window' * window}{'_in_line' * in_line}_p{pixel}_t{tile.tag}_{v.tag}"
        + (f"_{update.name}" if update else ""),
        pointers=dict.fromkeys(("x", "dy", *((*update.changed, *update.controls) if update else ("dw",))), "float32"),
        body=body,
        ints=(*GRADIENT_INTS, *(("zero",) if update else ())),
        floats=update.floats if update else (),
        scratch=scratch,
    )
