"""The op table's columns: iteration domains, what they read and write, and `Row`.

An op iterates over a domain of named axes. A *parallel* axis indexes the output; over a *reduction* axis the output is
a sum, so that devices with different parts of it hold partial outputs. Axis names are the same in every row, so that
one split ("n over 2, h over 3") means the same for a convolution, its input gradient and its weight gradient: `n`
batch, `k` output channel (the only channel of pooling and pointwise ops), `c` input channel, `h` and `w` rows and
columns.

What an iteration box reads and writes is data: per operand one `Dim` per tensor dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fusetile.box import Box, Interval, empty, volume
from fusetile.errors import PlanError

if TYPE_CHECKING:
    from fusetile.graph import Graph, Op, Tensor

Attrs = Mapping[str, Any]
Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of an iteration domain. `group`: its channels come in groups of so many, each of which goes with so
    many channels of another operand; it is cut only where a channel block begins in both."""

    name: str
    size: int
    kind: Literal["parallel", "reduction"] = "parallel"
    group: tuple[int, int] = (1, 1)


@dataclass(frozen=True, slots=True)
class All:
    """The whole dimension, whatever the iterations."""

    size: int

    def interval(self, iterations: Mapping[str, Interval]) -> Interval:
        return (0, self.size)


@dataclass(frozen=True, slots=True)
class Along:
    """Index = iteration of the axis, minus `offset`; `size` is that of the tensor's dimension."""

    axis: str
    size: int
    offset: int = 0

    def interval(self, iterations: Mapping[str, Interval]) -> Interval:
        start, stop = iterations[self.axis]
        return (start - self.offset, stop - self.offset)


