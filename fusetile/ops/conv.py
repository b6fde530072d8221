"""Convolution and its gradients; the fully connected layer (Gemm) is the same without rows and columns.

    y[n,k,h,w] = b[k] + sum over c,r,s of x[n, c, h*stride - pad + r*dilation, w*stride - pad + s*dilation] * w[k,c,r,s]

A device that has only a part of the reduction (c) computes a partial sum; the part that starts at channel 0 adds the
bias. After fusion the op has an `activation`, which is not linear: then c is no axis and can't be cut.

With `groups`, a group of K/groups output channels reads its own C/groups input channels only. Then c is no axis either:
k is the one axis of channels, of the output in the convolution and its weight gradient, of dx in the input gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusetile.box import Box, Interval, extents
from fusetile.errors import UserError
from fusetile.graph import BACKWARD, Graph, Op, Tensor
from fusetile.ops.base import (
    Access,
    All,
    Along,
    Array,
    Attrs,
    Axis,
    Dim,
    Domain,
    Groups,
    Row,
    Spec,
    Spread,
    Window,
    channel_access,
    padded,
    register,
)
from fusetile.ops.pointwise import activate


def output_size(size: int, taps: int, stride: int, dilation: int, pad: int) -> int:
    """Rows of a convolution's output; `pad` is the sum of both sides."""
    return (size + pad - dilation * (taps - 1) - 1) // stride + 1


def spatial(attrs: Attrs, kernel: Sequence[int]) -> list[tuple[str, int, int, int, int]]:
    """(axis, taps, stride, dilation, pad before) for rows and columns; none for Gemm."""
    if not kernel:
        return []
    return list(zip("hw", kernel, attrs["strides"], attrs["dilations"], attrs["pads"][:2], strict=True))


def _conv_shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    x, w = inputs[:2]
    groups = attrs.get("groups", 1)
    if len(x.shape) != len(w.shape) or x.shape[1] != w.shape[1] * groups or w.shape[0] % groups:
        in_groups = f" in {groups} groups" if groups > 1 else ""
        raise UserError(
            f"weight {w.name!r} of shape {w.shape} does not fit the input {x.name!r} of shape {x.shape}{in_groups}"
        )
    sizes = [
        output_size(size, taps, stride, dilation, before + attrs["pads"][i + 2])
        for i, (size, (_, taps, stride, dilation, before)) in enumerate(
            zip(x.shape[2:], spatial(attrs, w.shape[2:]), strict=True)
        )
    ]
    if min(sizes, default=1) < 1:
        raise UserError(f"input {x.name!r} of shape {x.shape} is smaller than the window {w.shape[2:]} of {w.name!r}")
    return [Spec((x.shape[0], w.shape[0], *sizes))]


def _maps(attrs: Attrs, x: Sequence[int], kernel: Sequence[int]) -> Access:
    """What the windows of (n, c, h, w) read of x."""
    dims: list[Dim] = [Along("n", x[0]), Along("c", x[1])]
    for size, (axis, taps, stride, dilation, pad) in zip(x[2:], spatial(attrs, kernel), strict=True):
        dims.append(Window(axis, size, taps, stride, dilation, pad))
    return tuple(dims)


def _outputs(y: Sequence[int]) -> Access:
    """(n, k, h, w) of y."""
    return tuple(Along(axis, size) for axis, size in zip("nkhw", y, strict=False))


def _filter(w: Sequence[int]) -> Access:
    """(k, c) of the weights, the window whole."""
    return (Along("k", w[0]), Along("c", w[1]), *(All(size) for size in w[2:]))


def _grouped(access: Access, size: int, per: int, times: int) -> Access:
    """An access whose dimension 1 is that of the groups that the channels k belong to."""
    return (access[0], Groups("k", size, per, times), *access[2:])


def _group_sizes(attrs: Attrs, k: int, c: int) -> tuple[int, int]:
    """Output and input channels of a group."""
    return k // attrs["groups"], c // attrs["groups"]


