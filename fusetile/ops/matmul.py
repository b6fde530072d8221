"""Products of matrices that both depend on the data, one for every image and channel: attention.

    y[n,k,h,w] = sum over c of a[n,k,h,c] * b[n,k,c,w]

`turned` says which operands are stored the other way round: a as [n,k,c,h], b as [n,k,w,c]. An operand may have one
image or one channel, that goes with all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusetile.box import Box
from fusetile.errors import UserError
from fusetile.graph import BACKWARD, Graph, Op, Tensor
from fusetile.ops.base import Access, All, Along, Array, Attrs, Axis, Dim, Domain, Row, Spec, register


def _sizes(attrs: Attrs, inputs: Sequence[Tensor]) -> tuple[int, int, int, int]:
    """Rows, inner size of both, columns."""
    (*_, a0, a1), (*_, b0, b1) = (tensor.shape for tensor in inputs)
    rows, inner = (a1, a0) if attrs["turned"][0] else (a0, a1)
    inner_b, columns = (b1, b0) if attrs["turned"][1] else (b0, b1)
    return rows, inner, inner_b, columns


def _shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    a, b = inputs
    rows, inner, inner_b, columns = _sizes(attrs, inputs)
    batch = zip(a.shape[:2], b.shape[:2], strict=True)
    if inner != inner_b or any(x != y and 1 not in (x, y) for x, y in batch):
        raise UserError(f"{a.name!r} of shape {a.shape} and {b.name!r} of shape {b.shape} have no matrix product")
    return [Spec((max(a.shape[0], b.shape[0]), max(a.shape[1], b.shape[1]), rows, columns), a.dtype)]


def _operand(shape: Sequence[int], whole: Sequence[int], names: Sequence[str]) -> Access:
    batch: list[Dim] = [
        Along(axis, size) if size == full else All(size) for axis, size, full in zip("nk", shape, whole, strict=False)
    ]
    return (*batch, *(Along(axis, size) for axis, size in zip(names, shape[2:], strict=True)))


def _domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    y = outputs[0].shape
    (a, b), turned = inputs, attrs["turned"]
    _, inner, _, _ = _sizes(attrs, inputs)
    axes = (*(Axis(name, size) for name, size in zip("nkhw", y, strict=True)), Axis("c", inner, "reduction"))
    reads = (
        _operand(a.shape, y, "ch" if turned[0] else "hc"),
        _operand(b.shape, y, "wc" if turned[1] else "cw"),
    )
    return Domain(axes, reads, (tuple(Along(name, size) for name, size in zip("nkhw", y, strict=True)),))


def _mat_mul(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    a, b = (x.swapaxes(2, 3) if turned else x for x, turned in zip(inputs, op.attrs["turned"], strict=True))
    return [np.matmul(a, b)]


def _vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    """da = dy b^T and db = a^T dy, or these transposed where the operand is; summed where it was broadcast."""
    dy, (a, b), (ta, tb) = grads[0], op.inputs, op.attrs["turned"]
    assert dy is not None
    common: dict[str, Any] = {"phase": BACKWARD, "origin": op.origin}
    products = (
        (a, [b, dy], (tb, True)) if ta else (a, [dy, b], (False, not tb)),
        (b, [dy, a], (True, ta)) if tb else (b, [a, dy], (not ta, False)),
    )
    parts: list[str | None] = []
    for x, operands, turned in products:
        shape = graph.tensors[x].shape
        (part,) = graph.add("MatMul", operands, attrs={"turned": turned}, stem=f"grad.{x}", **common)
        if graph.tensors[part].shape != shape:
            (part,) = graph.add("SumTo", [part], attrs={"shape": shape}, stem=f"grad.{x}", **common)
        parts.append(part)
    return parts


register(Row("MatMul", _shape, _domain, _mat_mul, _vjp, flops=lambda attrs, inputs: 2.0, kernel="mat_mul"))
