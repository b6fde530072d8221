"""Arithmetic on two operands, one of which may be broadcast over the other, and the sums that are its gradients.

An operand fits an output [N,C,H,W] (or [N,C]) if it has that rank and every dimension is equal or 1, or if it is a
vector [C], one number per channel, or [1]. Where an operand is broadcast, its gradient is a sum over the axes that it
lacks: they are reduction axes, so that devices that cut them hold partial sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusetile.box import Box, extents
from fusetile.errors import UserError
from fusetile.graph import BACKWARD, Graph, Op, Tensor
from fusetile.ops.base import (
    Access,
    All,
    Array,
    Attrs,
    Axis,
    Domain,
    Row,
    Spec,
    Vjp,
    element_axes,
    register,
    same_spec,
)
from fusetile.ops.functions import compute
from fusetile.ops.pointwise import elementwise_domain


def aligned_shape(shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """A shape with as many dimensions as the output: that of a vector lies along the channels."""
    return (1, shape[0], *(1,) * (rank - 2)) if len(shape) == 1 and rank > 1 else tuple(shape)


def _broadcast_shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    a, b = inputs
    rank = max(len(a.shape), len(b.shape))
    one, two = aligned_shape(a.shape, rank), aligned_shape(b.shape, rank)
    if len(one) != len(two) or any(x != y and 1 not in (x, y) for x, y in zip(one, two, strict=True)):
        raise UserError(
            f"operands {a.name!r} of shape {a.shape} and {b.name!r} of shape {b.shape} do not fit each other"
        )
    kind = a.kind if a.shape == b.shape else "map"
    return [Spec(tuple(max(x, y) for x, y in zip(one, two, strict=True)), a.dtype, kind)]


def _access(tensor: Tensor, shape: Sequence[int], whole: Access) -> Access:
    """How an operand is indexed by the elements of a tensor of this shape."""
    if tensor.shape == tuple(shape):
        return whole
    sizes = aligned_shape(tensor.shape, len(shape))
    dims = tuple(dim if size == dim.size else All(1) for dim, size in zip(whole, sizes, strict=True))
    return (dims[1],) if len(tensor.shape) == 1 else dims


def _broadcast_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, access = element_axes(outputs[0])
    return Domain(axes, tuple(_access(tensor, outputs[0].shape, access) for tensor in inputs), (access,))


def _along_channels(arrays: Sequence[Array], rank: int) -> list[Array]:
    return [array.reshape(aligned_shape(array.shape, rank)) for array in arrays]


def _binary(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    return [compute(EXPRESSIONS[op.kind], op.attrs, _along_channels(inputs, len(domain.writes[0])))]


def _add(graph: Graph, op: Op, kind: str, inputs: Sequence[str], stem: str, **attrs: object) -> str:
    return graph.add(kind, inputs, attrs=attrs, stem=stem, phase=BACKWARD, origin=op.origin)[0]


def _reduced(graph: Graph, op: Op, x: str, operands: Sequence[str]) -> str:
    """The gradient of operand x: the product of the operands, summed over what x lacks."""
    shape, stem = graph.tensors[x].shape, f"grad.{x}"
    if shape != graph.tensors[operands[0]].shape:
        return _add(graph, op, "SumTo", operands, stem, shape=shape)
    return operands[0] if len(operands) == 1 else _add(graph, op, "Mul", operands, stem)


def _minus(graph: Graph, op: Op, gradient: str) -> str:
    return _add(graph, op, "Scale", [gradient], f"{gradient}.minus", factor=-1.0)


def _add_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    dy = grads[0]
    assert dy is not None
    return [_reduced(graph, op, x, [dy]) for x in op.inputs]


def _sub_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    da, db = _add_vjp(graph, op, grads)
    assert db is not None
    return [da, _minus(graph, op, db)]


def _mul_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    dy, (a, b) = grads[0], op.inputs
    assert dy is not None
    return [_reduced(graph, op, a, [dy, b]), _reduced(graph, op, b, [dy, a])]


def _div_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    """y = a / b: da = dy / b, db = -(dy / b) * y."""
    dy, (a, b) = grads[0], op.inputs
    assert dy is not None
    each = _add(graph, op, "Div", [dy, b], f"grad.{a}")
    return [_reduced(graph, op, a, [each]), _minus(graph, op, _reduced(graph, op, b, [each, op.outputs[0]]))]


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
    return Domain(tuple(kinds), tuple(_access(t, x.shape, access) for t in inputs), (_access(y, x.shape, access),))


def _sum_to(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    rank = len(domain.reads[0])
    product = np.asarray(1)
    for array in _along_channels(inputs, rank):
        product = product * array
    reduced = tuple(i for i, axis in enumerate(domain.axes) if axis.kind == "reduction")
    return [product.sum(reduced, keepdims=True).reshape(extents(domain.output(box)))]


def _shift_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    return [grads[0]]


EXPRESSIONS = {"Add": "x0 + x1", "Sub": "x0 - x1", "Mul": "x0 * x1", "Div": "x0 / x1"}
_VJPS: dict[str, Vjp] = {"Add": _add_vjp, "Sub": _sub_vjp, "Mul": _mul_vjp, "Div": _div_vjp}

for _kind, _expression in EXPRESSIONS.items():
    register(
        Row(
            _kind,
            _broadcast_shape,
            _broadcast_domain,
            _binary,
            _VJPS[_kind],
            kernel="elementwise",
            expression=_expression,
        )
    )
register(Row("SumTo", _sum_shape, _sum_domain, _sum_to, kernel="sum_to"))
register(
    Row(
        "Shift",
        same_spec,
        elementwise_domain,
        lambda op, domain, box, inputs: [inputs[0] + inputs[0].dtype.type(op.attrs["offset"])],
        _shift_vjp,
        kernel="elementwise",
        expression="x0 + offset",
    )
)
