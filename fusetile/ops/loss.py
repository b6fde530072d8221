"""Losses: one element of shape [1], the mean over the whole batch, partial on devices that have a part of it.

A loss is the end of the graph, or is only added to others: its own gradient is 1, and then named like the loss. Within
a loss that a model computes itself its gradient is a tensor as usual.

Losses of classes have logits (or log-probabilities) [N,C] or [N,C,H,W] and labels [N] or [N,H,W]. With the further
inputs weights [C] and total [1] they are PyTorch's weighted means: sum of w[label] * loss over `total`, the LabelWeight
of the whole batch. Spots with the label `ignore` count neither there nor here; if no spot counts, the loss is 0.
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
from fusetile.ops.functions import compute
from fusetile.yolo import log_softmax

NO_LABEL = -(2**31)
"""The label to ignore, where none is."""


def gradient_of_loss(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    """The rule of all losses: the op KINDGrad on the same operands."""
    stem = f"grad.{op.inputs[0]}"
    (dx,) = graph.add(f"{op.kind}Grad", op.inputs, attrs=op.attrs, stem=stem, phase=BACKWARD, origin=op.origin)
    dy = grads[0]
    assert dy is not None
    if dy != graph.loss:  # a part of a model's own loss
        (dx,) = graph.add("Mul", [dx, dy], stem=stem, phase=BACKWARD, origin=op.origin)
    return [dx, *(None for _ in op.inputs[1:])]


# -- classes ---------------------------------------------------------------------------------------------------------


def _classes_shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    logits, target, *more = inputs
    if target.shape != (logits.shape[0], *logits.shape[2:]):
        raise UserError(f"target {target.name!r} of shape {target.shape} does not fit the output of {logits.shape}")
    if more and more[0].shape != (logits.shape[1],):
        raise UserError(f"{more[0].shape[0]} class weights do not fit an output of {logits.shape[1]} classes")
    return [Spec((1,))]


def _classes_reads(inputs: Sequence[Tensor]) -> tuple[tuple[Axis, ...], tuple[Access, ...]]:
    """Axes without the classes, and how logits, labels, weights and total are indexed by them."""
    logits = inputs[0].shape
    names = [("n", logits[0]), *zip("hw", logits[2:], strict=False)]
    spots = [Along(name, size) for name, size in names]
    whole: list[Access] = [tuple(All(size) for size in tensor.shape) for tensor in inputs[2:]]
    return tuple(Axis(*name) for name in names), ((spots[0], All(logits[1]), *spots[1:]), tuple(spots), *whole)


def _classes_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, reads = _classes_reads(inputs)
    return Domain(tuple(Axis(a.name, a.size, "reduction") for a in axes), reads, ((All(1),),))


def _classes_grad_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, reads = _classes_reads(inputs)
    return Domain(axes, reads, (reads[0],))


def _weighed(op: Op, inputs: Sequence[Array]) -> tuple[Array, Array, Array, Array]:
    """What each spot weighs in the loss for its label, and for each class (label smoothing): over the total."""
    logits, target, *more = inputs
    real, classes = logits.dtype.type, logits.shape[1]
    weights = more[0].astype(logits.dtype) if more else np.ones(classes, logits.dtype)
    total = real(op.attrs["count"]) if not more else more[1][0] if more[1][0] else real(1)
    counts = (target != op.attrs.get("ignore", NO_LABEL))[:, None]
    label = np.where(counts, target[:, None], 0).astype(np.int64)
    smoothing = op.attrs.get("smoothing", 0.0)
    each = counts * weights.reshape(1, -1, *[1] * (logits.ndim - 2)) * real(smoothing / classes) / total
    return label, counts * weights[label] * real(1 - smoothing) / total, each, np.arange(classes)


def sum64(values: Array) -> list[Array]:
    """A loss from what each element contributes."""
    return [values.sum(dtype=np.float64).reshape(1)]


def _cross_entropy(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    label, chosen, each, _ = _weighed(op, inputs)
    logs = log_softmax(inputs[0], 1)
    return sum64(-np.take_along_axis(logs, label, 1) * chosen - (logs * each).sum(1, keepdims=True))


def _cross_entropy_grad(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    label, chosen, each, classes = _weighed(op, inputs)
    picked = classes.reshape(1, -1, *[1] * (inputs[0].ndim - 2)) == label
    softmax = np.exp(log_softmax(inputs[0], 1))
    return [(softmax - picked) * chosen + softmax * each.sum(1, keepdims=True) - each]


def _likelihood(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    label, chosen, _, _ = _weighed(op, inputs)
    return sum64(-np.take_along_axis(inputs[0], label, 1) * chosen)


def _likelihood_grad(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    label, chosen, _, classes = _weighed(op, inputs)
    return [np.where(classes.reshape(1, -1, *[1] * (inputs[0].ndim - 2)) == label, -chosen, inputs[0].dtype.type(0))]


def _label_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    target, weights = inputs
    axes = tuple(Axis(name, size, "reduction") for name, size in zip("nhw", target.shape, strict=False))
    return Domain(axes, (tuple(Along(a.name, a.size) for a in axes), (All(weights.shape[0]),)), ((All(1),),))


def _label_weight(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    target, weights = inputs
    counts = target != op.attrs.get("ignore", NO_LABEL)
    return sum64(weights[np.where(counts, target, 0)] * counts)


CLASS_LOSSES = {"cross-entropy": "CrossEntropy", "nll": "NegativeLogLikelihood"}

for _kind, _reference, _gradient, _family in (
    ("CrossEntropy", _cross_entropy, _cross_entropy_grad, "cross_entropy"),
    ("NegativeLogLikelihood", _likelihood, _likelihood_grad, "likelihood"),
):
    register(Row(_kind, _classes_shape, _classes_domain, _reference, gradient_of_loss, kernel=_family))
    register(Row(f"{_kind}Grad", same_spec, _classes_grad_domain, _gradient, kernel=f"{_family}_grad"))
register(Row("LabelWeight", lambda attrs, inputs: [Spec((1,))], _label_domain, _label_weight, kernel="label_weight"))


# -- pairs of elements -----------------------------------------------------------------------------------------------


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


def _pairs(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    return [sum64(compute(PAIRS[op.kind][0], op.attrs, inputs))[0] / op.attrs["count"]]


def _pairs_grad(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    return [compute(PAIRS[op.kind.removesuffix("Grad")][1], op.attrs, inputs)]


# kind -> the loss of output x0 and target x1, and its derivative by x0 over the count of elements
PAIRS: dict[str, tuple[str, str]] = {
    "MeanSquaredError": ("(x0 - x1) * (x0 - x1)", "(x0 - x1) * (2 / count)"),
    "MeanAbsoluteError": ("abs(x0 - x1)", "select(x0 > x1, 1 / count, select(x0 < x1, -1 / count, 0))"),
    "SmoothL1": (
        "select(abs(x0 - x1) < 1, 0.5 * (x0 - x1) * (x0 - x1), abs(x0 - x1) - 0.5)",
        "min(max(x0 - x1, -1), 1) * (1 / count)",
    ),
    "BinaryCrossEntropy": (
        "max(x0, 0) - x0 * x1 + log1p(exp(-abs(x0)))",
        "(1 / (1 + exp(-x0)) - x1) * (1 / count)",
    ),
}
PAIR_LOSSES = {
    "mse": "MeanSquaredError",
    "l1": "MeanAbsoluteError",
    "smooth-l1": "SmoothL1",
    "bce-with-logits": "BinaryCrossEntropy",
}
LOSSES: dict[str, str] = {**CLASS_LOSSES, **PAIR_LOSSES}
"""The command line's name of a loss -> its op kind."""

for _kind, (_function, _derivative) in PAIRS.items():
    register(
        Row(_kind, _pairs_shape, _pairs_domain, _pairs, gradient_of_loss, kernel="mean_of_pairs", expression=_function)
    )
    register(
        Row(
            f"{_kind}Grad",
            same_spec,
            _pairs_grad_domain,
            _pairs_grad,
            kernel="elementwise",
            expression=_derivative,
        )
    )
