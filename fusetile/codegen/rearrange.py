"""Reshapes and transposes: every element comes from an index written in other digits.

Vector by vector of the output, so that each is written once. Its lanes come from one vector of the input, or from
addresses at one distance, or each from its own. Which of these, and the sizes of digits, are constants in the kernel:
divisions become multiplications, and what the innermost loop does not change is worked out before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusetile.box import extents, view4
from fusetile.codegen.calls import KernelCall, Lowered, indented, make_kernel, ref
from fusetile.codegen.job import Job
from fusetile.errors import PlanError
from fusetile.ops.base import Digits

_AXES = "nchw"
_STRIDES = ("image", "block", "row", "pixel")
_INTS = (
    *("images", "channels", "height", "width"),
    *("unit_images", "unit_rows", "blocks", "bands"),
    *(f"{of}_{axis}" for of in "yx" for axis in _AXES),
    *(f"{of}_{stride}" for of in "YX" for stride in _STRIDES),
)
_UNIT_PIXELS = 16  # of a work unit, at least: few enough that the lines of all its lanes stay in the nearest cache


@dataclass(frozen=True, slots=True)
class _Term:
    """times * (index along an axis of the output // inner % size), a part of an index of the input; `size` 0 if the
    index never reaches it."""

    axis: str
    inner: int
    size: int
    times: int

    @property
    def label(self) -> str:
        return f"{self.axis}{self.inner}x{self.size}x{self.times}"

    def text(self, lane: str = "") -> str:
        digit = _divided(f"({self.axis} + y_{self.axis}{lane})", self.inner)
        if self.size:
            power = not self.size & (self.size - 1)
            digit = f"({digit} % {self.size})" if power else f"T.truncmod({digit}, {self.size})"
        return f"{digit} * {self.times}"

    def still(self, lanes: int) -> bool:
        """Whether it is the same for all lanes of a vector of the output."""
        return self.axis != "c" or self.inner % lanes == 0

    def steady(self, lanes: int) -> bool:
        """Whether it grows by `times` from lane to lane."""
        return self.axis == "c" and self.inner == 1 and self.size % lanes == 0


def lower_rearrange(job: Job) -> Lowered:
    """A work unit is some pixels of a block of channels, the lanes that pad the last block included."""
    source, result, part, written = job.inputs[0], job.output, job.need(0), job.written()
    if source.dtype != "float32" or result.dtype != "float32":
        raise PlanError(f"{source.name} of {source.dtype} can't be rearranged: only float32 can")
    # where the dimensions of a tensor of fewer lie among the four of its storage
    names = {axis.name: _AXES[_place(len(written), i)] for i, axis in enumerate(job.domain.axes)}
    sizes = {axis.name: axis.size for axis in job.domain.axes}
    index: dict[str, list[_Term]] = {axis: [] for axis in _AXES}
    for i, dim in enumerate(job.domain.reads[0]):
        assert isinstance(dim, Digits)
        terms = (_Term(names[a], inner, size * (inner * size < sizes[a]), times) for a, inner, size, times in dim.terms)
        index[_AXES[_place(len(part), i)]] = sorted(terms, key=lambda term: _AXES.index(term.axis))
    xl, yl = source.block[1], result.block[1]
    label = "__".join("_".join(term.label for term in index[axis]) or "0" for axis in _AXES)
    kernel = make_kernel(
        f"rearrange_{xl}_{yl}_{label}",
        pointers={"X": "float32", "Y": "float32"},
        ints=_INTS,
        body=_body(index, xl, yl),
    )
    images, channels, height, width = extents(view4(written))
    unit_rows = min(height, -(-_UNIT_PIXELS // width))
    unit_images = min(images, -(-_UNIT_PIXELS // (unit_rows * width)))
    blocks, bands = -(-channels // yl), -(-height // unit_rows)
    origins = [start for start, _ in (*view4(written), *view4(part))]
    # X points to the block in which the part begins: its first channel may lie within it
    first = view4(source.box)[1][0]
    origins[5] = first + (origins[5] - first) // xl * xl
    aligned = (part[0], (origins[5], part[1][1]), *part[2:]) if len(part) > 1 else ((origins[5], part[0][1]),)
    ints = (images, channels, height, width, unit_images, unit_rows, blocks, bands)
    values = (*ints, *origins, *result.strides, *source.strides)
    units = -(-images // unit_images) * bands * blocks
    return Lowered((KernelCall(kernel, units, (ref(source, aligned), ref(result, written)), values),))


def _body(index: dict[str, list[_Term]], xl: int, yl: int) -> str:
    """Pixels within lanes where a block is not full: their number varies, and most of the lines stay in the cache."""
    stride = _lane_stride(index, xl, yl)
    if stride:
        start, lane = _address(index, xl, yl, ""), f"start + v * {stride}"
    else:
        start, lane = "0", _address(index, xl, yl, " + v")
    if stride == "1":
        whole = f"for v in T.vectorized({yl}):\n    Y[at + v] = X[start + v]"
    else:
        whole = f"for v in T.unroll({yl}):\n    Y[at + v] = X[{lane}]"
    return f"""
for u in T.serial(lo, hi):
    c: T.int32 = u % blocks * {yl}
    first_h: T.int32 = u // blocks % bands * unit_rows
    first_n: T.int32 = u // blocks // bands * unit_images
    lanes: T.int32 = T.min(channels - c, {yl})
    if lanes == {yl}:
{indented(_pixels(start, whole, yl), 2)}
    else:
        for v in T.serial(lanes):
{indented(_pixels(start, f"Y[at + v] = X[{lane}]", yl), 3)}
        for v in T.serial({yl} - lanes):
{indented(_pixels("0", "Y[at + lanes + v] = T.float32(0)", yl), 3)}
"""


def _pixels(start: str, statements: str, yl: int) -> str:
    """The statements for every pixel of a work unit."""
    return f"""
for i in T.serial(T.min(unit_images, images - first_n)):
    for r in T.serial(T.min(unit_rows, height - first_h)):
        for w in T.serial(width):
            n: T.int32 = first_n + i
            h: T.int32 = first_h + r
            at: T.int32 = n * Y_image + c // {yl} * Y_block + h * Y_row + w * Y_pixel
            start: T.int32 = {start}
{indented(statements, 3)}
"""


def _lane_stride(index: dict[str, list[_Term]], xl: int, yl: int) -> str:
    """Elements from the source of a lane to that of the next, as text; none if they differ."""
    moving = [(axis, term) for axis in _AXES for term in index[axis] if not term.still(yl)]
    if not moving:
        return "0"
    axis, term = moving[0]
    if len(moving) > 1 or not term.steady(yl):
        return ""
    if axis != "c":
        return f"{term.times} * X_{_STRIDES[_AXES.index(axis)]}"
    if term.times % xl == 0:
        return f"{term.times // xl} * X_block"
    aligned = all(other.times % xl == 0 for other in index["c"] if other is not term)
    return "1" if term.times == 1 and aligned and xl % yl == 0 else ""


def _address(index: dict[str, list[_Term]], xl: int, yl: int, lane: str) -> str:
    """Where in X the element of a lane is."""
    at = {
        axis: " + ".join([*(t.text("" if t.still(yl) else lane) for t in index[axis]), f"0 - x_{axis}"])
        for axis in _AXES
    }
    return (
        f"({at['n']}) * X_image + ({at['c']}) // {xl} * X_block + ({at['c']}) % {xl}"
        f" + ({at['h']}) * X_row + ({at['w']}) * X_pixel"
    )


def _divided(text: str, size: int) -> str:
    """An index that is never negative over a constant."""
    if size == 1:
        return text
    return f"({text} // {size})" if not size & (size - 1) else f"T.truncdiv({text}, {size})"


def _place(rank: int, dimension: int) -> int:
    """Which of the four dimensions of storage a dimension is: vectors lie along the channels."""
    return 1 if rank == 1 else dimension
