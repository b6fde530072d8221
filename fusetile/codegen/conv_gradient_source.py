"""TVMScript of the weight gradient of convolutions and fully connected layers: dw = sum over pixels of x * dy.

As in conv_source, a kernel is dynamic in all sizes and strides, in elements, and static in its register tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from fusetile.codegen.calls import Kernel, make_kernel
from fusetile.codegen.calls import vectors as each_vector
from fusetile.codegen.register_tile import Tile, Vectors, each_element, indent, over_tiles, registers
from fusetile.codegen.update import Arithmetic

GRADIENT_INTS = (
    *("k_tiles", "c_blocks", "unit_blocks", "part_rows", "outer_rows", "inner_rows", "rows", "height", "columns"),
    *("long_tiles", "short_tiles", "taps_h", "taps_w", "lines"),
    *("x_image", "x_block", "x_row", "x_pixel", "x_tap_h", "x_tap_w"),
    *("y_image", "y_block", "y_row", "y_pixel", "d_part", "d_k", "d_block"),
)
UPDATING_INTS = ("zero",)  # besides, with an update
WRITTEN_PRODUCTS = 64  # vectors that a written out turn of a weight gradient multiplies


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
    return _Gradient(vectors, tile, pixel, in_line, window, update).kernel()


@dataclass(frozen=True, slots=True)
class _Gradient:
    """The kernel's text, from the innermost loop outwards; the fields are the arguments of `weight_gradient`."""

    v: Vectors
    tile: Tile
    pixel: int
    in_line: bool
    window: bool
    update: Arithmetic | None

    def each(self, statement: str, length: int) -> str:
        return each_element(statement, length, self.tile.blocks, self.v)

    def at(self, block: str, lane: str) -> str:
        """A lane of register r, in an array whose channel blocks are `block` apart."""
        v = self.v
        return f"(r // {v.per_block}) * {v.offset(block)} + r % {v.per_block} * {v.width} + {lane}"

    def products(self, length: int, number: int) -> str:
        """What pixel `number` of a turn adds to the sums."""
        v, x_at = self.v, f"x1 + {number * self.pixel}"
        y_at = f"dy[y0 + {number * v.block} + {self.at('y_block', 'e')}]"
        groups = length // v.lanes if v.lanes else 0
        grouped = groups * v.lanes
        text = ""
        if groups:
            text += f"""
for q in T.unroll({groups}):
    for j in T.vectorized({v.lanes}):
        xv[q, j] = x[{x_at} + q * {v.lanes} + j]
{self.each(f"acc[p, r, e] = acc[p, r, e] + xv[p // {v.lanes}, p % {v.lanes}] * {y_at}", grouped)}
"""
        if grouped < length:
            shifted = f"acc[{grouped} + p, r, e] = acc[{grouped} + p, r, e] + x[{x_at} + {grouped} + p] * {y_at}"
            text += self.each(shifted, length - grouped)
        return text

    def row(self, length: int) -> str:
        """All pixels of a row: as many turns of written out ones as there are, the others one by one."""
        v, turn = self.v, 1
        x_pixel, y_pixel = "x_pixel", "y_pixel"
        if self.pixel:
            turn = max(1, WRITTEN_PRODUCTS // (self.tile.long * self.tile.blocks * v.per_block))
            x_pixel, y_pixel = str(self.pixel), str(v.block)
        one_by_one = f"""
for column in T.serial({f"T.truncdiv(columns, {turn}) * {turn}" if turn > 1 else "0"}, columns):
    x1: {v.index} = x0 + {v.offset("column")} * {x_pixel}
    y0: {v.index} = y_start + {v.offset("column")} * {y_pixel}
    {indent(self.products(length, 0), 4)}
"""
        if turn == 1:
            return one_by_one
        in_turns = f"""
for q in T.serial(T.truncdiv(columns, {turn})):
    x1: {v.index} = x0 + {v.offset("q")} * {turn * self.pixel}
    y0: {v.index} = y_start + {v.offset("q")} * {turn * v.block}
    {indent("".join(self.products(length, i) for i in range(turn)), 4)}
"""
        return in_turns + one_by_one

    def rows(self, length: int, start: str) -> str:
        """All rows of an inner chunk."""
        v, row = self.v, self.row(length)
        if self.in_line:
            return f"""
for h in T.serial(row_start, row_stop):
    x0: {v.index} = {v.offset(f"x_start + {start}")} + {v.offset("h")} * {v.offset("x_row")}
    y_start: {v.index} = {v.offset("y_tile")} + {v.offset("h")} * {v.offset("y_row")}
    {indent(row, 4)}
"""
        return f"""
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

    def sums(self, length: int, start: str) -> str:
        """The sums of one register tile: begun or continued, and stored, or taken by the update."""
        line = f"d0 + ({start} + p) * {self.v.block}"
        zeros, rows = self.each("acc[p, r, e] = T.float32(0)", length), self.rows(length, start)
        if self.update:
            end = self.updated(self.update, length, f"{line} + {self.at('d_k', 'v')}")
            return f"{zeros}\n{rows}\n{end}"
        d_at = f"dw[{line} + {self.at('d_k', 'e')}]"
        begin = f"""
if first > 0:
    {indent(zeros, 4)}
else:
    {indent(self.each(f"acc[p, r, e] = {d_at}", length), 4)}
"""
        return f"{begin}\n{rows}\n{self.each(f'{d_at} = acc[p, r, e]', length)}"

    def updated(self, update: Arithmetic, length: int, element: str) -> str:
        places = {"g": "acc[p, r, v]"} | {name: f"{name}[{element}]" for name in update.changed}
        statements = [statement.format_map(places) for statement in update.statements]
        return f"""
for p in T.unroll({length}):
    for r in T.unroll({self.tile.blocks * self.v.per_block}):
        {indent(each_vector(statements, self.v.width), 8)}
"""

    def tap(self, x_tap: str = "", d_tap: str = "") -> str:
        """A block of input channels, for one row of taps."""
        v = self.v
        return f"""
x_start: T.int32 = c_block * x_block{x_tap}
d0: {v.index} = {v.offset("d_start")} + {v.offset("c_block")} * {v.offset("d_block")}{d_tap}
{over_tiles(self.tile, "t", self.sums)}
"""

    def taps(self) -> str:
        if not self.window:
            return self.tap()
        d_tap = self.v.offset(f"(th * taps_w + tw) * lines * {self.v.block}")
        return f"""
for th, tw in T.grid(taps_h, taps_w):
    {indent(self.tap(" + th * x_tap_h + tw * x_tap_w", f" + {d_tap}"), 4)}
"""

    def body(self) -> str:
        return f"""
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
        y_tile: T.int32 = k_tile * {self.tile.blocks} * y_block
        d_start: T.int32 = part * d_part + k_tile * {self.tile.blocks} * d_k
        for inner in T.serial(T.truncdiv(outer_stop - outer_start + inner_rows - 1, inner_rows)):
            first: T.int32 = T.Select(outer + inner == 0, 1, 0)
            row_start: T.int32 = outer_start + inner * inner_rows
            row_stop: T.int32 = T.min(row_start + inner_rows, outer_stop)
            for c_block in T.serial(c_start, c_stop):
                {indent(self.taps(), 16)}
"""

    def kernel(self) -> Kernel:
        v, tile, update = self.v, self.tile, self.update
        temporaries = {f"t{i}": ((v.width,), "float32") for i in range(update.scratch if update else 0)}
        written = (*update.changed, *update.controls) if update else ("dw",)
        return make_kernel(
            f"conv_gradient{'_window' * self.window}{'_in_line' * self.in_line}_p{self.pixel}_t{tile.tag}_{v.tag}"
            + (f"_{update.name}" if update else ""),
            pointers=dict.fromkeys(("x", "dy", *written), "float32"),
            body=self.body(),
            ints=(*GRADIENT_INTS, *UPDATING_INTS) if update else GRADIENT_INTS,
            floats=update.floats if update else (),
            scratch=registers(tile, v, max(tile.long // max(v.lanes, 1), 1)) | temporaries,
        )
