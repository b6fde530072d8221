"""Sums and maxima of a map over the axes that another tensor lacks.

SumTo   the sum of x, or of the product of two operands, to `shape`: the gradient of broadcasting. What is summed over
        are reduction axes, so that devices that cut them hold partial sums.
MaxTo   the maximum. Partial maxima can't be added, so what is reduced is no axis: no device cuts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusetile.box import Box, extents
from fusetile.graph import BACKWARD, Graph, Op, Tensor
from fusetile.ops.arithmetic import aligned_shape, along_channels, broadcast_access
from fusetile.ops.base import All, Array, Attrs, Axis, Domain, Row, Spec, element_axes, register


def _sum_shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    return [Spec(attrs["shape"])]


def _sum_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    x, y = inputs[0], outputs[0]
    axes, access = element_axes(x)
    sizes = aligned_shape(y.shape, len(x.shape))
    kinds = [
        axis if axis.size == size else Axis(axis.name, axis.size, "reduction")
        for axis, size in zip(axes, sizes, strict=True)
    ]
    return Domain(
        tuple(kinds),
        tuple(broadcast_access(t, x.shape, access) for t in inputs),
        (broadcast_access(y, x.shape, access),),
    )


def _sum_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    """dy, and of a product dy times the other operand, broadcast and summed to each operand's own shape."""
    dy = grads[0]
    assert dy is not None
    shapes = [graph.tensors[x].shape for x in op.inputs]
    common: dict[str, Any] = {"phase": BACKWARD, "origin": op.origin}
    parts: list[str | None] = []
    for i, x in enumerate(op.inputs):
        stem, others = f"grad.{x}", [name for j, name in enumerate(op.inputs) if j != i]
        if shapes[i] != shapes[0]:
            parts += graph.add("SumTo", [*others, dy], attrs={"shape": shapes[i]}, stem=stem, **common)
            continue
        (part,) = graph.add("Mul", [dy, *others], stem=stem, **common) if others else (dy,)
        if graph.tensors[part].shape != shapes[0]:
            (part,) = graph.add("Expand", [part], attrs={"shape": shapes[0]}, stem=stem, **common)
        parts.append(part)
    return parts


def _sum_to(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    rank = len(domain.reads[0])
    product = np.asarray(1)
    for array in along_channels(inputs, rank):
        product = product * array
    reduced = tuple(i for i, axis in enumerate(domain.axes) if axis.kind == "reduction")
    return [product.sum(reduced, keepdims=True).reshape(extents(domain.output(box)))]


def _max_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, access = element_axes(inputs[0])
    kept = tuple(axis for axis, size in zip(axes, outputs[0].shape, strict=True) if axis.size == size)
    same = [axis in kept for axis in axes]
    reads = tuple(dim if stays else All(dim.size) for dim, stays in zip(access, same, strict=True))
    writes = tuple(dim if stays else All(1) for dim, stays in zip(access, same, strict=True))
    return Domain(kept, (reads,), (writes,))


def _max_to(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    reduced = tuple(i for i, dim in enumerate(domain.writes[0]) if isinstance(dim, All))
    return [inputs[0].max(reduced, keepdims=True)]


def _max_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    """Equal parts to all that reach the maximum, as PyTorch's amax does; none if it is only a constant to subtract."""
    if op.attrs.get("constant"):
        return [None]
    dy, (x,), (y,) = grads[0], op.inputs, op.outputs
    assert dy is not None
    common: dict[str, Any] = {"phase": BACKWARD, "origin": op.origin}
    (reached,) = graph.add("Reaches", [x, y], stem=f"{x}.reached", **common)
    (count,) = graph.add("SumTo", [reached], attrs={"shape": op.attrs["shape"]}, stem=f"{y}.count", **common)
    (share,) = graph.add("Div", [dy, count], stem=f"grad.{y}.share", **common)
    return [*graph.add("Mul", [reached, share], stem=f"grad.{x}", **common)]


register(Row("SumTo", _sum_shape, _sum_domain, _sum_to, _sum_vjp, kernel="sum_to"))
register(Row("MaxTo", _sum_shape, _max_domain, _max_to, _max_vjp, kernel="max_to"))
