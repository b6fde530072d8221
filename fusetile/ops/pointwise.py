"""Ops that work element by element, and dropout, whose mask is a function of the element's global index."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusetile import philox
from fusetile.box import Box
from fusetile.errors import UserError
from fusetile.graph import BACKWARD, Graph, Op, Tensor
from fusetile.ops.base import All, Array, Attrs, Domain, Row, Spec, element_axes, register, same_spec


def activate(x: Array, attrs: Attrs) -> Array:
    """Apply the activation that fusion gave to an op."""
    match attrs.get("activation", ""):
        case "":
            return x
        case "relu":
            return np.maximum(x, 0)
        case "leaky_relu":
            return np.where(x > 0, x, x * x.dtype.type(attrs["alpha"]))
    raise AssertionError(attrs["activation"])


def elementwise_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    """All operands have the output's shape; further inputs of one element (`step`) are read whole."""
    axes, access = element_axes(outputs[0])
    reads = [access if t.shape == outputs[0].shape else tuple(All(size) for size in t.shape) for t in inputs]
    return Domain(axes, tuple(reads), (access,))


def _relu_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    # the output tells the sign of the input as well as the input does, and it is the tensor that the next layer keeps;
    # with a negative slope it does not
    dy = grads[0]
    assert dy is not None
    kept = op.outputs[0] if op.attrs.get("alpha", 0.0) >= 0 else op.inputs[0]
    return [
        *graph.add(
            f"{op.kind}Grad",
            [dy, kept],
            attrs=op.attrs,
            stem=f"grad.{op.inputs[0]}",
            phase=BACKWARD,
            origin=op.origin,
        )
    ]


def _again(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    """A linear op with one data input: its gradient is the same op on dy."""
    dy = grads[0]
    assert dy is not None
    inputs = [dy, *op.inputs[1:]]
    stem = f"grad.{op.inputs[0]}"
    (dx,) = graph.add(op.kind, inputs, attrs=op.attrs, stem=stem, phase=BACKWARD, origin=op.origin)
    return [dx, *(None for _ in op.inputs[1:])]


def _dropout(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    x, step = inputs
    ratio = op.attrs["ratio"]
    sizes = [dim.size for dim in domain.writes[0]]
    index = np.zeros((), np.int64)
    for (start, stop), size in zip(domain.output(box), sizes, strict=True):
        index = index[..., None] * size + np.arange(start, stop)
    uniform = philox.uniform(seed=op.attrs["seed"], step=int(step.flat[0]), site=op.attrs["site"], index=index)
    return [np.where(uniform >= np.float32(ratio), x * x.dtype.type(1 / (1 - ratio)), x.dtype.type(0))]


def _dropout_shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    if inputs[1].shape != (1,):
        raise UserError(f"the step counter {inputs[1].name!r} must have shape (1,), not {inputs[1].shape}")
    return same_spec(attrs, inputs)


register(
    Row(
        "Relu",
        same_spec,
        elementwise_domain,
        lambda op, domain, box, inputs: [np.maximum(inputs[0], 0)],
        _relu_vjp,
        kernel="elementwise",
        expression="max(x0, 0)",
    )
)
register(
    Row(
        "LeakyRelu",
        same_spec,
        elementwise_domain,
        lambda op, domain, box, inputs: [activate(inputs[0], {"activation": "leaky_relu", **op.attrs})],
        _relu_vjp,
        kernel="elementwise",
        expression="select(x0 > 0, x0, alpha * x0)",
    )
)
register(
    Row(
        "ReluGrad",
        same_spec,
        elementwise_domain,
        lambda op, domain, box, inputs: [np.where(inputs[1] > 0, inputs[0], inputs[0].dtype.type(0))],
        kernel="elementwise",
        expression="select(x1 > 0, x0, 0)",
    )
)
register(
    Row(
        "LeakyReluGrad",
        same_spec,
        elementwise_domain,
        lambda op, domain, box, inputs: [
            np.where(inputs[1] > 0, inputs[0], inputs[0] * inputs[0].dtype.type(op.attrs["alpha"]))
        ],
        kernel="elementwise",
        expression="select(x1 > 0, x0, alpha * x0)",
    )
)
register(
    Row(
        "Scale",
        same_spec,
        elementwise_domain,
        lambda op, domain, box, inputs: [inputs[0] * inputs[0].dtype.type(op.attrs["factor"])],
        _again,
        kernel="elementwise",
        expression="factor * x0",
    )
)
register(
    Row(
        "Identity",
        same_spec,
        elementwise_domain,
        lambda op, domain, box, inputs: [inputs[0].copy()],
        lambda graph, op, grads: [grads[0]],
        kernel="elementwise",
        expression="x0",
    )
)
register(Row("Dropout", _dropout_shape, elementwise_domain, _dropout, _again, kernel="dropout", overwrites=(0,)))
