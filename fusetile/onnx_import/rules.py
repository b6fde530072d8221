"""What each ONNX op becomes. A rule reads a node and adds ops to the graph; the table RULES is at the end.

Source of the semantics: https://onnx.ai/onnx/operators, read per opset (an attribute in one is an input in another).
"""

from __future__ import annotations

import math
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
    if (groups := node.attrs.get("group", 1)) < 1:
        raise importer.refuse(node, f"group={groups} must be at least 1")
    x, w = importer.data(node), importer.parameter(node, 1, rank=4)
    out_channels, _, *kernel = importer.shape(w)
    if list(node.attrs.get("kernel_shape", kernel)) != kernel:
        raise importer.refuse(node, f"kernel_shape {node.attrs['kernel_shape']} is not that of its weights, {kernel}")
    bias = [importer.parameter(node, 2, shape=(out_channels,))] if node.has(2) else []
    attrs = _window(importer, node, x, kernel) | ({"groups": groups} if groups > 1 else {})
    importer.emit(node, "Conv", [x, w, *bias], attrs)


def _conv_transpose(importer: Importer, node: Node) -> None:
    """The input gradient of a convolution, as an op of the forward pass; a bias is added."""
    if node.attrs.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in node.attrs:
        raise importer.refuse(node, "auto_pad and output_shape are not supported; export it with explicit pads")
    x, w = importer.data(node), importer.parameter(node, 1, rank=4)
    shape, (channels, filters, *kernel) = importer.shape(x), importer.shape(w)
    attrs = _window(importer, node, x, kernel)
    groups, extra = node.attrs.get("group", 1), tuple(node.attrs.get("output_padding", (0, 0)))
    if shape[1] != channels or groups < 1 or channels % groups:
        raise importer.refuse(node, f"weights {importer.shape(w)} in {groups} groups do not fit the input {shape}")
    if len(extra) != 2 or any(not 0 <= more < stride for more, stride in zip(extra, attrs["strides"], strict=True)):
        raise importer.refuse(node, f"output_padding {extra} must be less than the strides {attrs['strides']}")
    sizes = [
        (size - 1) * stride - attrs["pads"][i] - attrs["pads"][i + 2] + dilation * (taps - 1) + 1 + extra[i]
        for i, (size, stride, dilation, taps) in enumerate(
            zip(shape[2:], attrs["strides"], attrs["dilations"], kernel, strict=True)
        )
    ]
    if min(sizes) < 1:
        raise importer.refuse(node, f"pads {attrs['pads']} leave nothing of its output")
    attrs |= {"input_shape": (shape[0], filters * groups, *sizes)} | ({"groups": groups} if groups > 1 else {})
    if not node.has(2):
        importer.emit(node, "ConvInputGrad", [x, w], attrs)
        return
    bias = importer.parameter(node, 2, shape=(filters * groups,))
    plain = importer.fresh(f"{node.outputs[0]}.plain")
    y = importer.emit(node, "ConvInputGrad", [x, w], attrs, outputs=[plain])
    importer.emit(node, "Add", [y, bias])


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


def _resize(importer: Importer, node: Node) -> None:
    """Nearest-neighbour upsampling by whole factors, in the forms in which all roundings agree."""
    x = importer.data(node)
    shape = importer.shape(x)
    if node.has(3):
        sizes = [int(size) for size in importer.constant_input(node, 3, "sizes")]
        factors = [size / old for size, old in zip(sizes[-2:], shape[-2:], strict=True)]
        same = len(sizes) == len(shape) == 4 and sizes[1] == shape[1]
    else:
        i = 1 if node.opset < 11 else 2
        array = importer.weight(node.inputs[i])
        if array is None:
            raise importer.refuse(node, f"its scales ({node.inputs[i]!r}) must be a constant")
        scales = array.tolist()
        factors, same = scales[-2:], len(scales) == len(shape) == 4 and scales[:2] == [1, 1]
    form = (
        node.attrs.get("coordinate_transformation_mode", "asymmetric" if node.opset < 11 else "half_pixel"),
        node.attrs.get("nearest_mode", "floor" if node.opset < 11 else "round_prefer_floor"),
    )
    forms = (("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"))
    whole = all(factor >= 1 and factor == int(factor) for factor in factors)
    if not same or not whole or form not in forms or node.attrs.get("mode", "nearest") != "nearest":
        raise importer.refuse(
            node,
            f"mode {node.attrs.get('mode', 'nearest')!r}, {form} by {factors} is not supported; only nearest by whole "
            f"factors of height and width is, with {' or '.join(map(str, forms))}",
        )
    importer.emit(node, "Upsample", [x], {"factors": tuple(int(factor) for factor in factors)})


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


