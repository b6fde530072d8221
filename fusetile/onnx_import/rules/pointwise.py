"""Functions of one element, and arithmetic that broadcasts."""

from __future__ import annotations

import math
from dataclasses import replace
from math import prod

import numpy as np

from fusetile.onnx_import.contents import Node
from fusetile.onnx_import.importer import Importer
from fusetile.onnx_import.rules.broadcast import operands
from fusetile.onnx_import.rules.common import Rule, finish, number_of, pointwise
from fusetile.onnx_import.rules.masks import masked
from fusetile.onnx_import.views import View


def function(kind: str, **defaults: float) -> Rule:
    """The rule of a function of one element; the node's attributes have these defaults."""

    def rule(importer: Importer, node: Node) -> None:
        attrs = {key: float(node.attrs.get(key, value)) for key, value in defaults.items()}
        pointwise(importer, node, kind, importer.view(node), attrs)

    return rule


def gelu(importer: Importer, node: Node) -> None:
    """Exact, or by a hyperbolic tangent."""
    kinds = {"none": "Gelu", "tanh": "GeluTanh"}
    form = node.attrs.get("approximate", "none")
    if form not in kinds:
        raise importer.refuse(node, f"approximate={form!r} is neither 'none' nor 'tanh'")
    pointwise(importer, node, kinds[form], importer.view(node))


def clip(importer: Importer, node: Node) -> None:
    """Its bounds are attributes before opset 11."""
    bounds = {"low": -math.inf, "high": math.inf}
    for i, (key, name) in enumerate((("low", "min"), ("high", "max")), 1):
        if node.has(i):
            bounds[key] = float(importer.constant_input(node, i, name).reshape(()))
        elif name in node.attrs:
            bounds[key] = float(node.attrs[name])
    pointwise(importer, node, "Clip", importer.view(node), bounds)


def hyperbolic(kind: str) -> Rule:
    """(exp(x) + exp(-x)) / 2, which is Cosh, or the difference, Sinh."""

    def rule(importer: Importer, node: Node) -> None:
        view = importer.view(node)
        minus = importer.step(node, "minus", "Scale", [view.base], {"factor": -1.0})
        powers = [importer.step(node, f"exp{i}", "Exp", [x]) for i, x in enumerate((view.base, minus))]
        both = importer.step(node, "both", kind, powers)
        pointwise(importer, node, "Scale", view.over(both), {"factor": 0.5})

    return rule


def neg(importer: Importer, node: Node) -> None:
    """-x is x times -1."""
    pointwise(importer, node, "Scale", importer.view(node), {"factor": -1.0})


def arithmetic(importer: Importer, node: Node) -> None:
    """Add, Sub, Mul or Div; with a number it is a factor or an offset."""
    if node.kind in ("Add", "Mul", "Div") and masked(importer, node):
        return
    numbers = [number_of(importer, name) for name in node.inputs]
    if numbers[0] is None and numbers[1] is None:
        if node.kind == "Mul" and (gated := _gated(importer, node)):
            pointwise(importer, node, "Silu", gated)
            return
        names, dims = operands(importer, node, (0, 1))
        finish(importer, node, node.kind, names, dims=dims)
        return
    first = numbers[0] is not None
    view, number = importer.view(node, int(first)), numbers[0] if first else numbers[1]
    assert number is not None
    # the number may have dimensions of one, which the result then has too
    view = view.of_rank(max(len(view.dims), len(importer.constant_shape(node, 1 - int(first)))))
    if first and node.kind in ("Sub", "Div"):  # the number minus x, or over x
        kind, attrs = ("Scale", {"factor": -1.0}) if node.kind == "Sub" else ("Reciprocal", {})
        view = view.over(importer.step(node, "turned", kind, [view.base], attrs))
    if node.kind == "Div" and not first and number == 0:
        raise importer.refuse(node, f"it divides by {node.inputs[1]!r}, which is 0")
    match node.kind:
        case "Mul":
            pointwise(importer, node, "Scale", view, {"factor": number})
        case "Div":
            pointwise(importer, node, "Scale", view, {"factor": number if first else 1 / number})
        case "Sub":
            pointwise(importer, node, "Shift", view, {"offset": number if first else -number})
        case _:
            pointwise(importer, node, "Shift", view, {"offset": number})


