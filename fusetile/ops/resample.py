"""Linear maps of rows and of columns: resizing, padding by reflection, slices with steps, and their gradients.

    y[n,k,h,w] = sum over taps i of row h, taps j of column w of  rows(h, i) * columns(w, j) * x[n,k,i,j]

The taps of every output row and column are a table, made while compiling. The gradient is the same op with the
transposed tables, so that whatever is written as taps is differentiated exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusetile.box import Box, Interval, extents
from fusetile.graph import BACKWARD, Graph, Op, Parameter, Tensor
from fusetile.ops.base import All, Along, Array, Attrs, Domain, Row, Spec, Tapped, element_axes, register


@dataclass(frozen=True, slots=True, repr=False)
class Taps:
    """Per output index, which inputs of `size` are read and their weights."""

    size: int
    index: tuple[tuple[int, ...], ...]
    weight: tuple[tuple[float, ...], ...]

    @classmethod
    def picking(cls, size: int, index: Sequence[int]) -> Taps:
        """Output i is input index[i], or zero where that is negative."""
        taps = [(at,) if at >= 0 else () for at in index]
        return cls(size, tuple(taps), tuple((1.0,) * len(tap) for tap in taps))

    @classmethod
    def weighted(cls, size: int, pairs: Sequence[Sequence[tuple[int, float]]]) -> Taps:
        """From (input, weight) pairs per output; those of one input are added, those of weight 0 left out."""
        index, weight = [], []
        for taps in pairs:
            total: dict[int, float] = {}
            for at, part in taps:
                total[at] = total.get(at, 0.0) + part
            kept = sorted((at, part) for at, part in total.items() if part)
            index.append(tuple(at for at, _ in kept))
            weight.append(tuple(part for _, part in kept))
        return cls(size, tuple(index), tuple(weight))

    def transposed(self) -> Taps:
        """The map of the gradient."""
        pairs: list[list[tuple[int, float]]] = [[] for _ in range(self.size)]
        for out, (index, weight) in enumerate(zip(self.index, self.weight, strict=True)):
            for at, part in zip(index, weight, strict=True):
                pairs[at].append((out, part))
        return Taps.weighted(len(self.index), pairs)

    def matrix(self, rows: Interval, columns: Interval) -> Array:
        """A part of the map as a dense matrix [outputs, inputs]."""
        found = np.zeros((rows[1] - rows[0], self.size))
        for i, out in enumerate(range(*rows)):
            found[i, list(self.index[out])] = self.weight[out]
        return found[:, slice(*columns)]

    def tables(self) -> tuple[Array, Array]:
        """(int32: where the taps of each output begin and the last end, then their inputs; float32: their weights)."""
        ends = np.cumsum([0, *map(len, self.index)])
        inputs = [at for taps in self.index for at in taps]
        weights = [part for taps in self.weight for part in taps]
        return np.array([*ends, *inputs], np.int32), np.array(weights or [0.0], np.float32)

    def __repr__(self) -> str:
        return f"{self.size}->{len(self.index)}"


def resample(
    graph: Graph, x: str, rows: Taps, columns: Taps, *, outputs: Sequence[str] | None = None, stem: str = "", **op: Any
) -> str:
    """Add the op, with its tables as parameters that are not trained; `op`: phase and origin."""
    names = [x]
    for taps, label in ((rows, "rows"), (columns, "columns")):
        for table, what in zip(taps.tables(), ("taps", "weights"), strict=True):
            name = graph.fresh(f"{outputs[0] if outputs else stem}.{label}.{what}")
            names.append(graph.add_parameter(name, Parameter(table, trainable=False)))
    attrs = {"rows": rows, "columns": columns}
    return graph.add("Resample", names, attrs=attrs, outputs=outputs, stem=stem, **op)[0]


def _domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, access = element_axes(outputs[0])
    x = inputs[0].shape
    maps = [Tapped(axis, attrs[key].size, attrs[key].index) for axis, key in (("h", "rows"), ("w", "columns"))]
    tables = [(All(tensor.shape[0]),) for tensor in inputs[1:]]
    return Domain(axes, ((Along("n", x[0]), Along("k", x[1]), *maps), *tables), (access,))


def _resample(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    x, need, written = inputs[0], domain.need(box, 0), domain.output(box)
    if not x.size:
        return [np.zeros(extents(written), x.dtype)]
    for dim, key in ((2, "rows"), (3, "columns")):
        matrix = op.attrs[key].matrix(written[dim], need[dim]).astype(x.dtype)
        x = np.moveaxis(np.tensordot(x, matrix, (dim, 1)), -1, dim)
    return [x]


def _vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    assert grads[0] is not None
    taps: Mapping[str, Taps] = op.attrs
    back = [taps[key].transposed() for key in ("rows", "columns")]
    dx = resample(graph, grads[0], *back, stem=f"grad.{op.inputs[0]}", phase=BACKWARD, origin=op.origin)
    return [dx, *(None for _ in op.inputs[1:])]


def _shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    return [Spec((*inputs[0].shape[:2], len(attrs["rows"].index), len(attrs["columns"].index)), inputs[0].dtype)]


register(Row("Resample", _shape, _domain, _resample, _vjp, flops=lambda attrs, inputs: 4.0, kernel="resample"))