def _function(kind: str, **defaults: float) -> Rule:
    """The rule of a function of one element; the node's attributes have these defaults."""

    def rule(importer: Importer, node: Node) -> None:
        attrs = {key: float(node.attrs.get(key, value)) for key, value in defaults.items()}
        importer.emit(node, kind, [importer.data(node)], attrs)

    return rule


def _gelu(importer: Importer, node: Node) -> None:
    match node.attrs.get("approximate", "none"):
        case "none":
            importer.emit(node, "Gelu", [importer.data(node)])
        case "tanh":
            importer.emit(node, "GeluTanh", [importer.data(node)])
        case other:
            raise importer.refuse(node, f"approximate={other!r} is neither 'none' nor 'tanh'")


def _clip(importer: Importer, node: Node) -> None:
    bounds = {"low": -math.inf, "high": math.inf}
    for i, (key, name) in enumerate((("low", "min"), ("high", "max")), 1):
        if node.has(i):
            bounds[key] = float(importer.constant_input(node, i, name))
        elif name in node.attrs:
            bounds[key] = float(node.attrs[name])
    importer.emit(node, "Clip", [importer.data(node)], bounds)


def _neg(importer: Importer, node: Node) -> None:
    importer.emit(node, "Scale", [importer.data(node)], {"factor": -1.0})


def _number(importer: Importer, name: str) -> float | None:
    """The value of an operand that is a constant of one element; what has dimensions may be a weight to train."""
    array = importer.weight(name)
    if array is None or array.size != 1 or (array.ndim and name in importer.initializers):
        return None
    return float(array.reshape(()))


def _operand(importer: Importer, node: Node, i: int) -> str:
    """Operand i of an arithmetic op: a feature map, or a weight with a number per channel or one for all."""
    array = importer.weight(node.inputs[i])
    if array is None:
        return importer.data(node, i)
    shape = importer.shape(importer.data(node, 1 - i))
    sizes = (1,) * (len(shape) - array.ndim) + array.shape
    if len(sizes) != len(shape) or any(size != 1 for axis, size in enumerate(sizes) if axis != 1):
        wanted = f"{(1, shape[1], *(1,) * (len(shape) - 2))} or of one element"
        raise importer.refuse(
            node, f"its operand {node.inputs[i]!r} has shape {array.shape}; a weight beside {shape} must be {wanted}"
        )
    if sizes[1] not in (1, shape[1]):
        raise importer.refuse(node, f"its operand {node.inputs[i]!r} of shape {array.shape} does not fit {shape}")
    return importer.parameter(node, i, shape=(sizes[1],))


