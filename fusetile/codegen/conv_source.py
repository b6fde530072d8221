"""TVMScript of the tap convolution: y = activation(bias + sum over taps of x * w). It computes forward convolutions,
input gradients and fully connected layers.

A kernel is dynamic in all sizes and strides and static in its register tile, so that one kernel serves every layer with
that tile, whatever its window, forward as well as backward. Strides are in elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from fusetile.codegen.calls import Kernel, make_kernel, prefetch
from fusetile.codegen.register_tile import ACTIVATIONS, LINE, Tile, Vectors, each_element, indent, over_tiles, registers

TAP_INTS = (
    *("channels_outer", "k_tiles", "row_blocks", "block_rows", "rows", "height", "long_tiles", "short_tiles"),
    *("chunk", "blocks", "taps_h", "taps_w", "lines", "with_bias", "phases", "across"),
    *("x_image", "x_block", "x_row", "x_tap_h", "x_tap_w"),
    *("w_k", "w_block", "w_tap_h", "w_tap_w", "w_phase"),
    *("y_image", "y_block", "y_row", "y_pixel", "y_down", "y_across"),
)


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
    return _TapConvolution(vectors, tile, pixel, loops, written, activation, ragged).kernel()


@dataclass(frozen=True, slots=True)
class _TapConvolution:
    """The kernel's text, from the innermost loop outwards; the fields are the arguments of `tap_convolution`."""

    v: Vectors
    tile: Tile
    pixel: int
    loops: int
    written: Written | None
    activation: str
    ragged: bool

    def each(self, statement: str, length: int) -> str:
        return each_element(statement, length, self.tile.blocks, self.v)

    def at(self, block: str) -> str:
        """Element e of register r, in an array whose channel blocks are `block` apart."""
        v = self.v
        return f"(r // {v.per_block}) * {v.offset(block)} + r % {v.per_block} * {v.width} + e"

    def multiply(self, x_value: str, line: str, length: int) -> str:
        w_at = f"w[w0 + {line} * {self.v.block} + {self.at('w_k')}]"
        return self.each(f"acc[p, r, e] = acc[p, r, e] + {x_value} * {w_at}", length)

    def written_out(self, length: int, lines: Written) -> str:
        """Lines of a row of pixels in registers, then the products line by line."""
        v, end, text = self.v, (length - 1) * self.pixel + lines.lines, ""
        for turn in lines.turns:
            for q, place in lines.vectors(length, turn).items():
                many = min(v.lanes, end - q * v.lanes)  # the last vector must not read beyond the row
                loop = f"T.vectorized({v.lanes})" if many == v.lanes else f"T.unroll({many})"
                text += f"for j in {loop}:\n    xv[{place}, j] = x[x1 + {q * v.lanes} + j]\n"
            for i in turn:
                text += self.multiply(f"xv[{lines.register(i, turn)}]", str(i), length)
        return text

    def looped(self, length: int) -> str:
        """The products in a loop over lines, with lanes over vectors of them."""
        v = self.v
        one = f"""
for i in T.serial({f"T.truncdiv(lines, {v.lanes}) * {v.lanes}" if v.lanes else "0"}, lines):
    {indent(self.multiply(f"x[x1 + p * {self.pixel} + i]", "i", length), 4)}
"""
        if not v.lanes:
            return one
        return f"""
for q in T.serial(T.truncdiv(lines, {v.lanes})):
    for p in T.unroll({length}):
        for j in T.vectorized({v.lanes}):
            xv[p, j] = x[x1 + p * {self.pixel} + q * {v.lanes} + j]
    for j in T.unroll({v.lanes}):
        {indent(self.multiply("xv[p, j]", f"(q * {v.lanes} + j)", length), 8)}
{one if self.ragged else ""}
"""

    def next_tile(self, length: int) -> str:
        """Asks for the pixels after these of the same channels: a block's pixels are too few, and blocks too far apart,
        for a processor to foresee. Left out for ARM, whose loads of vectors leave no time for it."""
        addresses = [f"x[x1 + {length * self.pixel + i}]" for i in range(0, length * self.pixel, LINE)]
        return "" if self.v.lanes else prefetch(*addresses)

    def start(self, y_at: str, length: int) -> str:
        """The sums so far, or the bias, or zeros."""
        bias = f"bias[k_tile * {self.tile.blocks * self.v.block} + r * {self.v.width} + e]"
        return f"""
if chunk_index > 0:
    {indent(self.each(f"acc[p, r, e] = {y_at}", length), 4)}
else:
    if with_bias > 0:
        {indent(self.each(f"acc[p, r, e] = {bias}", length), 8)}
    else:
        {indent(self.each("acc[p, r, e] = T.float32(0)", length), 8)}
"""

    def store(self, y_at: str, length: int) -> str:
        """The sums, or after the last chunk what the activation makes of them."""
        store = self.each(f"{y_at} = acc[p, r, e]", length)
        if not self.activation:
            return store
        activated = ACTIVATIONS[self.activation].format("acc[p, r, e]")
        return f"""
if chunk_index == chunks - 1:
    {indent(self.each(f"{y_at} = {activated}", length), 4)}
else:
    {indent(store, 4)}
"""

    def sums(self, length: int, start: str) -> str:
        """One register tile."""
        v, written = self.v, self.written
        over = {"c": "T.min(chunk, blocks - chunk_index * chunk)", "th": "taps_h", "tw": "taps_w"}
        over = dict([*over.items()][: 1 + self.loops])
        x_tap, w_tap = (
            "".join(f" + {v.offset(tap)} * {v.offset(f'{o}_tap_{tap[1]}')}" for tap in [*over][1:]) for o in "xw"
        )
        w_block = f"{written.lines * v.block}" if written and not self.loops else v.offset("w_block")
        y_at = f"y[y0 + p * {v.offset('y_pixel')} + {self.at('y_block')}]"
        return f"""
y0: {v.index} = {v.offset("y_start")} + {v.offset(start)} * {v.offset("y_pixel")}
{self.start(y_at, length).strip()}
for {", ".join(over)} in T.grid({", ".join(over.values())}):
    x1: {v.index} = {v.offset(f"x_start + {start} * {self.pixel}")} + {v.offset("c")} * {v.offset("x_block")}{x_tap}
    w0: {v.index} = {v.offset("w_start")} + {v.offset("c")} * {w_block}{w_tap}
    {indent(self.next_tile(length), 4)}
    {indent(self.written_out(length, written) if written else self.looped(length), 4)}
{self.store(y_at, length)}
"""

    def body(self) -> str:
        return f"""
for unit in T.serial(lo, hi):
    turn: T.int32 = T.truncmod(T.truncdiv(unit, T.Select(channels_outer > 0, row_blocks, 1)), k_tiles)
    row_block: T.int32 = T.truncmod(T.truncdiv(unit, T.Select(channels_outer > 0, 1, k_tiles)), row_blocks)
    k_tile: T.int32 = T.truncdiv(turn, phases)
    phase: T.int32 = T.truncmod(turn, phases)
    y_phase: T.int32 = T.truncdiv(phase, across) * y_down + T.truncmod(phase, across) * y_across
    chunks: T.int32 = T.truncdiv(blocks + chunk - 1, chunk)
    for chunk_index in T.serial(chunks):
        w_start: T.int32 = k_tile * {self.tile.blocks} * w_k + phase * w_phase + chunk_index * chunk * w_block
        for row in T.serial(row_block * block_rows, T.min(row_block * block_rows + block_rows, rows)):
            image: T.int32 = T.truncdiv(row, height)
            h: T.int32 = T.truncmod(row, height)
            x_start: T.int32 = image * x_image + h * x_row + chunk_index * chunk * x_block
            y_start: T.int32 = image * y_image + h * y_row + k_tile * {self.tile.blocks} * y_block + y_phase
            {indent(over_tiles(self.tile, "t", self.sums), 12)}
"""

    def kernel(self) -> Kernel:
        v, tile, written = self.v, self.tile, self.written
        suffix = (f"_{self.activation}" if self.activation else "") + ("_ragged" if self.ragged else "")
        lines = f"{written.lines}" + f"_{written.piece}" * bool(written.piece) if written else "0"
        return make_kernel(
            f"conv{self.loops}_p{self.pixel}_l{lines}_t{tile.tag}_{v.tag}{suffix}",
            pointers=dict.fromkeys(("x", "w", "bias", "y"), "float32"),
            body=self.body(),
            ints=TAP_INTS,
            floats=("alpha",),
            scratch=registers(tile, v, written.places(tile.long) if written else tile.long),
        )
