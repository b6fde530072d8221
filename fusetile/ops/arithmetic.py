"""Arithmetic on two or three operands, each of which may be broadcast over the others.

An operand fits an output [N,C,H,W] (or [N,C]) if it has that rank and every dimension is equal or 1, or if it is a
vector [C], one number per channel, or [1]. Where an operand is broadcast, its gradient is a sum over the axes that it
lacks (SumTo, in reduce.py). Exceeds and Reaches are where the gradients of maxima go. IsGreater and IsAtLeast give 1
for true and 0 for false; Masked and MaskedOut take what such numbers say, and nothing of the rest, not even a NaN.
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
    a, b = inputs[:2]
    rank = max(len(a.shape), len(b.shape))
    one, two = aligned_shape(a.shape, rank), aligned_shape(b.shape, rank)
    if len(one) != len(two) or any(x != y and 1 not in (x, y) for x, y in zip(one, two, strict=True)):
        raise UserError(
            f"operands {a.name!r} of shape {a.shape} and {b.name!r} of shape {b.shape} do not fit each other"
        )
    kind = a.kind if a.shape == b.shape else "map"
    return [Spec(tuple(max(x, y) for x, y in zip(one, two, strict=True)), a.dtype, kind)]


def broadcast_access(tensor: Tensor, shape: Sequence[int], whole: Access) -> Access:
    """How an operand is indexed by the elements of a tensor of this shape."""
    if tensor.shape == tuple(shape):
        return whole
    sizes = aligned_shape(tensor.shape, len(shape))
    dims = tuple(dim if size == dim.size else All(1) for dim, size in zip(whole, sizes, strict=True))
    return (dims[1],) if len(tensor.shape) == 1 else dims


def _broadcast_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, access = element_axes(outputs[0])
    return Domain(axes, tuple(broadcast_access(tensor, outputs[0].shape, access) for tensor in inputs), (access,))


def along_channels(arrays: Sequence[Array], rank: int) -> list[Array]:
    """Arrays with dimensions of one where they are broadcast (see `aligned_shape`)."""
    return [array.reshape(aligned_shape(array.shape, rank)) for array in arrays]


def _binary(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    return [compute(EXPRESSIONS[op.kind], op.attrs, along_channels(inputs, len(domain.writes[0])))]


def _expand(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    (x,) = along_channels(inputs, len(domain.writes[0]))
    return [np.broadcast_to(x, extents(domain.output(box))).copy()]


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


def _extreme_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    """To the operand that is taken; of equal ones half to each."""
    dy, (a, b) = grads[0], op.inputs
    assert dy is not None
    parts: list[str | None] = []
    for x, other in ((a, b), (b, a)):
        pair = [x, other] if op.kind == "Max" else [other, x]
        parts.append(_reduced(graph, op, x, [dy, _add(graph, op, "Exceeds", pair, f"{x}.taken")]))
    return parts


def _prelu_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    dy, (x, slope) = grads[0], op.inputs
    assert dy is not None
    dx = _add(graph, op, "PReluGrad", [dy, x, slope], f"grad.{x}")
    negative = _add(graph, op, "Clip", [x], f"{x}.negative", low=-np.inf, high=0.0)
    return [dx, _reduced(graph, op, slope, [dy, negative])]


def _masked_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    dy, (mask, x) = grads[0], op.inputs
    assert dy is not None
    return [None, _reduced(graph, op, x, [_add(graph, op, op.kind, [mask, dy], f"grad.{x}")])]


def _no_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    """Of a step function: nothing, wherever it has a derivative."""
    return [None for _ in op.inputs]


def _expand_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    assert grads[0] is not None
    return [_reduced(graph, op, op.inputs[0], [grads[0]])]


def _shift_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    return [grads[0]]


EXPRESSIONS = {
    "Add": "x0 + x1",
    "Sub": "x0 - x1",
    "Mul": "x0 * x1",
    "Div": "x0 / x1",
    "Max": "max(x0, x1)",
    "Min": "min(x0, x1)",
    "Exceeds": "select(x0 > x1, 1, select(x0 < x1, 0, 0.5))",
    "Reaches": "select(x0 < x1, 0, 1)",
    "IsGreater": "select(x0 > x1, 1, 0)",
    "IsAtLeast": "select(x0 >= x1, 1, 0)",
    "Masked": "select(x0 > 0.5, x1, 0)",
    "MaskedOut": "select(x0 > 0.5, 0, x1)",
    "PRelu": "select(x0 > 0, x0, x1 * x0)",
    "PReluGrad": "select(x1 > 0, x0, x2 * x0)",
    "Expand": "x0",
}
_VJPS: dict[str, Vjp] = {
    "Add": _add_vjp,
    "Sub": _sub_vjp,
    "Mul": _mul_vjp,
    "Div": _div_vjp,
    "Max": _extreme_vjp,
    "Min": _extreme_vjp,
    "IsGreater": _no_vjp,
    "IsAtLeast": _no_vjp,
    "Masked": _masked_vjp,
    "MaskedOut": _masked_vjp,
    "PRelu": _prelu_vjp,
    "Expand": _expand_vjp,
}

for _kind, _expression in EXPRESSIONS.items():
    register(
        Row(
            _kind,
            (lambda attrs, inputs: [Spec(attrs["shape"])]) if _kind == "Expand" else _broadcast_shape,
            _broadcast_domain,
            _expand if _kind == "Expand" else _binary,
            _VJPS.get(_kind),
            kernel="elementwise",
            expression=_expression,
        )
    )
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
