"""Normalization of layers, instances and groups: over the axes that have become one in the attribute `shape`.

    Moments             the sums of x and of x * x, in float64: partial on devices that have a part of what is summed
    Statistics          mean, and 1 / sqrt(variance + epsilon)                          (population variance)
    Standardize         y = (x - mean) * (1/std) * gamma + beta
    AffineGrad          the sums of dy * xhat and of dy, to `shape`: dgamma and dbeta
    StandardizeMoments  the sums of dy * gamma and of dy * gamma * xhat
    StandardizeMeans    the same over `count`
    StandardizeGrad     dx = (dy * gamma - mean of dy * gamma - xhat * mean of dy * gamma * xhat) * (1/std)

With `per_group` > 1, so many channels that follow each other have their mean and variance together. gamma and beta are
broadcast; where a network has none they are 1 and 0. As in norm.py sums are float64, so that E[x*x] - E[x]^2 does not
cancel, and the gradient of Standardize holds the path through the statistics, which get none of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fusetile.box import Box, extents
from fusetile.graph import BACKWARD, Graph, Op, Tensor
from fusetile.ops.arithmetic import aligned_shape, along_channels, broadcast_access
from fusetile.ops.base import (
    Array,
    Attrs,
    Axis,
    Domain,
    Groups,
    Reference,
    Row,
    Spec,
    element_axes,
    register,
    same_spec,
)
from fusetile.ops.functions import compute

_XHAT = "(x1 - x2) * x3"
# per kind of sums: the factors of what is summed, in its inputs x0, x1, ...
SUMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "Moments": (("x0",), ("x0", "x0")),
    "AffineGrad": ((f"x0 * ({_XHAT})",), ("x0",)),
    "StandardizeMoments": (("x0 * x4",), (f"x0 * x4 * ({_XHAT})",)),
}
_FORWARD = "(x0 - x1) * x2 * x3 + x4"
_BACKWARD = f"(x0 * x4 - x5 - {_XHAT} * x6) * x3"


def _pair(dtype: str) -> Callable[[Attrs, Sequence[Tensor]], list[Spec]]:
    """Two outputs of the attribute's shape, or like the first input."""
    return lambda attrs, inputs: [Spec(tuple(attrs.get("shape", inputs[0].shape)), dtype)] * 2


def _sum_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    x = inputs[0]
    axes, access = element_axes(x)
    sizes = aligned_shape(outputs[0].shape, len(x.shape))
    kinds = tuple(
        axis if axis.size == size else Axis(axis.name, axis.size, "reduction")
        for axis, size in zip(axes, sizes, strict=True)
    )
    reads = tuple(broadcast_access(tensor, x.shape, access) for tensor in inputs)
    return Domain(kinds, reads, (broadcast_access(outputs[0], x.shape, access),) * 2)


def _sums(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    operands = along_channels(inputs, len(domain.reads[0]))
    wide = [operand.astype(np.float64) for operand in operands]
    reduced = tuple(i for i, axis in enumerate(domain.axes) if axis.kind == "reduction")
    found = []
    for factors in SUMS[op.kind]:
        product = compute(" * ".join(f"({factor})" for factor in factors), {}, wide)
        whole = np.broadcast_to(product, operands[0].shape)
        found.append(whole.sum(reduced, keepdims=True).reshape(extents(domain.output(box))))
    return found


def _group_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, access = element_axes(outputs[0])
    per = attrs.get("per_group", 1)
    reads = (access[0], Groups("k", access[1].size, per, per), *access[2:]) if per > 1 else access
    return Domain(axes, (reads, reads), (access, access))


def _means(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    """Sums, of whole groups, over the count."""
    per = op.attrs.get("per_group", 1)
    if per == 1:
        return [array / op.attrs["count"] for array in inputs]
    first = domain.need(box, 0)[1][0]
    start, stop = domain.interval(box, "k")
    groups = [np.add.reduceat(array, range(0, array.shape[1], per), 1).repeat(per, 1) for array in inputs]
    return [group[:, start - first : stop - first] / op.attrs["count"] for group in groups]


def _statistics(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    mean, square = _means(op, domain, box, inputs)
    return [mean, 1 / np.sqrt(np.maximum(square - mean * mean, 0) + op.attrs["epsilon"])]


def _elements_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, access = element_axes(inputs[0])
    return Domain(axes, tuple(broadcast_access(tensor, inputs[0].shape, access) for tensor in inputs), (access,))


def _expression(expression: str) -> Reference:
    def reference(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
        return [compute(expression, op.attrs, along_channels(inputs, len(domain.writes[0])))]

    return reference


def _vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    dy = grads[0]
    assert dy is not None
    x, mean, inverse, gamma, beta = op.inputs
    common: dict[str, Any] = {"phase": BACKWARD, "origin": op.origin}
    shapes = [graph.tensors[name].shape for name in (gamma, beta)]

    def pair(kind: str, inputs: Sequence[str], labels: Sequence[str], **attrs: object) -> tuple[str, ...]:
        return graph.add(kind, inputs, attrs=attrs, outputs=[graph.fresh(label) for label in labels], **common)

    dgamma, dbeta = pair("AffineGrad", [dy, x, mean, inverse], [f"grad.{gamma}", f"grad.{beta}"], shape=shapes[0])
    if shapes[1] != shapes[0]:
        (dbeta,) = graph.add("SumTo", [dy], attrs={"shape": shapes[1]}, stem=f"grad.{beta}", **common)
    stem, small = f"grad.{x}", graph.tensors[mean].shape
    sums = pair("StandardizeMoments", [dy, x, mean, inverse, gamma], [f"{stem}.sum", f"{stem}.moment"], shape=small)
    counts = {key: op.attrs[key] for key in ("count", "per_group")}
    means = pair("StandardizeMeans", sums, [f"{stem}.mean", f"{stem}.slope"], **counts)
    (dx,) = graph.add("StandardizeGrad", [dy, x, mean, inverse, gamma, *means], stem=stem, **common)
    return [dx, None, None, dgamma, dbeta]


for _kind, _dtype in (("Moments", "float64"), ("AffineGrad", "float32"), ("StandardizeMoments", "float64")):
    register(Row(_kind, _pair(_dtype), _sum_domain, _sums, kernel="sums", flops=lambda attrs, inputs: 4.0))
register(Row("Statistics", _pair("float32"), _group_domain, _statistics, kernel="statistics"))
register(Row("StandardizeMeans", _pair("float32"), _group_domain, _means, kernel="statistics"))
register(
    Row(
        "Standardize",
        same_spec,
        _elements_domain,
        _expression(_FORWARD),
        _vjp,
        kernel="elementwise",
        expression=_FORWARD,
    )
)
register(
    Row(
        "StandardizeGrad",
        same_spec,
        _elements_domain,
        _expression(_BACKWARD),
        kernel="elementwise",
        expression=_BACKWARD,
    )
)
