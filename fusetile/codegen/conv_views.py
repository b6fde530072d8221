"""What the convolution kernels see of buffers: start addresses, strides, taps, and the phases of an input gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fusetile.box import Box, Interval, contains, text, view4
from fusetile.codegen.calls import Ref
from fusetile.codegen.job import Job
from fusetile.errors import PlanError
from fusetile.ops.base import Attrs
from fusetile.program import Buffer

FLOAT_bytes = 4


@dataclass(frozen=True, slots=True)
class View:
    """Where a kernel starts in a buffer of maps, and its strides in elements: image, channel block, row, pixel."""

    start: Ref
    image: int
    block: int
    row: int
    pixel: int

    def ints(self, name: str) -> dict[str, int]:
        """The strides as a kernel's arguments, for an array of this name."""
        return {f"{name}_{key}": getattr(self, key) for key in ("image", "block", "row", "pixel")}

    def moved(self, elements: int) -> View:
        """The same, so many elements further on."""
        return replace(self, start=moved(self.start, elements))


@dataclass(frozen=True, slots=True)
class Filter:
    """Where a kernel starts in a buffer of weights, and its strides in elements: block of output channels, block of
    input channels, row of taps, tap. `lines` is the number of input channels in a block, `window` the taps."""

    start: Ref
    k: int
    block: int
    tap_h: int
    tap_w: int
    lines: int
    window: tuple[int, int]

    def ints(self, name: str) -> dict[str, int]:
        """The strides as a kernel's arguments, for an array of this name."""
        return {f"{name}_{key}": getattr(self, key) for key in ("k", "block", "tap_h", "tap_w")}

    @property
    def taps(self) -> int:
        return self.window[0] * self.window[1]


@dataclass(frozen=True, slots=True)
class Taps:
    """The window along rows and columns: how many taps, how far apart in the input, and how far apart in the input are
    the windows of neighbouring outputs."""

    count: tuple[int, int]
    step: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)


@dataclass(frozen=True, slots=True)
class Phases:
    """Convolutions of the same input with parts of the same weights, whose results lie between each other: how many,
    how many from left to right, and the elements from one to the next in the weights and, down and across, in y."""

    count: int = 1
    across: int = 1
    w: int = 0
    y_down: int = 0
    y_across: int = 0


WINDOW = {"strides": 1, "dilations": 1, "pads": 0}  # what a fully connected layer has
NO_TAPS = Taps((0, 0))
ALONE = Phases()


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of an input gradient along one axis.

    Outputs first, first + stride, ... (`count` of them, relative to the box) meet `taps` taps: those at `flipped`,
    flipped + every, ... of the flipped window; the first output reads dy at `source`, + step, ...
    """

    first: int
    stride: int
    count: int
    taps: int
    flipped: int
    every: int
    source: int
    step: int

    @property
    def touched(self) -> Interval:
        """The rows of dy that it reads."""
        return (self.source, self.source + (self.count - 1) + (self.taps - 1) * self.step + 1)


def moved(start: Ref, elements: int) -> Ref:
    """An address so many float32 further on."""
    return Ref(start.buffer, start.offset_bytes + FLOAT_bytes * elements)


def blocks(interval: Interval, block: int) -> int:
    """Channel blocks that an interval takes."""
    return -(-(interval[1] - interval[0]) // block)


def view(buffer: Buffer, touched: Box) -> View:
    """A view of a box of maps, whose rows and columns may lie in the buffer's border; PlanError if it holds less."""
    box = view4(touched)
    held = [
        (start - border, stop + border)
        for (start, stop), border in zip(view4(buffer.box), (0, 0, *buffer.border), strict=True)
    ]
    if not all(low <= start and stop <= high for (start, stop), (low, high) in zip(box, held, strict=True)):
        raise PlanError(f"{buffer.name} holds {text(buffer.box)} with a border of {buffer.border}, not {text(box)}")
    n, c, h, w = (start - origin for (start, _), (origin, _) in zip(box, view4(buffer.box), strict=True))
    if c % buffer.block[1]:
        raise PlanError(f"{buffer.name}: channel {box[1][0]} is at no block of {buffer.block[1]} in {text(buffer.box)}")
    image, block, row, pixel = buffer.strides
    elements = n * image + c // buffer.block[1] * block + (h + buffer.border[0]) * row + (w + buffer.border[1]) * pixel
    return View(Ref(buffer.name, FLOAT_bytes * elements), image, block, row, pixel)


def padded_view(job: Job) -> View:
    """A view of what is read of the first input, padding included; PlanError if the buffer lacks any of it."""
    buffer, need = job.operand(0)
    if not contains(buffer.box, need):
        raise PlanError(f"{buffer.name} holds {text(buffer.box)}, not {text(need)}")
    return view(buffer, job.reach(0))


def filter_view(buffer: Buffer, box: Box) -> Filter:
    """A view of weights."""
    window = (view4(box)[2][1], view4(box)[3][1])
    start = Ref(buffer.name, FLOAT_bytes * buffer.element(box))
    k, block, row, tap = buffer.strides
    return Filter(start, k, block, row, tap, buffer.block[1], window)


def taps_of(attrs: Attrs, window: tuple[int, int]) -> Taps:
    """The window of a forward convolution; a fully connected layer has one tap."""
    if "strides" not in attrs:
        return Taps((1, 1))
    return Taps(window, tuple(attrs["dilations"]), tuple(attrs["strides"]))


def phases(attrs: Attrs, axis: int, interval: Interval, window: int) -> Iterator[Phase]:
    """The phases of an input gradient for an interval of rows (axis 0) or columns (axis 1) of dx; a fully connected
    layer has one.

    dx[i] = sum of dy[(i + pad - dilation * r) / stride] over the taps r for which that divides.
    """
    stride, dilation, pad = (attrs[key][axis] if key in attrs else default for key, default in WINDOW.items())
    start, stop = interval
    for first in range(min(stride, stop - start)):
        row = start + first + pad
        count = -(-(stop - start - first) // stride)
        taps = [tap for tap in reversed(range(window)) if (row - dilation * tap) % stride == 0]
        if not taps:
            yield Phase(first, stride, count, 0, 0, 0, 0, 0)
            continue
        every = taps[0] - taps[1] if len(taps) > 1 else 1
        source = (row - dilation * taps[0]) // stride
        yield Phase(first, stride, count, len(taps), window - 1 - taps[0], every, source, dilation * every // stride)
