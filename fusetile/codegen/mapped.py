"""Kernels over blocked maps with one vector of channels at a time: what needs to know its channel, row or column.

A work unit is a band of rows of one channel block of one image. The statements see u, n, k (channel block), h (row) and
w (column), counted from the start of the box, and v (lane); {X} is the current element of map X.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusetile.box import Box, extents, view4
from fusetile.codegen.calls import Kernel, KernelCall, Ref, indented, make_kernel, ref
from fusetile.codegen.strided import UNIT_elements
from fusetile.program import Buffer

_LOOPS = ("images", "blocks", "rows", "columns", "band")


@dataclass(frozen=True, slots=True)
class Loops:
    """images x channel blocks x rows x columns, cut into bands of rows."""

    images: int
    blocks: int
    rows: int
    columns: int
    band: int

    @property
    def bands(self) -> int:
        """Bands per channel block and image."""
        return -(-self.rows // self.band)

    @property
    def units(self) -> int:
        """How many units of work there are."""
        return self.images * self.blocks * self.bands

    @property
    def ints(self) -> tuple[int, ...]:
        """The kernel's first integer arguments."""
        return (self.images, self.blocks, self.rows, self.columns, self.band)


def loops_over(box: Box, block: int, *, each: int = 1) -> Loops:
    """The loops over a box of a map whose channel block is `block`, for a kernel that reads `each` vectors per pixel;
    the bands depend on nothing else."""
    images, channels, rows, columns = extents(view4(box))
    band = max(1, min(rows, UNIT_elements // (columns * block * each)))
    return Loops(images, -(-channels // block), rows, columns, band)


def mapped_kernel(
    symbol: str,
    *,
    block: int,
    maps: Mapping[str, str],
    pixel: str,
    before_unit: str = "",
    before_row: str = "",
    after_unit: str = "",
    pointers: Mapping[str, str] | None = None,
    ints: Sequence[str] = (),
    floats: Sequence[str] = (),
    scratch: Mapping[str, str] | None = None,
) -> Kernel:
    """A kernel that executes `pixel` for every pixel of a unit, and the other statements where their names say.

    `maps` and `pointers` give dtypes, `scratch` those of vectors of `block` lanes. In `pixel`, {X} is
    the address of lane v. Maps advance with the loops: an operand with loops of its own goes among the pointers.
    """
    strides = [f"{name}_{axis}" for name in maps for axis in ("image", "block", "row")]
    at = {name: f"{name}[n * {name}_image + k * {name}_block + h * {name}_row + w * {block} + v]" for name in maps}
    body = f"""
for u in T.serial(lo, hi):
    bands: T.int32 = (rows + band - 1) // band
    n: T.int32 = u // bands // blocks
    k: T.int32 = u // bands % blocks
{indented(before_unit, 1)}
    for r in T.serial(T.min(band, rows - u % bands * band)):
        h: T.int32 = u % bands * band + r
{indented(before_row, 2)}
        for w in T.serial(columns):
{indented(pixel.format_map(at), 3)}
{indented(after_unit, 1)}
"""
    return make_kernel(
        f"{symbol}_{block}",
        pointers={**maps, **(pointers or {})},
        ints=[*_LOOPS, *strides, *ints],
        floats=floats,
        scratch={name: ((block,), dtype) for name, dtype in (scratch or {}).items()},
        body=body,
    )


def mapped_call(
    kernel: Kernel,
    loops: Loops,
    maps: Sequence[tuple[Buffer, Box]],
    *,
    pointers: Sequence[Ref] = (),
    ints: Sequence[int] = (),
    floats: Sequence[float] = (),
) -> KernelCall:
    """The call of a mapped kernel."""
    strides = [stride for buffer, _ in maps for stride in buffer.strides[:3]]
    refs = (*(ref(buffer, box) for buffer, box in maps), *pointers)
    return KernelCall(kernel, loops.units, refs, (*loops.ints, *strides, *ints), tuple(floats))
