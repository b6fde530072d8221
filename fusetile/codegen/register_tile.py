"""Register tiles: how channel blocks lie in vector registers, and the loops over a tile in TVMScript.

Local arrays that are indexed only by unrolled loops become registers. A *line* is one float of x that all output
channels share: the channels of a pixel or, where a row of taps is contiguous in x and in the weights, the channels of
all its taps.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass


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


ACTIVATIONS = {
    "": "{}",
    "relu": "T.Select({0} < T.float32(0), T.float32(0), {0})",  # what is no number stays
    "leaky_relu": "T.Select({0} > T.float32(0), {0}, {0} * alpha)",
}


def indent(text: str, spaces: int) -> str:
    """Indent all but the first line, for text that is put into a template after that many spaces."""
    return textwrap.indent(textwrap.dedent(text).strip("\n"), " " * spaces).lstrip(" ")


def each_element(statement: str, length: int, blocks: int, v: Vectors) -> str:
    """The statement for every pixel or line p and register r of a tile, vectorized over e."""
    return f"""
for p in T.unroll({length}):
    for r in T.unroll({blocks * v.per_block}):
        for e in T.vectorized({v.width}):
            {statement}
"""


def registers(tile: Tile, v: Vectors, loaded: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Local arrays: the sums of a tile, and if lines are loaded as vectors, so many of them."""
    shapes: dict[str, tuple[int, ...]] = {"acc": (tile.long, tile.blocks * v.per_block, v.width)}
    if v.lanes:
        shapes["xv"] = (loaded, v.lanes)
    return {name: (shape, "float32") for name, shape in shapes.items()}


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
