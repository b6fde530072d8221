"""Products of matrices that both depend on the data, one for every image and head: attention.

    terms ("nkhc", "nkcw")      y[n,k,h,w] = sum over c of a[n,k,h,c] * b[n,k,c,w]      heads are channels
    terms ("nkhc", "nwhc")      y[n,k,h,w] = sum over c of a[n,k,h,c] * b[n,w,h,c]      heads are rows

`terms` names the axes of the operands as they are stored: those of the result are n, k, h and w, and c is summed over.
Of the axes that both operands have, images and heads, one of them may have one index that goes with all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusetile.box import Box
from fusetile.errors import UserError
from fusetile.graph import BACKWARD, Graph, Op, Tensor
from fusetile.ops.base import Access, All, Along, Array, Attrs, Axis, Dim, Domain, Row, Spec, register

RESULT = "nkhw"


def own_axis(term: str, other: str) -> str:
    """The axis that only the first of two operands has: the rows or columns of its matrices."""
    (own,) = set(term) - set(other)
    return own


def _sizes(attrs: Attrs, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Of every axis."""
    sizes: dict[str, int] = {}
    for term, x in zip(attrs["terms"], inputs, strict=True):
        for axis, size in zip(term, x.shape, strict=True):
            sizes[axis] = max(size, sizes.get(axis, 1))
    return sizes


def _shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    (a, b), sizes = inputs, _sizes(attrs, inputs)
    for term, x in zip(attrs["terms"], inputs, strict=True):
        if any(size != sizes[axis] and (axis == "c" or size != 1) for axis, size in zip(term, x.shape, strict=True)):
            raise UserError(f"{a.name!r} of shape {a.shape} and {b.name!r} of shape {b.shape} have no matrix product")
    return [Spec(tuple(sizes[axis] for axis in RESULT), a.dtype)]


def _operand(term: str, x: Tensor, sizes: dict[str, int]) -> Access:
    dims: list[Dim] = [
        Along(axis, size) if size == sizes[axis] else All(size) for axis, size in zip(term, x.shape, strict=True)
    ]
    return tuple(dims)


def _domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    sizes = _sizes(attrs, inputs)
    axes = (*(Axis(name, sizes[name]) for name in RESULT), Axis("c", sizes["c"], "reduction"))
    reads = tuple(_operand(term, x, sizes) for term, x in zip(attrs["terms"], inputs, strict=True))
    return Domain(axes, reads, (tuple(Along(name, sizes[name]) for name in RESULT),))


def _mat_mul(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    (a, b), (one, other) = inputs, op.attrs["terms"]
    rows, columns = own_axis(one, other), own_axis(other, one)
    images = [axis for axis in RESULT if axis not in (rows, columns)]
    left, right = [*images, rows, "c"], [*images, "c", columns]
    product = np.matmul(a.transpose([one.index(x) for x in left]), b.transpose([other.index(x) for x in right]))
    stored = [*images, rows, columns]
    return [np.ascontiguousarray(product.transpose([stored.index(x) for x in RESULT]))]


def _vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    """The product of dy and the other operand, summed over the axis that only that has; then over images or heads along
    which the operand was broadcast."""
    dy, terms = grads[0], op.attrs["terms"]
    assert dy is not None
    parts: list[str | None] = []
    for x, other, term, other_term in zip(op.inputs, op.inputs[::-1], terms, terms[::-1], strict=True):
        names = str.maketrans(term + own_axis(other_term, term), RESULT + "c")
        of_gradient = RESULT.translate(names), other_term.translate(names)
        common: dict[str, Any] = {"stem": f"grad.{x}", "phase": BACKWARD, "origin": op.origin}
        (part,) = graph.add("MatMul", [dy, other], attrs={"terms": of_gradient}, **common)
        if graph.tensors[part].shape != graph.tensors[x].shape:
            (part,) = graph.add("SumTo", [part], attrs={"shape": graph.tensors[x].shape}, **common)
        parts.append(part)
    return parts


register(Row("MatMul", _shape, _domain, _mat_mul, _vjp, flops=lambda attrs, inputs: 2.0, kernel="mat_mul"))
