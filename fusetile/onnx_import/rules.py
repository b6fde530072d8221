"""What each ONNX op becomes. A rule reads a node and adds ops to the graph; the table RULES is at the end.

Source of the semantics: https://onnx.ai/onnx/operators, read per opset (an attribute in one is an input in another).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from fusetile.graph import UPDATE
from fusetile.onnx_import.importer import Importer, Node

Rule = Callable[[Importer, Node], None]


def _axes(importer: Importer, node: Node, axes: Sequence[int], rank: int) -> list[int]:
    """Axes counted from the front, in order."""
    if any(not -rank <= axis < rank for axis in axes):
        raise importer.refuse(node, f"axes {list(axes)} are not all dimensions of a tensor of {rank}")
    return sorted({axis % rank for axis in axes})


# -- windows ---------------------------------------------------------------------------------------------------------


def _window(importer: Importer, node: Node, x: str, kernel: Sequence[int]) -> dict[str, Any]:
    """strides, dilations and explicit pads (top, left, bottom, right) of a 2-D convolution or pool."""
    shape = importer.shape(x)
    if len(shape) != 4 or len(kernel) != 2:
        raise importer.refuse(node, f"only 2-D windows on [N, C, H, W] are supported; the input has shape {shape}")
    strides = tuple(node.attrs.get("strides", (1, 1)))
    dilations = tuple(node.attrs.get("dilations", (1, 1)))
    match node.attrs.get("auto_pad", "NOTSET"):
        case "NOTSET":
            pads = tuple(node.attrs.get("pads", (0, 0, 0, 0)))
        case "VALID":
            pads = (0, 0, 0, 0)
        case "SAME_UPPER" | "SAME_LOWER" as mode:
            # as many outputs as strides fit; an odd pad goes to the end (UPPER) or the start (LOWER)
            total = [
                max((-(-size // stride) - 1) * stride + dilation * (taps - 1) + 1 - size, 0)
                for size, stride, dilation, taps in zip(shape[2:], strides, dilations, kernel, strict=False)
            ]
            small, large = tuple(pad // 2 for pad in total), tuple(pad - pad // 2 for pad in total)
            pads = (*small, *large) if mode == "SAME_UPPER" else (*large, *small)
        case other:
            raise importer.refuse(node, f"auto_pad={other!r} is not one of NOTSET, VALID, SAME_UPPER, SAME_LOWER")
    if (len(strides), len(dilations), len(pads)) != (2, 2, 4):
        raise importer.refuse(
            node, f"strides {strides}, dilations {dilations}, pads {pads} must have 2, 2 and 4 numbers"
        )
    if min(strides) < 1 or min(dilations) < 1 or min(pads) < 0:
        raise importer.refuse(node, f"strides {strides}, dilations {dilations}, pads {pads}: need >= 1, >= 1, >= 0")
    return {"strides": strides, "dilations": dilations, "pads": pads}


def _conv(importer: Importer, node: Node) -> None:
    if (group := node.attrs.get("group", 1)) != 1:
        raise importer.refuse(node, f"group={group} is not supported; only group=1 is")
    x, w = importer.data(node), importer.parameter(node, 1, rank=4)
    out_channels, _, *kernel = importer.shape(w)
    if list(node.attrs.get("kernel_shape", kernel)) != kernel:
        raise importer.refuse(node, f"kernel_shape {node.attrs['kernel_shape']} is not that of its weights, {kernel}")
    bias = [importer.parameter(node, 2, shape=(out_channels,))] if node.has(2) else []
    importer.emit(node, "Conv", [x, w, *bias], _window(importer, node, x, kernel))


def _pool(importer: Importer, node: Node) -> tuple[str, dict[str, Any]]:
    x, kernel = importer.data(node), tuple(node.attrs["kernel_shape"])
    attrs = {"kernel": kernel, **_window(importer, node, x, kernel)}
    reach = [dilation * (taps - 1) + 1 for taps, dilation in zip(kernel, attrs["dilations"], strict=True)]
    if any(pad >= span for pad, span in zip(attrs["pads"], reach * 2, strict=True)):
        raise importer.refuse(node, f"pads {attrs['pads']} leave windows of {kernel} that hold nothing but padding")
    return x, attrs | {"ceil_mode": bool(node.attrs.get("ceil_mode", 0))}


def _max_pool(importer: Importer, node: Node) -> None:
    importer.require_unused(node, node.outputs[1:])
    x, attrs = _pool(importer, node)
    y = node.outputs[0]
    importer.emit(node, "MaxPool", [x], attrs, outputs=[y, importer.fresh(f"{y}.argmax")])


def _average_pool(importer: Importer, node: Node) -> None:
    x, attrs = _pool(importer, node)
    if (dilations := attrs.pop("dilations")) != (1, 1):
        raise importer.refuse(node, f"dilations {dilations} are not supported")
    attrs["count_include_pad"] = bool(node.attrs.get("count_include_pad", 0))
    importer.emit(node, "AveragePool", [x], attrs)


def _global_average_pool(importer: Importer, node: Node) -> None:
    x = importer.data(node)
    if len(importer.shape(x)) != 4:
        raise importer.refuse(node, f"its input has shape {importer.shape(x)}; only [N, C, H, W] is supported")
    importer.emit(node, "GlobalAveragePool", [x])


def _reduce_mean(importer: Importer, node: Node) -> None:
    """The mean over rows and columns: how newer exporters write global average pooling."""
    x = importer.data(node)
    shape = importer.shape(x)
    axes = importer.constant_input(node, 1, "axes").tolist() if node.has(1) else node.attrs.get("axes", [])
    if len(shape) != 4 or _axes(importer, node, axes, 4) != [2, 3]:
        raise importer.refuse(node, f"only the mean over axes 2 and 3 of [N, C, H, W] is supported, not {list(axes)}")
    if node.attrs.get("keepdims", 1):
        importer.emit(node, "GlobalAveragePool", [x])
    else:
        mean = importer.emit(node, "GlobalAveragePool", [x], outputs=[importer.fresh(f"{node.outputs[0]}.mean")])
        _reshape_to(importer, node, mean, shape[:2])


# -- normalization and dropout ---------------------------------------------------------------------------------------


def _batch_normalization(importer: Importer, node: Node) -> None:
    importer.require_unused(node, node.outputs[1:])
    if not node.attrs.get("spatial", 1):
        raise importer.refuse(node, "spatial=0 (statistics per pixel) is not supported")
    x, y = importer.data(node), node.outputs[0]
    shape = importer.shape(x)
    if len(shape) not in (2, 4):
        raise importer.refuse(node, f"its input has shape {shape}; supported are [N, C, H, W] and [N, C]")
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
    if mean in importer.graph.next_value or var in importer.graph.next_value:
        raise importer.refuse(
            node, f"its running statistics {mean!r}, {var!r} belong to another node too: use --bn frozen"
        )
    sums = importer.emit(node, "ChannelMoments", [x], outputs=[importer.fresh(f"{y}.sums")])
    importer.emit(node, "BatchStatistics", [sums], count | epsilon, outputs=stats)
    importer.emit(node, "Normalize", [x, *stats, gamma, beta], count)
    momentum = {"momentum": float(node.attrs.get("momentum", 0.9))}
    new = [importer.fresh(f"{name}.next") for name in (mean, var)]
    importer.emit(node, "RunningStatistics", [sums, mean, var], count | momentum, outputs=new, phase=UPDATE)
    importer.graph.next_value |= {mean: new[0], var: new[1]}


def _dropout(importer: Importer, node: Node) -> None:
    importer.require_unused(node, node.outputs[1:])
    site = importer.dropout_sites
    importer.dropout_sites += 1
    x = importer.data(node)
    ratio = float(importer.constant_input(node, 1, "ratio")) if node.has(1) else float(node.attrs.get("ratio", 0.5))
    ratio = ratio if importer.dropout is None else importer.dropout
    if not 0 <= ratio < 1:
        raise importer.refuse(node, f"ratio {ratio} is not in [0, 1); set it with --dropout")
    if ratio == 0:
        importer.same(node, x)
    else:
        attrs = {"ratio": ratio, "seed": importer.seed, "site": site}
        importer.emit(node, "Dropout", [x, importer.control("step")], attrs)


# -- pointwise -------------------------------------------------------------------------------------------------------


def _relu(importer: Importer, node: Node) -> None:
    importer.emit(node, "Relu", [importer.data(node)])


def _leaky_relu(importer: Importer, node: Node) -> None:
    importer.emit(node, "LeakyRelu", [importer.data(node)], {"alpha": float(node.attrs.get("alpha", 0.01))})


def _add(importer: Importer, node: Node) -> None:
    for i in (0, 1):
        if importer.weight(node.inputs[i]) is not None:
            return _add_bias(importer, node, bias=i)
    importer.emit(node, "Add", [importer.data(node, 0), importer.data(node, 1)])
    return None


def _add_bias(importer: Importer, node: Node, *, bias: int) -> None:
    """Conv or Gemm without a bias, then Add of a vector per channel: the same op with a bias."""
    x, array = importer.data(node, 1 - bias), importer.weight(node.inputs[bias])
    assert array is not None
    producer = importer.graph.producers().get(x)
    channels, wide = importer.shape(x)[1], (1,) * (len(importer.shape(x)) - 2)
    along_channels = array.shape in ((1, channels, *wide), (channels, *wide))
    if (
        not along_channels
        or producer is None
        or producer.kind not in ("Conv", "Gemm")
        or len(producer.inputs) != 2
        or importer.uses[node.inputs[1 - bias]] != 1
        or x != node.inputs[1 - bias]
    ):
        raise importer.refuse(
            node,
            f"adds {node.inputs[bias]!r} of shape {array.shape} to shape {importer.shape(x)}; supported are two "
            "feature maps of one shape, and a bias per channel right after a Conv, Gemm or MatMul that has none",
        )
    b = importer.parameter(node, bias, shape=(channels,))
    importer.graph.remove(producer)
    importer.emit(node, producer.kind, [*producer.inputs, b], producer.attrs)


def _identity(importer: Importer, node: Node) -> None:
    importer.same(node, node.inputs[0])


# -- fully connected -------------------------------------------------------------------------------------------------


def _matrix(importer: Importer, node: Node) -> str:
    x = importer.data(node)
    if len(importer.shape(x)) != 2:
        raise importer.refuse(node, f"its input must be [N, C]; it has shape {importer.shape(x)}")
    return x


def _gemm(importer: Importer, node: Node) -> None:
    """alpha * x @ w^T + beta * b, with the factors as Scale ops in front."""
    if node.attrs.get("transA", 0):
        raise importer.refuse(node, "transA=1 is not supported: the batch must be the first dimension of its input")
    x, y = _matrix(importer, node), node.outputs[0]
    w = importer.parameter(node, 1, rank=2, transposed=not node.attrs.get("transB", 0))
    operands = [x, w]
    if node.has(2):
        operands.append(importer.parameter(node, 2, shape=(importer.shape(w)[0],)))
    for i, key in ((0, "alpha"), (2, "beta")):
        factor = float(node.attrs.get(key, 1.0))
        if i < len(operands) and factor != 1:
            scaled = importer.fresh(f"{y}.{key}")
            operands[i] = importer.emit(node, "Scale", [operands[i]], {"factor": factor}, outputs=[scaled])
    importer.emit(node, "Gemm", operands)


def _mat_mul(importer: Importer, node: Node) -> None:
    x = _matrix(importer, node)
    importer.emit(node, "Gemm", [x, importer.parameter(node, 1, rank=2, transposed=True)])


def _transpose(importer: Importer, node: Node) -> None:
    """Of weights only: exporters write a fully connected layer without bias as MatMul(x, Transpose(w))."""
    w = importer.weight(node.inputs[0])
    if w is None or w.ndim != 2 or list(node.attrs.get("perm", [1, 0])) != [1, 0]:
        raise importer.refuse(node, "only the transpose of a weight matrix is supported, not of feature maps")
    importer.transpose(node)


# -- shape -----------------------------------------------------------------------------------------------------------


def _concat(importer: Importer, node: Node) -> None:
    inputs = [importer.data(node, i) for i in range(len(node.inputs))]
    rank = len(importer.shape(inputs[0]))
    (axis,) = _axes(importer, node, [node.attrs["axis"]], rank)
    if axis == 0 or any(len(importer.shape(name)) != rank for name in inputs):
        shapes = [importer.shape(name) for name in inputs]
        raise importer.refuse(node, f"can't join shapes {shapes} along axis {axis}: the batch must stay as it is")
    if len(inputs) == 1:
        importer.same(node, inputs[0])
    else:
        importer.emit(node, "Concat", inputs, {"axis": axis})


def _reshape_to(importer: Importer, node: Node, x: str, target: Sequence[int]) -> None:
    shape, target = importer.shape(x), tuple(int(size) for size in target)
    if target == shape:
        importer.same(node, x)
        return
    if prod(target) != prod(shape) or target[0] != shape[0]:
        raise importer.refuse(
            node,
            f"it turns shape {shape} into {target}, and the batch (first) must stay as it is. If a batch size is built "
            "into this node, export the model with a dynamic batch, or use that --batch",
        )
    if len(target) != 2:
        raise importer.refuse(node, f"it turns shape {shape} into {target}; only shapes [N, F] are supported")
    importer.emit(node, "Reshape", [x], {"shape": target})


def _reshape(importer: Importer, node: Node) -> None:
    x = importer.data(node)
    shape = importer.shape(x)
    target = importer.constant_input(node, 1, "shape").tolist()
    if not node.attrs.get("allowzero", 0):
        target = [shape[i] if size == 0 and i < len(shape) else size for i, size in enumerate(target)]
    if target[:1] == [importer.baked_batch]:
        target[0] = importer.batch  # the model was exported for another batch
    if -1 in target:
        known = prod(size for size in target if size != -1)
        target[target.index(-1)] = prod(shape) // known if known > 0 else 0
    _reshape_to(importer, node, x, target)


def _flatten(importer: Importer, node: Node) -> None:
    x = importer.data(node)
    shape = importer.shape(x)
    axis = node.attrs.get("axis", 1)
    if axis not in (1, 1 - len(shape)):
        raise importer.refuse(node, f"axis={axis} is not supported; only axis=1, which keeps the batch, is")
    _reshape_to(importer, node, x, (shape[0], prod(shape[1:])))


def _squeeze(importer: Importer, node: Node) -> None:
    x = importer.data(node)
    shape = importer.shape(x)
    axes = importer.constant_input(node, 1, "axes").tolist() if node.has(1) else node.attrs.get("axes")
    if axes is None:  # every dimension of one but the batch, which happens to be one
        axes = [i for i, size in enumerate(shape) if size == 1 and i > 0]
    dropped = _axes(importer, node, axes, len(shape))
    if any(shape[i] != 1 for i in dropped):
        raise importer.refuse(node, f"axes {dropped} of shape {shape} are not all of size 1")
    _reshape_to(importer, node, x, [size for i, size in enumerate(shape) if i not in dropped])


RULES: dict[str, Rule] = {
    "Add": _add,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Concat": _concat,
    "Conv": _conv,
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "Identity": _identity,
    "LeakyRelu": _leaky_relu,
    "MatMul": _mat_mul,
    "MaxPool": _max_pool,
    "ReduceMean": _reduce_mean,
    "Relu": _relu,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
}