def _gated(importer: Importer, node: Node) -> View | None:
    """x, if the node is x * sigmoid(x)."""
    views = [importer.view(node, i) if importer.weight(node.inputs[i]) is None else None for i in (0, 1)]
    producers = importer.graph.producers()
    for x, gate in (views, views[::-1]):
        if x is None or gate is None or x.dims != gate.dims:
            continue
        made = producers.get(gate.base)
        if made is not None and made.kind == "Sigmoid" and made.inputs == (x.base,):
            return x
    return None


def power(importer: Importer, node: Node) -> None:
    """x to a constant power; the usual ones as ops of their own."""
    view, exponent = importer.view(node), number_of(importer, node.inputs[1])
    match exponent:
        case None:
            raise importer.refuse(node, f"its exponent {node.inputs[1]!r} must be a constant number")
        case 0.5:
            pointwise(importer, node, "Sqrt", view)
        case -1.0:
            pointwise(importer, node, "Reciprocal", view)
        case -0.5:
            root = importer.step(node, "root", "Sqrt", [view.base])
            pointwise(importer, node, "Reciprocal", view.over(root))
        case 1.0:
            importer.define(node, view)
        case 2.0 | 3.0 | 4.0:
            product = view.base
            if exponent > 2:
                product = importer.step(node, "square", "Mul", [view.base, view.base])
            other = view.base if exponent < 4 else product
            finish(importer, node, "Mul", [product, other], dims=importer.seen_through(view))
        case _:
            pointwise(importer, node, "Power", view, {"exponent": exponent})


def prelu(importer: Importer, node: Node) -> None:
    """One slope for all, or one per channel, whatever dimensions of one its shape has."""
    view = importer.view(node)
    slope = importer.constant_shape(node, 1)
    if len(view.shape) > 1 and prod(slope) == view.shape[1] and len(slope) == 1:  # PyTorch's vector is per channel
        channels = importer.parameter(node, 1, shape=slope)
        if importer.seen_through(view) is None:
            importer.emit(node, "PRelu", [view.base, channels])
            return
    names, dims = operands(importer, node, (0, 1))
    finish(importer, node, "PRelu", names, dims=dims)


def variadic(kind: str, *, mean: bool = False) -> Rule:
    """Sum, Max, Min or Mean of any number of operands, two at a time."""

    def rule(importer: Importer, node: Node) -> None:
        count, done = len(node.inputs), node.inputs[0]
        for i in range(1, count):
            last = i == count - 1 and not mean
            output = node.outputs[0] if last else importer.fresh(f"{node.outputs[0]}.{i}")
            pair = Node(kind, (done, node.inputs[i]), (output,), {}, node.origin, node.opset)
            weights = [importer.weight(name) is not None for name in pair.inputs]
            if all(weights):
                raise importer.refuse(node, f"its operands {pair.inputs} are both constant")
            numbers = [number_of(importer, name) for name in pair.inputs]
            if numbers != [None, None] and kind in ("Max", "Min"):
                x = 0 if numbers[0] is None else 1
                bound = {"low": -math.inf, "high": math.inf} | {"low" if kind == "Max" else "high": numbers[1 - x]}
                pointwise(importer, pair, "Clip", importer.view(pair, x), bound)
            elif kind == "Add":
                arithmetic(importer, pair)
            else:
                names, dims = operands(importer, pair, (0, 1))
                finish(importer, pair, kind, names, dims=dims)
            done = output
        if mean or count == 1:
            last_node = Node("Scale", (done,), node.outputs, {}, node.origin, node.opset)
            pointwise(importer, last_node, "Scale", importer.view(last_node), {"factor": 1 / count})

    return rule


def add(importer: Importer, node: Node) -> None:
    """A sum, or the bias of the convolution or product before it."""
    random = any(importer.mask(name) is not None for name in node.inputs)
    for i in (0, 1):
        if not random and importer.weight(node.inputs[i]) is not None and _is_bias(importer, node, bias=i):
            return _add_bias(importer, node, bias=i)
    return arithmetic(importer, node)


def _is_bias(importer: Importer, node: Node, *, bias: int) -> bool:
    """Whether an Add gives a bias to the Conv or Gemm before it, which has none and which nothing else reads."""
    array, view = importer.weight(node.inputs[bias]), importer.view(node, 1 - bias)
    assert array is not None
    producer = importer.graph.producers().get(view.base)
    if producer is None or producer.kind not in ("Conv", "Gemm") or len(producer.inputs) > 2:
        return False
    sizes = (1,) * (len(view.dims) - array.ndim) + array.shape
    wide = [digits for digits, size in zip(view.dims, sizes, strict=False) if size != 1]
    channels = importer.shape(view.base)[1]
    return (
        len(sizes) == len(view.dims)
        and wide == [((1, channels, 1),)] * (channels > 1)
        and array.size == channels
        and bool(array.ndim)
        and importer.uses[node.inputs[1 - bias]] == 1
        and importer.made_by(node.inputs[1 - bias], view.base)
    )