def _arithmetic(importer: Importer, node: Node) -> None:
    """Add, Sub, Mul or Div; with a number it is a factor or an offset."""
    numbers = [_number(importer, name) for name in node.inputs]
    if numbers[0] is None and numbers[1] is None:
        importer.emit(node, node.kind, [_operand(importer, node, 0), _operand(importer, node, 1)])
        return
    first = numbers[0] is not None
    x, number = importer.data(node, int(first)), numbers[0] if first else numbers[1]
    assert number is not None
    if first and node.kind in ("Sub", "Div"):  # the number minus x, or over x
        kind, attrs = ("Scale", {"factor": -1.0}) if node.kind == "Sub" else ("Reciprocal", {})
        x = importer.emit(node, kind, [x], attrs, outputs=[importer.fresh(f"{node.outputs[0]}.turned")])
    if node.kind == "Div" and not first and number == 0:
        raise importer.refuse(node, f"it divides by {node.inputs[1]!r}, which is 0")
    match node.kind:
        case "Mul":
            importer.emit(node, "Scale", [x], {"factor": number})
        case "Div":
            importer.emit(node, "Scale", [x], {"factor": number if first else 1 / number})
        case "Sub":
            importer.emit(node, "Shift", [x], {"offset": number if first else -number})
        case _:
            importer.emit(node, "Shift", [x], {"offset": number})


def _pow(importer: Importer, node: Node) -> None:
    x, exponent = importer.data(node), _number(importer, node.inputs[1])
    match exponent:
        case 1.0:
            importer.same(node, x)
        case 2.0:
            importer.emit(node, "Mul", [x, x])
        case 0.5:
            importer.emit(node, "Sqrt", [x])
        case -1.0:
            importer.emit(node, "Reciprocal", [x])
        case _:
            raise importer.refuse(node, f"the exponent {node.inputs[1]!r} must be one of 2, 1, 0.5 and -1")


def _add(importer: Importer, node: Node) -> None:
    for i in (0, 1):
        if importer.weight(node.inputs[i]) is not None and _is_bias(importer, node, bias=i):
            return _add_bias(importer, node, bias=i)
    return _arithmetic(importer, node)


def _is_bias(importer: Importer, node: Node, *, bias: int) -> bool:
    """Whether an Add gives a bias to the Conv or Gemm before it, which has none and which nothing else reads."""
    x, array = importer.data(node, 1 - bias), importer.weight(node.inputs[bias])
    assert array is not None
    producer = importer.graph.producers().get(x)
    channels, wide = importer.shape(x)[1], (1,) * (len(importer.shape(x)) - 2)
    return (
        array.shape in ((1, channels, *wide), (channels, *wide))
        and producer is not None
        and producer.kind in ("Conv", "Gemm")
        and len(producer.inputs) == 2
        and importer.uses[node.inputs[1 - bias]] == 1
        and x == node.inputs[1 - bias]
    )


def _add_bias(importer: Importer, node: Node, *, bias: int) -> None:
    """Conv or Gemm without a bias, then Add of a vector per channel: the same op with a bias."""
    x = importer.data(node, 1 - bias)
    producer = importer.graph.producers()[x]
    b = importer.parameter(node, bias, shape=importer.shape(x)[1:2])
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
    "Abs": _function("Abs"),
    "Add": _add,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Celu": _function("Celu", alpha=1.0),
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Div": _arithmetic,
    "Dropout": _dropout,
    "Elu": _function("Elu", alpha=1.0),
    "Erf": _function("Erf"),
    "Exp": _function("Exp"),
    "Flatten": _flatten,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "HardSigmoid": _function("HardSigmoid", alpha=0.2, beta=0.5),
    "HardSwish": _function("HardSwish"),
    "Identity": _identity,
    "LeakyRelu": _leaky_relu,
    "MatMul": _mat_mul,
    "MaxPool": _max_pool,
    "Mish": _function("Mish"),
    "Mul": _arithmetic,
    "Neg": _neg,
    "Pow": _pow,
    "Reciprocal": _function("Reciprocal"),
    "ReduceMean": _reduce_mean,
    "Relu": _relu,
    "Reshape": _reshape,
    "Resize": _resize,
    "Selu": _function("Selu", alpha=1.67326319217681884765625, gamma=1.05070102214813232421875),
    "Sigmoid": _function("Sigmoid"),
    "Softplus": _function("Softplus"),
    "Softsign": _function("Softsign"),
    "Sqrt": _function("Sqrt"),
    "Squeeze": _squeeze,
    "Sub": _arithmetic,
    "Tanh": _function("Tanh"),
    "Transpose": _transpose,
}
