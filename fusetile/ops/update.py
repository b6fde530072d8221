"""Optimizers: how a parameter and its state change, element by element, in place.

SGD (PyTorch's): g' = g + weight_decay * w; v' = momentum * v + g'; w' = w - learning_rate * v'
"""

from __future__ import annotations

from collections.abc import Sequence

from fusetile.box import Box
from fusetile.graph import Op, Tensor
from fusetile.ops.base import All, Array, Attrs, Domain, Row, Spec, element_axes, register


def _sgd_shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    state = [inputs[0], *inputs[3:]]
    return [Spec(tensor.shape, tensor.dtype, tensor.kind) for tensor in state]


def _sgd_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, access = element_axes(outputs[0])
    reads = [(All(1),) if i == 2 else access for i in range(len(inputs))]
    return Domain(axes, tuple(reads), tuple(access for _ in outputs))


def _sgd(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    w, g, learning_rate, *state = inputs
    real = w.dtype.type
    g = g + real(op.attrs["weight_decay"]) * w
    velocity = [real(op.attrs["momentum"]) * v + g for v in state]
    return [w - real(learning_rate[0]) * (velocity[0] if velocity else g), *velocity]


register(Row("SGD", _sgd_shape, _sgd_domain, _sgd, kernel="sgd", in_place=((0, 0), (1, 3))))
