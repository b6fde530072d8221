"""Max, average and global average pooling, and their gradients.

Windows are clipped at the edge of the whole image, wherever the tiles are cut. Ties of the maximum go to the first in
row-major order. The gradients gather: every element of dx looks at the windows that hold it. Max pooling's gradient,
which puts numbers where maxima were, is un-pooling too; then MaxPoolPick, which takes them from there, is its gradient.
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
    Along,
    Array,
    Attrs,
    Axis,
    Domain,
    Row,
    Spec,
    Spread,
    Vjp,
    Window,
    register,
)
from fusetile.ops.conv import output_size, scatter_rows


def pooled_size(size: int, taps: int, stride: int, dilation: int, pads: tuple[int, int], ceil_mode: bool) -> int:
    """Rows of a pool's output. In ceil mode a last window that would start beyond the image and its leading padding is
    dropped (PyTorch; ONNX since opset 19)."""
    if not ceil_mode:
        return output_size(size, taps, stride, dilation, sum(pads))
    out = -(-(size + sum(pads) - dilation * (taps - 1) - 1) // stride) + 1
    return out - 1 if (out - 1) * stride >= size + pads[0] else out


def _dims(attrs: Attrs) -> list[tuple[str, int, int, int, int]]:
    dilations = attrs.get("dilations", (1, 1))
    return list(zip("hw", attrs["kernel"], attrs["strides"], dilations, attrs["pads"][:2], strict=True))


def _pooled(attrs: Attrs, inputs: Sequence[Tensor]) -> tuple[int, ...]:
    x = inputs[0]
    if len(x.shape) != 4:
        raise UserError(f"pooling needs an input [N,C,H,W]; {x.name!r} has shape {x.shape}")
    pads = attrs["pads"]
    sizes = [
        pooled_size(size, taps, stride, dilation, (pads[i], pads[i + 2]), attrs["ceil_mode"])
        for i, (size, (_, taps, stride, dilation, _)) in enumerate(zip(x.shape[2:], _dims(attrs), strict=True))
    ]
    if min(sizes) < 1:
        raise UserError(f"input {x.name!r} of shape {x.shape} is smaller than the pooling window {attrs['kernel']}")
    return (*x.shape[:2], *sizes)


def _max_pool_shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    if np.prod(attrs["kernel"]) > 256:
        raise UserError(f"max-pool window {attrs['kernel']} has more than 256 elements, the most that is supported")
    shape = _pooled(attrs, inputs)
    return [Spec(shape), Spec(shape, "uint8")]


def _maps(shape: Sequence[int]) -> Access:
    return tuple(Along(axis, size) for axis, size in zip("nkhw", shape, strict=True))


def _pool_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    x, y = inputs[0].shape, outputs[0].shape
    windows = [
        Window(axis, size, taps, stride, dilation, pad)
        for size, (axis, taps, stride, dilation, pad) in zip(x[2:], _dims(attrs), strict=True)
    ]
    axes = tuple(Axis(name, size) for name, size in zip("nkhw", y, strict=True))
    return Domain(axes, ((*_maps(x)[:2], *windows),), tuple(_maps(y) for _ in outputs))


def _windows(op: Op, domain: Domain, box: Box, x: Array, fill: float) -> Array:
    """[n, k, h, w, taps]: the windows of the box, `fill` outside the image."""
    reach, need = domain.reach(box, 0), domain.need(box, 0)
    widths = [(n0 - r0, r1 - n1) for (r0, r1), (n0, n1) in zip(reach, need, strict=True)]
    x = np.pad(x, widths, constant_values=fill)
    sizes = extents(domain.output(box))[2:]
    taps = []
    for tap in np.ndindex(*op.attrs["kernel"]):
        steps = zip(tap, sizes, _dims(op.attrs), strict=True)
        window = tuple(slice(t * d, t * d + (n - 1) * s + 1, s) for t, n, (_, _, s, d, _) in steps)
        taps.append(x[:, :, *window])
    return np.stack(taps, -1)


def _max_pool(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    windows = _windows(op, domain, box, inputs[0], -np.inf)
    first = windows.argmax(-1)
    return [np.take_along_axis(windows, first[..., None], -1)[..., 0], first.astype(np.uint8)]


def divisors(attrs: Attrs, axis: int, size: int, rows: tuple[int, int]) -> Array:
    """Per output row: how many rows of the image (with count_include_pad: of the padded image) its window covers."""
    _, taps, stride, _, pad = _dims(attrs)[axis]
    start = np.arange(*rows) * stride - pad
    stop = np.minimum(start + taps, size + attrs["pads"][axis + 2])
    if attrs["count_include_pad"]:
        return stop - start
    return np.minimum(stop, size) - np.maximum(start, 0)


def _window_areas(op: Op, image: Sequence[int], rows: Box, dtype: np.dtype[np.generic]) -> Array:
    down, across = (divisors(op.attrs, axis, image[axis], rows[axis]) for axis in (0, 1))
    return np.outer(down, across).astype(dtype)


def _average_pool(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    image = [dim.size for dim in domain.reads[0][2:]]
    areas = _window_areas(op, image, domain.output(box)[2:], inputs[0].dtype)
    return [_windows(op, domain, box, inputs[0], 0).sum(-1) / areas]


def _vjp(kind: str) -> Vjp:
    def vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
        dy = grads[0]
        assert dy is not None
        attrs = {**op.attrs, "input_shape": graph.tensors[op.inputs[0]].shape}
        stem = f"grad.{op.inputs[0]}"
        return [*graph.add(kind, [dy, *op.outputs[1:]], attrs=attrs, stem=stem, phase=BACKWARD, origin=op.origin)]

    return vjp


def holding(attrs: Attrs, shape: Sequence[int]) -> Access:
    """The outputs (of the shape `shape`) of a pool whose windows hold pixels of its input."""
    spread = [
        Spread(axis, size, taps, stride, dilation, pad)
        for size, (axis, taps, stride, dilation, pad) in zip(shape[2:], _dims(attrs), strict=True)
    ]
    return (*_maps(shape)[:2], *spread)


def _pool_grad_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes = tuple(Axis(name, size) for name, size in zip("nkhw", outputs[0].shape, strict=True))
    return Domain(axes, (holding(attrs, inputs[0].shape),) * len(inputs), (_maps(outputs[0].shape),))


def unpooled(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> Array:
    """dy, the first input, spread over the windows: max pooling's to the tap that argmax, the second input, names,
    average pooling's evenly to all. The axes of `domain` are the pixels' n, k, h and w."""
    need = domain.need(box, 0)
    dy = inputs[0]
    if not dy.size:  # with strides, a box may lie between all windows
        return np.zeros(extents(box), dy.dtype)
    if len(inputs) == 1:
        dy = dy / _window_areas(op, op.attrs["input_shape"][2:], need[2:], dy.dtype)
    dx = np.zeros(extents(box), dy.dtype)
    lead = [np.arange(size) for size in dx.shape[:2]]
    for number, tap in enumerate(np.ndindex(*op.attrs["kernel"])):
        (rows, to_rows), (columns, to_columns) = scatter_rows(box, need, _dims(op.attrs), tap, domain)
        part = dy if len(inputs) == 1 else np.where(inputs[1] == number, dy, dy.dtype.type(0))
        dx[np.ix_(*lead, to_rows, to_columns)] += part[:, :, rows][:, :, :, columns]
    return dx


def _max_pool_grad_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    dz = grads[0]
    assert dz is not None
    window = {key: value for key, value in op.attrs.items() if key != "input_shape"}
    stem = f"grad.{op.inputs[0]}"
    inputs = [dz, op.inputs[1]]
    return [*graph.add("MaxPoolPick", inputs, attrs=window, stem=stem, phase=BACKWARD, origin=op.origin), None]


def _pick_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    domain = _pool_domain(attrs, inputs, outputs)
    return Domain(domain.axes, (*domain.reads, _maps(inputs[1].shape)), domain.writes)


def _pick(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    windows = _windows(op, domain, box, inputs[0], 0)
    return [np.take_along_axis(windows, inputs[1][..., None].astype(np.intp), -1)[..., 0]]


def _global_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    n, k, h, w = inputs[0].shape
    axes = (Axis("n", n), Axis("k", k), Axis("h", h, "reduction"), Axis("w", w, "reduction"))
    return Domain(axes, (_maps((n, k, h, w)),), ((Along("n", n), Along("k", k), All(1), All(1)),))


def _global_grad_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    n, k, h, w = outputs[0].shape
    axes = tuple(Axis(name, size) for name, size in zip("nkhw", (n, k, h, w), strict=True))
    return Domain(axes, ((Along("n", n), Along("k", k), All(1), All(1)),), (_maps((n, k, h, w)),))


def _global_average(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    area = domain.axes[2].size * domain.axes[3].size
    return [inputs[0].sum((2, 3), keepdims=True) / inputs[0].dtype.type(area)]


def _global_average_grad(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    area = domain.axes[2].size * domain.axes[3].size
    return [np.broadcast_to(inputs[0] / inputs[0].dtype.type(area), extents(box)).copy()]


register(Row("MaxPool", _max_pool_shape, _pool_domain, _max_pool, _vjp("MaxPoolGrad"), kernel="max_pool"))
register(
    Row(
        "AveragePool",
        lambda attrs, inputs: [Spec(_pooled(attrs, inputs))],
        _pool_domain,
        _average_pool,
        _vjp("AveragePoolGrad"),
        kernel="average_pool",
    )
)
for _kind, _grad_vjp, _kernel in (
    ("MaxPoolGrad", _max_pool_grad_vjp, "max_pool_grad"),
    ("AveragePoolGrad", None, "average_pool_grad"),
):
    register(
        Row(
            _kind,
            lambda attrs, inputs: [Spec(attrs["input_shape"])],
            _pool_grad_domain,
            lambda op, domain, box, inputs: [unpooled(op, domain, box, inputs)],
            _grad_vjp,
            kernel=_kernel,
        )
    )
register(Row("MaxPoolPick", lambda attrs, inputs: [Spec(inputs[1].shape)], _pick_domain, _pick, kernel="max_pool_pick"))
register(
    Row(
        "GlobalAveragePool",
        lambda attrs, inputs: [Spec((*inputs[0].shape[:2], 1, 1))],
        _global_domain,
        _global_average,
        _vjp("GlobalAveragePoolGrad"),
        kernel="global_average_pool",
    )
)
register(
    Row(
        "GlobalAveragePoolGrad",
        lambda attrs, inputs: [Spec(attrs["input_shape"])],
        _global_grad_domain,
        _global_average_grad,
        kernel="global_average_pool_grad",
    )
)
