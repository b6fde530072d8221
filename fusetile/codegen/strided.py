"""Kernels that go over boxes element by element, whatever the buffers' pitch, border and block.

A box is a nest of loops over contiguous runs. Where the runs of all operands are adjacent they are joined, so that a
whole buffer becomes one run; a long run is cut into rows again, so that threads can share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from fusetile.box import Box, extents, view4
from fusetile.codegen.calls import Kernel, KernelCall, Ref, indented, make_kernel, ref, vectors
from fusetile.errors import PlanError
from fusetile.program import Buffer

LANES = 8
UNIT_elements = 4096
_NEST = ("middles", "rows", "band", "run", "tail")


@dataclass(frozen=True, slots=True)
class Nest:
    """outers x middles x rows runs of `run` elements (the last row: `tail`); per operand the strides of the three."""

    outers: int
    middles: int
    rows: int
    run: int
    tail: int
    strides: tuple[tuple[int, int, int], ...]

    @property
    def band(self) -> int:
        """Rows in a unit of work."""
        return max(1, min(self.rows, UNIT_elements // self.run))

    @property
    def units(self) -> int:
        """How many units of work there are."""
        return self.outers * self.middles * -(-self.rows // self.band)

    @property
    def ints(self) -> tuple[int, ...]:
        """The kernel's integer arguments."""
        return (self.middles, self.rows, self.band, self.run, self.tail, *(s for three in self.strides for s in three))


def nest_of(operands: Sequence[tuple[Buffer, Box]]) -> Nest:
    """The loops over boxes of equal extents in buffers of equal block, pad lanes included."""
    block = operands[0][0].block
    sizes = extents(view4(operands[0][1]))
    for buffer, box in operands:
        if buffer.block != block or extents(view4(box)) != sizes:
            raise PlanError(f"{buffer.name}: blocks {buffer.block} of {box} do not match {block} of {operands[0][1]}")
    b0, b1 = block
    counts = (-(-sizes[0] // b0), -(-sizes[1] // b1), sizes[2], sizes[3])
    dims = [
        (count, tuple(buffer.strides[axis] for buffer, _ in operands)) for axis, count in enumerate(counts) if count > 1
    ]
    run = b0 * b1
    while dims and all(stride == run for stride in dims[-1][1]):
        run *= dims.pop()[0]
    loops: list[tuple[int, tuple[int, ...]]] = []
    for count, strides in dims:
        if loops and all(outer == count * inner for outer, inner in zip(loops[-1][1], strides, strict=True)):
            loops[-1] = (loops[-1][0] * count, strides)
        else:
            loops.append((count, strides))
    tail = run
    if len(loops) < 3 and run > UNIT_elements:
        rows = -(-run // UNIT_elements)
        loops.append((rows, (UNIT_elements,) * len(operands)))
        run, tail = UNIT_elements, run - (rows - 1) * UNIT_elements
    loops = [(1, (0,) * len(operands))] * (3 - len(loops)) + loops
    (outers, _), (middles, _), (rows, _) = loops
    return Nest(outers, middles, rows, run, tail, tuple(zip(*(strides for _, strides in loops), strict=True)))


def strided_kernel(
    symbol: str,
    *,
    operands: Mapping[str, str],
    statements: Sequence[str],
    constants: Mapping[str, str] | None = None,
    more_ints: Sequence[str] = (),
    floats: Sequence[str] = (),
    scratch: Mapping[str, str] | None = None,
    before_unit: str = "",
    after_unit: str = "",
    aliased: bool = False,
) -> Kernel:
    """A kernel that executes `statements` on every element of a nest.

    `operands` maps names to dtypes; a statement says {X} for the current element of operand X, and v for the lane of
    `scratch` arrays. `constants` are further pointers, indexed by the statements themselves. `before_unit` and
    `after_unit` are statements around every work unit u.
    """
    ints = [*_NEST, *(f"{name}_{level}" for name in operands for level in ("outer", "middle", "row"))]
    ints += more_ints
    at = {
        name: f"{name}[outer * {name}_outer + middle * {name}_middle + row * {name}_row + element + v]"
        for name in operands
    }
    lines = [statement.format_map(at) for statement in statements]
    scalar = "".join(f"for v in T.serial(1):\n    {line}\n" for line in lines)
    body = f"""
for u in T.serial(lo, hi):
    bands: T.int32 = (rows + band - 1) // band
    outer: T.int32 = u // bands // middles
    middle: T.int32 = u // bands % middles
{indented(before_unit, 1)}
    for r in T.serial(T.min(band, rows - u % bands * band)):
        row: T.int32 = u % bands * band + r
        length: T.int32 = T.if_then_else(row == rows - 1, tail, run)
        for i in T.serial(length // {LANES}):
            element: T.int32 = i * {LANES}
{indented(vectors(lines, LANES), 3)}
        for i in T.serial(length % {LANES}):
            element: T.int32 = length // {LANES} * {LANES} + i
{indented(scalar, 3)}
{indented(after_unit, 1)}
"""
    return make_kernel(
        symbol,
        pointers={**operands, **(constants or {})},
        ints=ints,
        floats=floats,
        scratch={name: ((LANES,), dtype) for name, dtype in (scratch or {}).items()},
        body=body,
        aliased=aliased,
    )


def strided_call(
    kernel: Kernel,
    operands: Sequence[tuple[Buffer, Box]],
    *,
    constants: Sequence[Ref] = (),
    more_ints: Sequence[int] = (),
    floats: Sequence[float] = (),
) -> KernelCall:
    """The call of a strided kernel on boxes, one per operand."""
    nest = nest_of(operands)
    pointers = (*(ref(buffer, box) for buffer, box in operands), *constants)
    return KernelCall(kernel, nest.units, pointers, (*nest.ints, *more_ints), tuple(floats))


def plane(buffer: Buffer) -> tuple[int, int]:
    """How many [rows, pitch, b1, b0] planes a buffer has, and the elements of one."""
    s0, s1, *rest = buffer.storage_shape
    return s0 * s1, prod(rest)
