"""Normalization, and dropout."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from fusetile.graph import UPDATE, Parameter
from fusetile.onnx_import.contents import Node
from fusetile.onnx_import.importer import Importer
from fusetile.onnx_import.rules.broadcast import operands
from fusetile.onnx_import.rules.common import finish
from fusetile.onnx_import.rules.reduce import reducible
from fusetile.onnx_import.views import View


def batch_normalization(importer: Importer, node: Node) -> None:
    """By the batch's statistics, or by the running ones if `bn` is frozen; by what the model computes, in its parts."""
    importer.require_unused(node, node.outputs[1:])
    if not node.attrs.get("spatial", 1):
        raise importer.refuse(node, "spatial=0 (statistics per pixel) is not supported")
    if any(importer.weight(name) is None for name in node.inputs[3:5]):
        _without_running_statistics(importer, node)
        return
    x, y = importer.data(node), node.outputs[0]
    shape = importer.shape(x)
    if len(shape) not in (2, 3, 4):
        raise importer.refuse(node, f"its input has shape {shape}; supported are [N, C, H, W], [N, C, W] and [N, C]")
    gamma, beta, mean, var = (importer.parameter(node, i, shape=shape[1:2], trainable=i < 3) for i in (1, 2, 3, 4))
    epsilon = {"epsilon": float(node.attrs.get("epsilon", 1e-5))}
    stats = [importer.fresh(f"{y}.stats")]
    if importer.bn == "frozen":
        importer.emit(node, "FrozenStatistics", [mean, var], epsilon, outputs=stats)
        importer.emit(node, "Normalize", [x, *stats, gamma, beta], {"count": 0})
        return
    count = {"count": prod(shape) // shape[1]}
    if count["count"] < 2:
        raise importer.refuse(
            node, f"one value per channel (shape {shape}) has no variance: use a larger batch or --bn frozen"
        )
    sums = importer.emit(node, "ChannelMoments", [x], outputs=[importer.fresh(f"{y}.sums")])
    importer.emit(node, "BatchStatistics", [sums], count | epsilon, outputs=stats)
    importer.emit(node, "Normalize", [x, *stats, gamma, beta], count)
    _update_statistics(importer, node, sums, (mean, var), count | {"momentum": float(node.attrs.get("momentum", 0.9))})


def _without_running_statistics(importer: Importer, node: Node) -> None:
    """Of a network that keeps none, as of weights that are standardized, exporters compute them in front of the node.
    In training mode they do not matter; otherwise they are what it normalizes by."""
    view = importer.view(node)
    view, shape = reducible(importer, node, view, [axis for axis in range(len(view.dims)) if axis != 1])
    epsilon = float(node.attrs.get("epsilon", 1e-5))
    if node.attrs.get("training_mode", 0):
        plain = _standardized(importer, node, view.base, shape, epsilon)
    else:
        view = importer.whole(importer.tensor(node, view))
        mean, variance = (importer.vector(node, i, view.shape[1]) for i in (3, 4))
        centred = importer.step(node, "centred", "Sub", [view.base, mean])
        raised = importer.step(node, "raised", "Shift", [variance], {"offset": epsilon})
        deviation = importer.step(node, "deviation", "Sqrt", [raised])
        inverse = importer.step(node, "inverse", "Reciprocal", [deviation])
        plain = importer.step(node, "plain", "Mul", [centred, inverse])
    _affine(importer, node, view.over(plain))


def _update_statistics(
    importer: Importer, node: Node, sums: str, running: tuple[str, str], attrs: dict[str, float]
) -> None:
    """Running statistics that several nodes share see one batch after the other."""
    graph = importer.graph
    if running[0] not in graph.next_value and running[1] not in graph.next_value:
        new = [importer.fresh(f"{name}.next") for name in running]
        importer.emit(node, "RunningStatistics", [sums, *running], attrs, outputs=new, phase=UPDATE)
        graph.next_value |= dict(zip(running, new, strict=True))
        return
    update = graph.producers()[graph.next_value[running[0]]]
    if update.inputs[1:3] != running or dict(update.attrs) != attrs:
        raise importer.refuse(
            node, f"its running statistics {running[0]!r}, {running[1]!r} belong to another node too: use --bn frozen"
        )
    graph.replace_op(update, inputs=(*update.inputs, sums))


def _standardized(
    importer: Importer, node: Node, x: str, shape: Sequence[int], epsilon: float, *, groups: int = 0
) -> str:
    """(x - mean) / deviation over what `shape` lacks; with groups, over groups of channels too."""
    count, per_group = prod(importer.shape(x)) // prod(shape), shape[1] // groups if groups else 1
    counts = {"count": count * per_group, "per_group": per_group}
    labels = [importer.fresh(f"{node.outputs[0]}.{label}") for label in ("sum", "squares", "mean", "inverse")]
    add, common = importer.graph.add, {"origin": node.origin}
    sums = add("Moments", [x], attrs={"shape": tuple(shape)}, outputs=labels[:2], **common)
    statistics = add("Statistics", sums, attrs={**counts, "epsilon": epsilon}, outputs=labels[2:], **common)
    neutral = [importer.fresh(f"{node.outputs[0]}.{label}") for label in ("one", "zero")]
    for name, number in zip(neutral, (1, 0), strict=True):
        importer.graph.add_parameter(name, Parameter(np.full(1, number, np.float32), trainable=False))
    return importer.step(node, "plain", "Standardize", [x, *statistics, *neutral], counts)


def instance_normalization(importer: Importer, node: Node) -> None:
    """Per image and channel. Exporters write normalization of groups as that of [N, groups, -1], with scales of one."""
    view = importer.view(node)
    epsilon = float(node.attrs.get("epsilon", 1e-5))
    groups = 0
    stored = importer.shape(view.base)
    if len(view.dims) == 3 and len(stored) == 4 and view.dims[:2] != importer.whole(view.base).dims[:2]:
        flat = View(view.base, importer.whole(view.base).dims).reshaped((stored[0], view.shape[1], view.shape[2]))
        if flat is not None and flat.dims == view.dims and stored[1] % view.shape[1] == 0:
            groups = view.shape[1]
    if groups:
        x, shape = view.base, (*stored[:2], 1, 1)
    else:
        view, shape = reducible(importer, node, view, range(2, len(view.dims)))
        x = view.base
    plain = _standardized(importer, node, x, shape, epsilon, groups=groups)
    _affine(importer, node, view.over(plain), per_group=bool(groups))


def _affine(importer: Importer, node: Node, view: View, *, per_group: bool = False) -> None:
    """Times a scale and plus a bias per channel (dimension 1), inputs 1 and 2. Constants that do nothing are left out,
    and so are ones and zeros per group, which exporters write where a network has no such weights."""
    channels = view.shape[1]
    if importer.shape(view.base)[1] != channels or view.dims[1] != importer.whole(view.base).dims[1]:
        view = importer.whole(importer.tensor(node, view)) if not per_group else view
    left = []
    for i, kind, nothing in ((1, "Mul", 1), (2, "Add", 0)):
        array = importer.weight(node.inputs[i])
        fixed = per_group or not importer.is_initializer(node.inputs[i])
        if array is None or not fixed or (array != nothing).any():
            left.append((i, kind))
    if left and per_group:
        raise importer.refuse(node, "scales and biases per group are not supported")
    for i, kind in left:
        vector = importer.vector(node, i, channels)
        if (i, kind) == left[-1]:
            finish(importer, node, kind, [view.base, vector], dims=importer.seen_through(view))
            return
        view = view.over(importer.step(node, "scaled", kind, [view.base, vector]))
    importer.define(node, view)


def group_normalization(importer: Importer, node: Node) -> None:
    """Scale and bias are per channel since opset 21, per group before it."""
    x, groups = importer.data(node), int(node.attrs["num_groups"])
    shape = importer.shape(x)
    if len(shape) != 4 or shape[1] % groups:
        raise importer.refuse(node, f"{groups} groups of shape {shape} are not supported; only of [N, C, H, W]")
    epsilon = float(node.attrs.get("epsilon", 1e-5))
    plain = _standardized(importer, node, x, (*shape[:2], 1, 1), epsilon, groups=groups)
    if importer.constant_shape(node, 1) != (groups,) or groups == shape[1]:
        _affine(importer, node, importer.whole(plain))
        return
    scaled = importer.step(node, "scaled", "Mul", [plain, _spread(importer, node, 1, shape[1] // groups)])
    importer.emit(node, "Add", [scaled, _spread(importer, node, 2, shape[1] // groups)])


def _spread(importer: Importer, node: Node, i: int, per_group: int) -> str:
    """A weight with one number per group as a vector with one per channel."""
    (groups,) = importer.constant_shape(node, i)
    column = importer.parameter(node, i, shape=(groups, 1), kind="map")
    wide = importer.step(node, f"wide{i}", "Expand", [column], {"shape": (groups, per_group)})
    dims = (((0, groups, 1), (1, per_group, 1)),)
    return importer.step(node, f"spread{i}", "Rearrange", [wide], {"dims": dims})


def layer_normalization(importer: Importer, node: Node) -> None:
    """Over all dimensions from `axis` on."""
    importer.require_unused(node, node.outputs[1:])
    view = importer.view(node)
    rank = len(view.dims)
    axis = int(node.attrs.get("axis", -1)) % rank
    view, shape = reducible(importer, node, view, range(axis, rank))
    standard = _standardized(importer, node, view.base, shape, float(node.attrs.get("epsilon", 1e-5)))
    plain = importer.fresh(f"{node.outputs[0]}.normal")
    importer.define(node, view.over(standard), plain)
    for i, kind in ((1, "Mul"), (2, "Add")):
        if not node.has(i):
            continue
        last = i == 2 or not node.has(2)
        output = node.outputs[0] if last else importer.fresh(f"{node.outputs[0]}.scaled")
        pair = Node(kind, (plain, node.inputs[i]), (output,), {}, node.origin, node.opset)
        inputs, dims = operands(importer, pair, (0, 1))
        finish(importer, pair, kind, inputs, dims=dims)
        plain = output


def local_response_normalization(importer: Importer, node: Node) -> None:
    """x / (bias + alpha / size * sum of x^2 over the channels around)^beta: that sum is a 1x1 convolution with a band
    of ones."""
    x = importer.data(node)
    shape, size = importer.shape(x), int(node.attrs["size"])
    if len(shape) != 4:
        raise importer.refuse(node, f"its input has shape {shape}; only [N, C, H, W] is supported")
    alpha, beta = float(node.attrs.get("alpha", 1e-4)), float(node.attrs.get("beta", 0.75))
    bias = float(node.attrs.get("bias", 1.0))
    distance = np.arange(shape[1])[None] - np.arange(shape[1])[:, None]
    band = ((distance >= -((size - 1) // 2)) & (distance <= size // 2)).astype(np.float32) * np.float32(alpha / size)
    square = importer.step(node, "square", "Mul", [x, x])
    around = importer.convolved(node, square, band.reshape(shape[1], shape[1], 1, 1), "around")
    base = importer.step(node, "raised", "Shift", [around], {"offset": bias})
    factor = importer.step(node, "factor", "Power", [base], {"exponent": -beta})
    importer.emit(node, "Mul", [x, factor])


def lp_normalization(importer: Importer, node: Node) -> None:
    """x over its length along one axis."""
    view = importer.view(node)
    if int(node.attrs.get("p", 2)) != 2:
        raise importer.refuse(node, "only p=2 is supported")
    view, shape = reducible(importer, node, view, [int(node.attrs.get("axis", -1)) % len(view.dims)])
    square = importer.step(node, "square", "SumTo", [view.base, view.base], {"shape": shape})
    length = importer.step(node, "length", "Sqrt", [square])
    finish(importer, node, "Div", [view.base, length], dims=importer.seen_through(view))


def dropped(importer: Importer, node: Node, x: str, ratio: float, name: str = "") -> str:
    """x after a dropout of this ratio, or of the one that overrides all; called `name` if that is given."""
    ratio = ratio if importer.dropout is None else importer.dropout
    site = importer.dropout_sites
    importer.dropout_sites += 1
    if not 0 <= ratio < 1:
        raise importer.refuse(node, f"ratio {ratio} is not in [0, 1); set it with --dropout")
    if ratio == 0:
        return x
    attrs = {"ratio": ratio, "seed": importer.seed, "site": site}
    outputs = [name or importer.fresh(f"{node.outputs[0]}.dropped")]
    return importer.emit(node, "Dropout", [x, importer.control("step")], attrs, outputs=outputs)


def dropout(importer: Importer, node: Node) -> None:
    """With the ratio of the node, or the one that the options give."""
    importer.require_unused(node, node.outputs[1:])
    view = importer.view(node)
    ratio = float(importer.constant_input(node, 1, "ratio")) if node.has(1) else float(node.attrs.get("ratio", 0.5))
    whole = importer.seen_through(view) is None
    kept = dropped(importer, node, view.base, ratio, node.outputs[0] if whole else "")
    if kept != node.outputs[0]:
        importer.define(node, view.over(kept))