def _pieces(attrs: Attrs, k: Interval, k_size: int, c: Interval, c_size: int) -> list[tuple[slice, slice, slice]]:
    """Per group that intervals of output and input channels share: its part of both, counted from their starts, and of
    the input channels of the weights."""
    if attrs.get("groups", 1) == 1:
        return [(slice(None), slice(None), slice(None))]
    per_k, per_c = _group_sizes(attrs, k_size, c_size)
    found = []
    for group in range(max(k[0] // per_k, c[0] // per_c), min(-(-k[1] // per_k), -(-c[1] // per_c))):
        k0, k1 = max(k[0], group * per_k), min(k[1], (group + 1) * per_k)
        c0, c1 = max(c[0], group * per_c), min(c[1], (group + 1) * per_c)
        own = slice(c0 - group * per_c, c1 - group * per_c)
        found.append((slice(k0 - k[0], k1 - k[0]), slice(c0 - c[0], c1 - c[0]), own))
    return found


def _conv_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    x, w, y = inputs[0].shape, inputs[1].shape, outputs[0].shape
    if attrs.get("groups", 1) > 1:
        per_k, per_c = _group_sizes(attrs, w[0], x[1])
        split = (Axis("n", y[0]), Axis("k", y[1], group=(per_k, per_c)), Axis("h", y[2]), Axis("w", y[3]))
        weights: Access = (Along("k", w[0]), *(All(size) for size in w[1:]))
        maps = _grouped(_maps(attrs, x, w[2:]), x[1], per_k, per_c)
        return Domain(split, (maps, weights, *(channel_access(w[0]) for _ in inputs[2:])), (_outputs(y),))
    axes = tuple(Axis(name, size) for name, size in zip("nkhw", y, strict=False))
    reads = [_maps(attrs, x, w[2:]), _filter(w), *[channel_access(w[0]) for _ in inputs[2:]]]
    if attrs.get("activation"):
        reads = [tuple(All(d.size) if isinstance(d, Along) and d.axis == "c" else d for d in read) for read in reads]
    else:
        axes += (Axis("c", x[1], "reduction"),)
    return Domain(axes, tuple(reads), (_outputs(y),))


def _conv(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    w = inputs[1]
    x = padded(domain, box, 0, inputs[0])
    sizes = extents(domain.output(box))
    y = np.zeros(sizes, x.dtype)
    taps = spatial(op.attrs, w.shape[2:])
    dims = [dim.size for dim in (domain.writes[0][1], domain.reads[0][1])]
    pieces = _pieces(op.attrs, domain.output(box)[1], dims[0], domain.reach(box, 0)[1], dims[1])
    for tap in np.ndindex(*w.shape[2:]):
        window = tuple(
            slice(t * dilation, t * dilation + (size - 1) * stride + 1, stride)
            for t, size, (_, _, stride, dilation, _) in zip(tap, sizes[2:], taps, strict=True)
        )
        for k, c, own in pieces:
            y[:, k] += np.moveaxis(np.tensordot(x[:, c, *window], w[k, own, *tap], (1, 1)), -1, 1)
    if len(inputs) == 3 and (not domain.has("c") or domain.interval(box, "c")[0] == 0):
        y += inputs[2].reshape(-1, *[1] * (y.ndim - 2))
    return [activate(y, op.attrs)]


def _conv_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    (dy,) = grads
    assert dy is not None
    x, w = op.inputs[:2]
    common: dict[str, Any] = {"phase": BACKWARD, "origin": op.origin}
    shape = graph.tensors[x].shape
    window = {key: op.attrs[key] for key in ("strides", "dilations", "pads", "groups") if key in op.attrs}
    kernel = graph.tensors[w].shape[2:]
    (dx,) = graph.add(
        f"{op.kind}InputGrad", [dy, w], attrs={**window, "input_shape": shape}, stem=f"grad.{x}", **common
    )
    (dw,) = graph.add(
        f"{op.kind}WeightGrad", [x, dy], attrs={**window, "kernel_shape": kernel}, stem=f"grad.{w}", **common
    )
    db = [graph.add("ChannelSum", [dy], stem=f"grad.{b}", **common)[0] for b in op.inputs[2:]]
    return [dx, dw, *db]


def _transposed_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    """Of an input gradient in the forward pass, which is a transposed convolution: the roles are swapped."""
    dy, (x, w) = grads[0], op.inputs
    assert dy is not None
    common: dict[str, Any] = {"phase": BACKWARD, "origin": op.origin}
    window = {key: op.attrs[key] for key in ("strides", "dilations", "pads", "groups") if key in op.attrs}
    kernel = graph.tensors[w].shape[2:]
    (dx,) = graph.add("Conv", [dy, w], attrs=window, stem=f"grad.{x}", **common)
    (dw,) = graph.add("ConvWeightGrad", [dy, x], attrs={**window, "kernel_shape": kernel}, stem=f"grad.{w}", **common)
    return [dx, dw]


# -- input gradient --------------------------------------------------------------------------------------------------


def _input_grad_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    dy, w, x = inputs[0].shape, inputs[1].shape, outputs[0].shape
    spread = tuple(
        Spread(axis, size, taps, stride, dilation, pad)
        for size, (axis, taps, stride, dilation, pad) in zip(dy[2:], spatial(attrs, w[2:]), strict=True)
    )
    if attrs.get("groups", 1) > 1:
        per_k, per_c = _group_sizes(attrs, w[0], x[1])
        grouped = (Axis("n", x[0]), Axis("k", x[1], group=(per_c, per_k)), Axis("h", x[2]), Axis("w", x[3]))
        k = Groups("k", w[0], per_c, per_k)
        weights: Access = (k, *(All(size) for size in w[1:]))
        return Domain(grouped, ((Along("n", dy[0]), k, *spread), weights), (_outputs(x),))
    axes = (*(Axis(name, size) for name, size in zip("nchw", x, strict=False)), Axis("k", w[0], "reduction"))
    reads: Access = (Along("n", dy[0]), Along("k", dy[1]), *spread)
    writes = tuple(Along(axis, size) for axis, size in zip("nchw", x, strict=False))
    return Domain(axes, (reads, _filter(w)), (writes,))


def scatter_rows(
    box: Box, need: Box, dims: Sequence[tuple[str, int, int, int, int]], tap: Sequence[int], domain: Domain
) -> tuple[tuple[Array, Array], ...]:
    """For one tap, per spatial dimension: which rows of the needed dy land in the box, and where in the box."""
    found = []
    for t, (axis, _, stride, dilation, pad), (first, last) in zip(tap, dims, need[2:], strict=True):
        start, stop = domain.interval(box, axis)
        rows = np.arange(first, last)
        target = rows * stride - pad + t * dilation
        inside = (target >= start) & (target < stop)
        found.append((rows[inside] - first, target[inside] - start))
    return tuple(found)


def _input_grad(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    dy, w = inputs
    need = domain.need(box, 0)
    dx = np.zeros(extents(domain.output(box)), dy.dtype)
    dims = spatial(op.attrs, w.shape[2:])
    channels = [dim.size for dim in (domain.reads[0][1], domain.writes[0][1])]
    pieces = _pieces(op.attrs, need[1], channels[0], domain.output(box)[1], channels[1])
    for tap in np.ndindex(*w.shape[2:]) if dy.size else ():  # with strides, a box may lie between all windows
        found = scatter_rows(box, need, dims, tap, domain)
        part = np.empty((dy.shape[0], dx.shape[1], *dy.shape[2:]), dy.dtype)
        for k, c, own in pieces:
            part[:, c] = np.moveaxis(np.tensordot(dy[:, k], w[k, own, *tap], (1, 0)), -1, 1)
        for axis, (source, _) in enumerate(found, 2):
            part = part.take(source, axis)
        lead = [np.arange(size) for size in dx.shape[:2]]
        dx[np.ix_(*lead, *(target for _, target in found))] += part
    return [dx]


# -- weight gradient -------------------------------------------------------------------------------------------------


def _weight_grad_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    x, dy, w = inputs[0].shape, inputs[1].shape, outputs[0].shape
    reduced = (("n", dy[0]), *zip("hw", dy[2:], strict=False))
    if attrs.get("groups", 1) > 1:
        per_k, per_c = _group_sizes(attrs, w[0], x[1])
        k = Axis("k", w[0], group=(per_k, per_c))
        maps = _grouped(_maps(attrs, x, w[2:]), x[1], per_k, per_c)
        grouped = (k, *(Axis(name, size, "reduction") for name, size in reduced))
        kept: Access = (Along("k", w[0]), *(All(size) for size in w[1:]))
        return Domain(grouped, (maps, _outputs(dy)), (kept,))
    axes = (Axis("k", w[0]), Axis("c", w[1]), *(Axis(name, size, "reduction") for name, size in reduced))
    return Domain(axes, (_maps(attrs, x, w[2:]), _outputs(dy)), (_filter(w),))


def _weight_grad(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    x, dy = padded(domain, box, 0, inputs[0]), inputs[1]
    kernel = op.attrs["kernel_shape"]
    dw = np.zeros(extents(domain.output(box)), x.dtype)
    channels = [dim.size for dim in (domain.reads[1][1], domain.reads[0][1])]
    pieces = _pieces(op.attrs, domain.need(box, 1)[1], channels[0], domain.reach(box, 0)[1], channels[1])
    summed = [0, *range(2, dy.ndim)]
    for tap in np.ndindex(*kernel):
        window = tuple(
            slice(t * dilation, t * dilation + (size - 1) * stride + 1, stride)
            for t, size, (_, _, stride, dilation, _) in zip(tap, dy.shape[2:], spatial(op.attrs, kernel), strict=True)
        )
        for k, c, own in pieces:
            dw[k, own, *tap] = np.tensordot(dy[:, k], x[:, c, *window], (summed, summed))
    return [dw]


def _channel_sum_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    dy = inputs[0].shape
    axes = [Axis(name, size, "reduction") for name, size in zip("nkhw", dy, strict=False)]
    axes[1] = Axis("k", dy[1])
    return Domain(tuple(axes), (_outputs(dy),), (channel_access(dy[1]),))


def _flops(attrs: Attrs, inputs: Sequence[Tensor]) -> float:
    window, groups = float(np.prod(attrs.get("kernel_shape", inputs[1].shape[2:]))), attrs.get("groups", 1)
    if "input_shape" in attrs:  # each iteration meets those taps that the stride brings to it
        window /= float(np.prod(attrs.get("strides", (1,))))
    if groups == 1 and not attrs.get("activation"):
        return 2 * window
    # the channels, of a group, that one iteration adds up
    inner = inputs[0].shape[1] // groups if "kernel_shape" in attrs or "input_shape" in attrs else inputs[1].shape[1]
    return 2 * window * inner


for _kind in ("Conv", "Gemm"):
    register(
        Row(_kind, _conv_shape, _conv_domain, _conv, _conv_vjp, flops=_flops, kernel="conv", padded=(0,)),
    )
    register(
        Row(
            f"{_kind}InputGrad",
            lambda attrs, inputs: [Spec(attrs["input_shape"])],
            _input_grad_domain,
            _input_grad,
            _transposed_vjp if _kind == "Conv" else None,
            flops=_flops,
            kernel="conv_input_grad",
            padded=(0,),
        )
    )
    register(
        Row(
            f"{_kind}WeightGrad",
            lambda attrs, inputs: [
                Spec(
                    (inputs[1].shape[1], inputs[0].shape[1] // attrs.get("groups", 1), *attrs["kernel_shape"]),
                    kind="filter",
                )
            ],
            _weight_grad_domain,
            _weight_grad,
            flops=_flops,
            kernel="conv_weight_grad",
            padded=(0,),
        )
    )

register(
    Row(
        "ChannelSum",
        lambda attrs, inputs: [Spec((inputs[0].shape[1],))],
        _channel_sum_domain,
        lambda op, domain, box, inputs: [inputs[0].sum(tuple(i for i in range(inputs[0].ndim) if i != 1))],
        kernel="channel_sum",
    )
)
