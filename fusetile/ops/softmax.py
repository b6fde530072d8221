"""Softmax and its logarithm, over the axes that have become one in the attribute `shape`.

    Softmax         y = exp(x - max) / sum of exp(x - max)         dx = y * (dy - sum of dy * y)
    LogSoftmax      y = x - max - log(sum of exp(x - max))         dx = dy - exp(y) * sum of dy

What is summed over is no axis, so that no device cuts it: the maximum of parts can't be added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from fusetile.box import Box
from fusetile.graph import BACKWARD, Graph, Op, Tensor
from fusetile.ops.base import All, Array, Attrs, Domain, Row, element_axes, register, same_spec
from fusetile.yolo import log_softmax


def _domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, access = element_axes(inputs[0])
    kept = tuple(axis for axis, size in zip(axes, attrs["shape"], strict=True) if axis.size == size)
    touched = tuple(dim if axis in kept else All(dim.size) for axis, dim in zip(axes, access, strict=True))
    return Domain(kept, (touched,) * len(inputs), (touched,))


def _reduced(domain: Domain) -> tuple[int, ...]:
    return tuple(i for i, dim in enumerate(domain.writes[0]) if isinstance(dim, All))


def _softmax(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    y = log_softmax(inputs[0], _reduced(domain))
    return [np.exp(y) if op.kind == "Softmax" else y]


def _gradient(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    (dy, y), axes = inputs, _reduced(domain)
    if op.kind == "SoftmaxGrad":
        return [y * (dy - (dy * y).sum(axes, keepdims=True))]
    return [dy - np.exp(y) * dy.sum(axes, keepdims=True)]


def _vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    dy, (x,), (y,) = grads[0], op.inputs, op.outputs
    assert dy is not None
    stem = f"grad.{x}"
    return [*graph.add(f"{op.kind}Grad", [dy, y], attrs=op.attrs, stem=stem, phase=BACKWARD, origin=op.origin)]


for _kind in ("Softmax", "LogSoftmax"):
    register(
        Row(
            _kind,
            same_spec,
            _domain,
            _softmax,
            _vjp,
            flops=lambda attrs, inputs: 12.0 * prod(inputs[0].shape) / prod(attrs["shape"]),
            kernel="softmax",
            overwrites=(0,),
        )
    )
    register(
        Row(
            f"{_kind}Grad",
            same_spec,
            _domain,
            _gradient,
            flops=lambda attrs, inputs: 6.0 * prod(inputs[0].shape) / prod(attrs["shape"]),
            kernel="softmax_grad",
            overwrites=(0, 1),
        )
    )