def _add_bias(importer: Importer, node: Node, *, bias: int) -> None:
    """Conv or Gemm without a bias, then Add of a vector per channel: the same op with a bias."""
    view = importer.view(node, 1 - bias)
    producer = importer.graph.producers()[view.base]
    b = importer.parameter(node, bias, shape=importer.shape(view.base)[1:2])
    dims = importer.seen_through(view)
    importer.graph.remove(producer)
    finish(importer, node, producer.kind, [*producer.inputs, b], producer.attrs, dims)


def where(importer: Importer, node: Node) -> None:
    """A choice. By a constant mask: each side times its part of the mask; constants are masked while compiling."""
    mask = importer.weight(node.inputs[0])
    if mask is None:
        numbers = {name: number_of(importer, name) for name in node.inputs[1:]}
        constants = {
            name: importer.new_constant(f"{name}.number", np.full(importer.known_shape(name), number, np.float32))
            for name, number in numbers.items()
            if number is not None  # and no weight
        }
        node = replace(node, inputs=tuple(constants.get(name, name) for name in node.inputs))
        (condition, *sides), dims = operands(importer, node, (0, 1, 2))
        parts = [
            importer.step(node, f"side{i}", kind, [condition, side])
            for i, (kind, side) in enumerate(zip(("Masked", "MaskedOut"), sides, strict=True))
        ]
        finish(importer, node, "Add", parts, dims=dims)
        return
    if mask.dtype != bool:
        raise importer.refuse(node, f"its condition {node.inputs[0]!r} must be a constant of booleans, or a comparison")
    parts = []
    for i, chosen in ((1, mask), (2, ~mask)):
        array = importer.values.get(importer.resolved(node.inputs[i]))  # no weight
        if array is not None:
            masked = np.where(chosen, array, np.zeros((), array.dtype)).astype(np.float32)
            if masked.any():
                parts.append(importer.new_constant(f"{node.outputs[0]}.masked{i}", masked))
        elif chosen.any():
            name = importer.new_constant(f"{node.outputs[0]}.mask{i}", chosen.astype(np.float32))
            product = importer.fresh(f"{node.outputs[0]}.part{i}")
            arithmetic(importer, Node("Mul", (node.inputs[i], name), (product,), {}, node.origin, node.opset))
            parts.append(product)
    if len(parts) == 2:
        arithmetic(importer, Node("Add", tuple(parts), node.outputs, {}, node.origin, node.opset))
    elif not parts:
        zeros = np.zeros(np.broadcast_shapes(*map(importer.known_shape, node.inputs)), np.float32)
        importer.alias[node.outputs[0]] = importer.new_constant(f"{node.outputs[0]}.zeros", zeros)
    else:
        part = Node("Identity", (parts[0],), node.outputs, {}, node.origin, node.opset)
        importer.define(part, importer.view(part))


def scatter_nd(importer: Importer, node: Node) -> None:
    """Constants written over some elements (`bias[8:16] = 0`): a choice by a constant mask."""
    if importer.resolved(node.inputs[2]) not in importer.values or node.attrs.get("reduction", "none") != "none":
        raise importer.refuse(
            node, "only constants can be written over a part of a map; write it as torch.cat of parts"
        )
    places = tuple(np.moveaxis(importer.constant_input(node, 1, "indices"), -1, 0))
    shape = importer.known_shape(node.inputs[0])
    mask, numbers = np.zeros(shape, bool), np.zeros(shape, np.float32)
    mask[places], numbers[places] = True, importer.constant_input(node, 2, "updates")
    names = [
        importer.new_constant(f"{node.outputs[0]}.{label}", value)
        for label, value in (("over", mask), ("numbers", numbers))
    ]
    where(importer, replace(node, kind="Where", inputs=(*names, node.inputs[0])))


def identity(importer: Importer, node: Node) -> None:
    """Another name for the same tensor."""
    importer.alias[node.outputs[0]] = node.inputs[0]


def cast(importer: Importer, node: Node) -> None:
    """Only what leaves float32, or the mask of a dropout, as it is."""
    target = node.attrs.get("to", 1)
    if target != 1 and importer.mask(node.inputs[0]) is None and node.kind == "Cast":
        raise importer.refuse(node, "it turns feature maps into another type; export the model in float32")
    identity(importer, node)
