"""Losses: one element of shape [1], the mean over the whole batch, partial on devices that have a part of it.

A loss is the end of the graph: it is only ever added to other losses, so its own gradient is 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusetile.box import Box
from fusetile.errors import UserError
from fusetile.graph import BACKWARD, Graph, Op, Tensor
from fusetile.ops.base import (
    Access,
    All,
    Along,
    Array,
    Attrs,
    Axis,
    Domain,
    Row,
    Spec,
    element_axes,
    register,
    same_spec,
)


def _vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    stem = f"grad.{op.inputs[0]}"
    (dx,) = graph.add(f"{op.kind}Grad", op.inputs, attrs=op.attrs, stem=stem, phase=BACKWARD, origin=op.origin)
    return [dx, None]


# -- cross-entropy ---------------------------------------------------------------------------------------------------


def _check_classes(inputs: Sequence[Tensor]) -> None:
    logits, target = inputs
    if target.shape != (logits.shape[0], *logits.shape[2:]):
        raise UserError(f"target {target.name!r} of shape {target.shape} does not fit the output of {logits.shape}")


def _classes_shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    _check_classes(inputs)
    return [Spec((1,))]


def _class_reads(logits: Sequence[int]) -> tuple[tuple[Axis, ...], Access, Access]:
    """Axes without the classes, and how logits and targets are indexed by them."""
    names = [("n", logits[0]), *zip("hw", logits[2:], strict=False)]
    spots = [Along(name, size) for name, size in names]
    return tuple(Axis(*name) for name in names), (spots[0], All(logits[1]), *spots[1:]), tuple(spots)


def _classes_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, logits, target = _class_reads(inputs[0].shape)
    return Domain(tuple(Axis(a.name, a.size, "reduction") for a in axes), (logits, target), ((All(1),),))


def _classes_grad_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, logits, target = _class_reads(inputs[0].shape)
    return Domain(axes, (logits, target), (logits,))


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _cross_entropy(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    logits, target = inputs
    picked = np.take_along_axis(_log_softmax(logits), target[:, None].astype(np.int64), 1)
    return [-picked.sum(dtype=np.float64, keepdims=True).reshape(1) / op.attrs["count"]]


def _cross_entropy_grad(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    logits, target = inputs
    classes = np.arange(logits.shape[1]).reshape(1, -1, *[1] * (logits.ndim - 2))
    return [(np.exp(_log_softmax(logits)) - (classes == target[:, None])) / logits.dtype.type(op.attrs["count"])]


# -- mean squared error ----------------------------------------------------------------------------------------------


def _pairs_shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    y, target = inputs
    if y.shape != target.shape:
        raise UserError(f"target {target.name!r} of shape {target.shape} must be shaped like the output, {y.shape}")
    return [Spec((1,))]


def _pairs_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, access = element_axes(inputs[0])
    return Domain(tuple(Axis(a.name, a.size, "reduction") for a in axes), (access, access), ((All(1),),))


def _pairs_grad_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, access = element_axes(inputs[0])
    return Domain(axes, (access, access), (access,))


def _squared_error(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    error = inputs[0].astype(np.float64) - inputs[1]
    return [(error * error).sum().reshape(1) / op.attrs["count"]]


LOSSES: dict[str, str] = {"cross-entropy": "CrossEntropy", "mse": "MeanSquaredError"}
"""The command line's name of a loss -> its op kind."""


register(Row("CrossEntropy", _classes_shape, _classes_domain, _cross_entropy, _vjp, kernel="cross_entropy"))
register(Row("CrossEntropyGrad", same_spec, _classes_grad_domain, _cross_entropy_grad, kernel="cross_entropy_grad"))
register(Row("MeanSquaredError", _pairs_shape, _pairs_domain, _squared_error, _vjp, kernel="mean_squared_error"))
register(
    Row(
        "MeanSquaredErrorGrad",
        same_spec,
        _pairs_grad_domain,
        lambda op, domain, box, inputs: [(inputs[0] - inputs[1]) * inputs[0].dtype.type(2 / op.attrs["count"])],
        kernel="elementwise",
        expression="(x0 - x1) * (2 / count)",
    )
)
