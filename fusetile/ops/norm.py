"""Batch normalization, as the sums over the whole batch and a pointwise rest (Ioffe and Szegedy, arXiv 1502.03167).

    ChannelMoments      sums[0,k] = sum of x, sums[1,k] = sum of x*x over n, h, w: partial on every device, in float64
    BatchStatistics     stats[0,k] = mean, stats[1,k] = 1 / sqrt(variance + epsilon)        (population variance)
    Normalize           y = (x - mean) * (1/std) * gamma + beta
    NormalizeMoments    moments[0,k] = sum of dy, moments[1,k] = sum of dy * xhat           (dbeta and dgamma)
    NormalizeInputGrad  dx = gamma * (1/std) * (dy - moments[0]/count - xhat * moments[1]/count)

After fusion Normalize has an activation; then its two gradient ops take the gradient behind the activation, and beta as
a last input to compute y again. If a max pool follows, PooledNormalizeMoments and PooledNormalizeInputGrad take the
gradient behind that, and argmax.

The sums are float64, so that E[x*x] - E[x]^2 does not cancel. `count` is that of the whole batch, n*h*w.
The gradient of Normalize with respect to x holds the path through the statistics; the statistics get none of their own.
With `count` = 0 the statistics are frozen: constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
    Reference,
    Row,
    Spec,
    channel_access,
    element_axes,
    register,
    same_spec,
)
from fusetile.ops.functions import compute, fused_expression, fused_gradient
from fusetile.ops.pool import holding, unpooled


def _pair(channels: int) -> Access:
    """A tensor [2, C]."""
    return (All(2), Along("k", channels))


def _small(tensor: Tensor) -> Access:
    """[C] or [2, C]."""
    return channel_access(tensor.shape[0]) if len(tensor.shape) == 1 else _pair(tensor.shape[1])


def _map_domain(maps: int, *, reduced: bool = False) -> Callable[[Attrs, Sequence[Tensor], Sequence[Tensor]], Domain]:
    """The first `maps` inputs are maps, the others are indexed by channel; so is the output when it is a sum."""

    def domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
        axes, access = element_axes(inputs[0])
        if reduced:
            axes = tuple(axis if axis.name == "k" else Axis(axis.name, axis.size, "reduction") for axis in axes)
        reads = [access if i < maps else _small(tensor) for i, tensor in enumerate(inputs)]
        return Domain(axes, tuple(reads), (_small(outputs[0]) if reduced else access,))

    return domain


def _pooled_domain(*, reduced: bool = False) -> Callable[[Attrs, Sequence[Tensor], Sequence[Tensor]], Domain]:
    """That of two maps, of which a pool's gradient and argmax stand for the first."""

    def domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
        dy, _, x, *small = inputs
        plain = _map_domain(2, reduced=reduced)(attrs, [x, x, *small], outputs)
        return Domain(plain.axes, (*[holding(attrs, dy.shape)] * 2, *plain.reads[1:]), plain.writes)

    return domain


def _channel_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    channels = outputs[0].shape[-1]
    return Domain((Axis("k", channels),), tuple(map(_small, inputs)), tuple(map(_small, outputs)))


def _pair_spec(dtype: str) -> Callable[[Attrs, Sequence[Tensor]], list[Spec]]:
    """[2, C] of the first input's channels (its second dimension, or its only one)."""
    return lambda attrs, inputs: [Spec((2, inputs[0].shape[1 if len(inputs[0].shape) > 1 else 0]), dtype)]


def _normalize_shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    x = inputs[0]
    for tensor in inputs[2:]:
        if tensor.shape != (x.shape[1],):
            raise UserError(f"{tensor.name!r} has shape {tensor.shape}; {x.name!r} has {x.shape[1]} channels")
    return same_spec(attrs, inputs)


def _moments(a: Array, b: Array) -> list[Array]:
    """[sum of a, sum of a * b] per channel, in float64."""
    axes = tuple(i for i in range(a.ndim) if i != 1)
    a64 = a.astype(np.float64)
    return [np.stack([a64.sum(axes), (a64 * b).sum(axes)])]


def _wide(vector: Array, like: Array) -> Array:
    """A vector [C] that broadcasts over a map."""
    return vector.reshape(1, -1, *[1] * (like.ndim - 2)).astype(like.dtype)


def _xhat(x: Array, stats: Array) -> Array:
    return (x - _wide(stats[0], x)) * _wide(stats[1], x)


def _statistics(mean: Array, variance: Array, epsilon: float) -> list[Array]:
    return [np.stack([mean, 1 / np.sqrt(variance + epsilon)])]


def _batch_moments(sums: Array, count: int) -> tuple[Array, Array]:
    mean = sums[0] / count
    return mean, np.maximum(sums[1] / count - mean * mean, 0)