@dataclass(frozen=True, slots=True)
class Window:
    """Index = axis * stride - pad + tap * dilation, for `taps` taps: what a convolution or a pool reads."""

    axis: str
    size: int
    taps: int
    stride: int = 1
    dilation: int = 1
    pad: int = 0

    def interval(self, iterations: Mapping[str, Interval]) -> Interval:
        start, stop = iterations[self.axis]
        return (
            start * self.stride - self.pad,
            (stop - 1) * self.stride - self.pad + self.dilation * (self.taps - 1) + 1,
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """The transpose of `Window`: the outputs whose windows hold the iterations [a, b) of the input,
    ceil((a + pad - dilation * (taps - 1)) / stride) up to and with floor((b - 1 + pad) / stride)."""

    axis: str
    size: int
    taps: int
    stride: int = 1
    dilation: int = 1
    pad: int = 0

    def interval(self, iterations: Mapping[str, Interval]) -> Interval:
        start, stop = iterations[self.axis]
        first = -(-(start + self.pad - self.dilation * (self.taps - 1)) // self.stride)
        return (first, (stop - 1 + self.pad) // self.stride + 1)


@dataclass(frozen=True, slots=True)
class Groups:
    """Every `per` iterations of the axis, begun or whole, go with `times` indices."""

    axis: str
    size: int
    per: int
    times: int = 1

    def interval(self, iterations: Mapping[str, Interval]) -> Interval:
        start, stop = iterations[self.axis]
        return (start // self.per * self.times, -(-stop // self.per) * self.times)


@dataclass(frozen=True, slots=True)
class Digits:
    """Index = sum over terms (axis, inner, size, times) of times * (iteration of the axis // inner % size): the digits
    of indices, written in other places."""

    terms: tuple[tuple[str, int, int, int], ...]
    size: int

    def interval(self, iterations: Mapping[str, Interval]) -> Interval:
        low = high = 0
        for axis, inner, size, times in self.terms:
            start, stop = iterations[axis]
            first, last = start // inner, (stop - 1) // inner
            wraps = last - first >= size or first % size > last % size
            low += 0 if wraps else times * (first % size)
            high += times * (size - 1 if wraps else last % size)
        return (low, high + 1)


@dataclass(frozen=True, slots=True)
class Tapped:
    """Iteration i of the axis reads the indices taps[i], if any."""

    axis: str
    size: int
    taps: tuple[tuple[int, ...], ...]

    def interval(self, iterations: Mapping[str, Interval]) -> Interval:
        start, stop = iterations[self.axis]
        read = [index for taps in self.taps[start:stop] for index in taps]
        return (min(read), max(read) + 1) if read else (0, 0)


Dim = All | Along | Window | Spread | Groups | Digits | Tapped
Access = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Domain:
    """An iteration domain: its axes, and per input and output the dimensions that an iteration touches. What boxes
    touch is remembered: a search for a plan asks for the same again and again."""

    axes: tuple[Axis, ...]
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    _touched: dict[tuple[bool, int, Box], Box] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def box(self) -> Box:
        """All iterations."""
        return tuple((0, axis.size) for axis in self.axes)

    def axis(self, name: str) -> int:
        """Position of an axis."""
        for i, axis in enumerate(self.axes):
            if axis.name == name:
                return i
        raise PlanError(f"no axis {name} in {[axis.name for axis in self.axes]}")

    def has(self, name: str) -> bool:
        """Whether there is such an axis."""
        return any(axis.name == name for axis in self.axes)

    def interval(self, box: Box, name: str) -> Interval:
        """The part of one axis that a box of iterations covers."""
        return box[self.axis(name)]

    def need(self, box: Box, i: int) -> Box:
        """The box of input `i` that a box of iterations reads, clipped to the tensor."""
        return self._touch(box, False, i)

    def output(self, box: Box, i: int = 0) -> Box:
        """The box of output `i` that a box of iterations writes."""
        return self._touch(box, True, i)

    def reach(self, box: Box, i: int) -> tuple[Interval, ...]:
        """Like `need`, not clipped: what lies outside the tensor is padding."""
        iterations = {axis.name: part for axis, part in zip(self.axes, box, strict=True)}
        return tuple(dim.interval(iterations) for dim in self.reads[i])

    def is_partial(self, box: Box) -> bool:
        """Whether the box leaves out part of a reduction axis, so that its output is a partial sum."""
        return any(a.kind == "reduction" and part != (0, a.size) for a, part in zip(self.axes, box, strict=True))

    def _touch(self, box: Box, written: bool, i: int) -> Box:
        found = self._touched.get((written, i, box))
        if found is None:
            found = self._touched[written, i, box] = self._clipped(box, (self.writes if written else self.reads)[i])
        return found

    def _clipped(self, box: Box, access: Access) -> Box:
        if volume(box) == 0:
            return empty(len(access))
        iterations = {axis.name: part for axis, part in zip(self.axes, box, strict=True)}
        clipped = []
        for dim in access:
            start, stop = dim.interval(iterations)
            clipped.append((max(start, 0), min(stop, dim.size)))
        return tuple(clipped) if all(a < b for a, b in clipped) else empty(len(access))


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape, dtype and kind of an output. `filter` tensors are convolution weights and what is shaped like them."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    kind: Literal["map", "filter"] = "map"


Reference = Callable[["Op", Domain, Box, Sequence[Array]], list[Array]]
Vjp = Callable[["Graph", "Op", Sequence["str | None"]], "list[str | None]"]


@dataclass(frozen=True, slots=True)
class Row:
    """One op kind.

    shape      (attrs, input tensors) -> a Spec per output; raises UserError on inputs that do not fit.
    domain     (attrs, input tensors, output tensors) -> Domain.
    reference  (op, domain, box, inputs) -> outputs, in numpy: `inputs[i]` is exactly the box `domain.need(box, i)`, the
               result exactly `domain.output(box, o)`; on a part of a reduction axis it is the partial sum.
    vjp        (graph, op, gradients of the outputs) -> gradients of the inputs (None where there is none), adding ops
               of phase backward to the graph. None if the op is never differentiated.
    flops      (attrs, input tensors) -> floating-point operations per iteration.
    kernel     the kernel family that code generation lowers it to; "elementwise" evaluates `expression`.
    padded     inputs that are read beyond the edge of the image, as zeros.
    in_place   pairs (output, input) that share storage: state that an update op rewrites.
    overwrites inputs in whose place the (first) output may be, if they have its shape: of each an element is read only
               for the same element of the output, before that is written. An `expression` may overwrite any input.
    """

    kind: str
    shape: Callable[[Attrs, Sequence[Tensor]], list[Spec]]
    domain: Callable[[Attrs, Sequence[Tensor], Sequence[Tensor]], Domain]
    reference: Reference
    vjp: Vjp | None = None
    flops: Callable[[Attrs, Sequence[Tensor]], float] = lambda attrs, inputs: 1.0
    kernel: str = ""
    expression: str = ""
    padded: tuple[int, ...] = ()
    in_place: tuple[tuple[int, int], ...] = ()
    overwrites: tuple[int, ...] = ()


ROWS: dict[str, Row] = {}


def register(row: Row) -> Row:
    """Add a row to the table."""
    if row.kind in ROWS:
        raise PlanError(f"two rows for op {row.kind}")
    ROWS[row.kind] = row
    return row


def row(kind: str) -> Row:
    """The row of an op kind."""
    return ROWS[kind]


def overwritten(graph: Graph, op: Op) -> tuple[str, ...]:
    """The inputs in whose place an op of a graph may write its output, the best first."""
    found = row(op.kind)
    indices = range(len(op.inputs)) if found.expression else found.overwrites
    result = graph.tensors[op.outputs[0]]
    alike = [(graph.tensors[op.inputs[i]], op.inputs[i]) for i in indices]
    return tuple(name for t, name in alike if (t.shape, t.dtype, t.kind) == (result.shape, result.dtype, result.kind))


def domain_of(graph: Graph, op: Op) -> Domain:
    """The iteration domain of an op of a graph."""
    known = graph.domains.get(op.name)
    if known is None or known[0] is not op:
        inputs, outputs = ([graph.tensors[name] for name in names] for names in (op.inputs, op.outputs))
        known = graph.domains[op.name] = (op, row(op.kind).domain(op.attrs, inputs, outputs))
    return known[1]


# -- what several rows share -----------------------------------------------------------------------------------------


def element_axes(tensor: Tensor) -> tuple[tuple[Axis, ...], Access]:
    """The axes over the elements of a tensor, and how it is indexed by them. The window of a filter is not cut. Three
    dimensions of integers are classes per pixel, without channels."""
    maps = {4: "nkhw", 3: "nhw" if tensor.dtype == "int32" else "nkh", 2: "nk", 1: "k"}
    names = maps[len(tensor.shape)] if tensor.kind == "map" else "kc"
    axes = tuple(Axis(name, size) for name, size in zip(names, tensor.shape, strict=False))
    access: list[Dim] = [Along(axis.name, axis.size) for axis in axes]
    return axes, (*access, *(All(size) for size in tensor.shape[len(axes) :]))


def channel_access(size: int) -> Access:
    """A vector [C], indexed by the output channel."""
    return (Along("k", size),)


def padded(domain: Domain, box: Box, i: int, array: Array) -> Array:
    """Input `i` with zeros where the box reaches beyond the tensor."""
    reach, need = domain.reach(box, i), domain.need(box, i)
    if volume(need) == 0:
        return np.zeros([max(stop - start, 0) for start, stop in reach], array.dtype)
    return np.pad(array, [(n0 - r0, r1 - n1) for (r0, r1), (n0, n1) in zip(reach, need, strict=True)])


def same_spec(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    """One output like the first input."""
    return [Spec(inputs[0].shape, inputs[0].dtype, inputs[0].kind)]