def _normalize(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    x, stats, gamma, beta = inputs
    y = _xhat(x, stats) * _wide(gamma, x) + _wide(beta, x)
    return [compute(fused_expression(op.attrs.get("activation", "")), op.attrs, [y])]


def _normalize_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    dy = grads[0]
    assert dy is not None
    x, stats, gamma, beta = op.inputs
    common: dict[str, Any] = {"phase": BACKWARD, "origin": op.origin}
    (moments,) = graph.add("NormalizeMoments", [dy, x, stats], stem=f"grad.{op.outputs[0]}.moments", **common)
    dgamma, dbeta = graph.add(
        "NormalizeParameterGrad",
        [moments],
        outputs=[graph.fresh(f"grad.{gamma}"), graph.fresh(f"grad.{beta}")],
        **common,
    )
    if op.attrs["count"]:
        kind, inputs = "NormalizeInputGrad", [dy, x, stats, gamma, moments]
    else:
        kind, inputs = "FrozenNormalizeInputGrad", [dy, stats, gamma]
    (dx,) = graph.add(kind, inputs, attrs={"count": op.attrs["count"]}, stem=f"grad.{x}", **common)
    return [dx, None, dgamma, dbeta]


def _before_activation(attrs: Attrs, dy: Array, y: Array) -> Array:
    """The gradient of a fused activation's input y, from that of its output."""
    return compute(fused_gradient(attrs.get("activation", "")), attrs, [dy, y])


def _normalize_moments(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    dy, x, stats, *affine = inputs
    xhat = _xhat(x, stats)
    if affine:
        gamma, beta = affine
        dy = _before_activation(op.attrs, dy, xhat * _wide(gamma, dy) + _wide(beta, dy))
    return _moments(dy, xhat)


def _normalize_input_grad(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    dy, x, stats, gamma, moments, *beta = inputs
    count = op.attrs["count"]
    if beta:
        dy = _before_activation(op.attrs, dy, _xhat(x, stats) * _wide(gamma, dy) + _wide(beta[0], dy))
    centred = dy - _wide(moments[0] / count, dy) - _xhat(x, stats) * _wide(moments[1] / count, dy)
    return [centred * _wide(gamma * stats[1], dy)]


def _behind_pool(reference: Reference) -> Reference:
    """Of an op that is given a pool's gradient and argmax instead of the gradient dy."""
    return lambda op, domain, box, inputs: reference(
        op, domain, box, [unpooled(op, domain, box, inputs[:2]), *inputs[2:]]
    )


def _running(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    """Of several batches, one after the other."""
    first, *old = inputs[:3]
    keep = op.attrs["momentum"]
    for sums in (first, *inputs[3:]):
        new = _batch_moments(sums, op.attrs["count"])
        old = [was * was.dtype.type(keep) + now * (1 - keep) for was, now in zip(old, new, strict=True)]
    return old


register(
    Row(
        "ChannelMoments",
        _pair_spec("float64"),
        _map_domain(1, reduced=True),
        lambda op, domain, box, inputs: _moments(inputs[0], inputs[0]),
        kernel="channel_moments",
    )
)
register(
    Row(
        "BatchStatistics",
        _pair_spec("float32"),
        _channel_domain,
        lambda op, domain, box, inputs: _statistics(*_batch_moments(inputs[0], op.attrs["count"]), op.attrs["epsilon"]),
        lambda graph, op, grads: [None],
        kernel="batch_statistics",
    )
)
register(
    Row(
        "FrozenStatistics",
        _pair_spec("float32"),
        _channel_domain,
        lambda op, domain, box, inputs: _statistics(inputs[0], inputs[1], op.attrs["epsilon"]),
        lambda graph, op, grads: [None, None],
        kernel="frozen_statistics",
    )
)
register(
    Row(
        "Normalize",
        _normalize_shape,
        _map_domain(1),
        _normalize,
        _normalize_vjp,
        kernel="normalize",
        overwrites=(0,),
    )
)
register(
    Row(
        "NormalizeMoments",
        _pair_spec("float64"),
        _map_domain(2, reduced=True),
        _normalize_moments,
        kernel="normalize_moments",
    )
)
register(
    Row(
        "NormalizeParameterGrad",
        lambda attrs, inputs: [Spec(inputs[0].shape[1:])] * 2,
        _channel_domain,
        lambda op, domain, box, inputs: [inputs[0][1], inputs[0][0]],
        kernel="normalize_parameter_grad",
    )
)
register(
    Row(
        "NormalizeInputGrad",
        same_spec,
        _map_domain(2),
        _normalize_input_grad,
        kernel="normalize_input_grad",
        overwrites=(0, 1),
    )
)
register(
    Row(
        "PooledNormalizeMoments",
        _pair_spec("float64"),
        _pooled_domain(reduced=True),
        _behind_pool(_normalize_moments),
        kernel="pooled_normalize_moments",
    )
)
register(
    Row(
        "PooledNormalizeInputGrad",
        lambda attrs, inputs: [Spec(inputs[2].shape)],
        _pooled_domain(),
        _behind_pool(_normalize_input_grad),
        kernel="pooled_normalize_input_grad",
        overwrites=(2,),
    )
)
register(
    Row(
        "FrozenNormalizeInputGrad",
        same_spec,
        _map_domain(1),
        lambda op, domain, box, inputs: [inputs[0] * _wide(inputs[1][1] * inputs[2], inputs[0])],
        kernel="frozen_normalize_input_grad",
        overwrites=(0,),
    )
)
register(
    Row(
        "RunningStatistics",
        lambda attrs, inputs: [Spec(t.shape) for t in inputs[1:3]],
        _channel_domain,
        _running,
        kernel="running_statistics",
        in_place=((0, 1), (1, 2)),
    )
)
