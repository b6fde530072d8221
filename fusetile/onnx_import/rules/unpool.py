"""What becomes of the indices of a MaxPool: they say where its maxima were, and numbers go back there.

    MaxPool(x) -> y, i        MaxUnpool(z, i)   ==>   MaxPoolGrad of z: what the gradient of that pool does

PyTorch counts indices from the first pixel of a channel, ONNX from the first of the batch. So newer exporters subtract
where the channels begin (the indices of a pool of one pixel), add it again, and scatter numbers over zeros:

    i - begin -> + begin -> Reshape [-1] -> ScatterND(zeros, ., z)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import onnx

from fusetile.onnx_import import folding
from fusetile.onnx_import.contents import Node
from fusetile.onnx_import.importer import Importer

_MOVING = ("Cast", "CastLike", "Concat", "Expand", "Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True, slots=True)
class Places:
    """Indices that `argmax` found in the windows `pool` of `x`: ONNX's, plus `shift`; `order` says which of them is
    where. Both arrays have the shape that the model sees."""

    x: str
    argmax: str
    pool: dict[str, Any]
    order: np.ndarray
    shift: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.order.shape


def found(importer: Importer, name: str, x: str, argmax: str, pool: dict[str, Any]) -> None:
    """The indices `name` of a MaxPool. If its windows are single pixels they are known."""
    shape = importer.shape(argmax)
    numbers = np.arange(prod(shape)).reshape(shape)
    if pool["kernel"] == (1, 1) and shape == importer.shape(x):
        importer.now_known(name, numbers)
    else:
        importer.places[name] = Places(x, argmax, pool, numbers, np.zeros(shape, np.int64))


def follow(importer: Importer, node: Node, proto: onnx.NodeProto) -> None:
    """The rule of every node that reads such indices."""
    at = next(i for i, name in enumerate(node.inputs) if importer.resolved(name) in importer.places)
    places = importer.places[importer.resolved(node.inputs[at])]
    if node.kind == "MaxUnpool" and at == 1:
        _unpool(importer, node, places)
    elif node.kind in ("ScatterND", "ScatterElements") and at == 1:
        _scatter(importer, node, places)
    elif node.kind == "Identity":
        importer.alias[node.outputs[0]] = node.inputs[0]
    elif node.kind == "Add" or (node.kind == "Sub" and at == 0):
        number = importer.constant_input(node, 1 - at, "other operand")
        shift = places.shift + (number if node.kind == "Add" else -number)
        if shift.shape != places.shape:
            raise importer.refuse(node, "the indices of a MaxPool can't be repeated")
        importer.places[node.outputs[0]] = replace(places, shift=shift)
    elif node.kind in _MOVING and at == 0:
        moved = [_moved(importer, node, proto, array) for array in (places.order, places.shift)]
        importer.places[node.outputs[0]] = replace(places, order=moved[0], shift=moved[1])
    else:
        raise importer.refuse(
            node, f"it reads {node.inputs[at]!r}, the indices of a MaxPool; only unpooling by them is supported"
        )


def refused(importer: Importer, node: Node) -> None:
    """What scatters numbers by other indices."""
    raise importer.refuse(node, f"its indices {node.inputs[1]!r} must be those of a MaxPool of images")


def _moved(importer: Importer, node: Node, proto: onnx.NodeProto, array: np.ndarray) -> np.ndarray:
    values = {name: importer.constant_input(node, i, "operand") for i, name in enumerate(node.inputs) if i and name}
    known = values | {node.inputs[0]: array}
    return folding.evaluate(proto, node.opset, known, origin=f"{importer.where}: {node.origin}")[node.outputs[0]]


def _unpool(importer: Importer, node: Node, places: Places) -> None:
    """The node's windows must be those of the pool."""
    kernel = tuple(node.attrs["kernel_shape"])
    strides = tuple(node.attrs.get("strides", (1,) * len(kernel)))
    pads = tuple(node.attrs.get("pads", (0,) * 2 * len(kernel)))
    spans = [(n - 1) * s + k for n, s, k in zip(places.shape[2:], strides, kernel, strict=True)]
    sizes = tuple(span - pads[i] - pads[i + 2] for i, span in enumerate(spans))
    if node.has(2):
        sizes = tuple(int(size) for size in importer.constant_input(node, 2, "output shape")[-2:])
    shape, windows = importer.shape(places.x), (kernel, strides, pads)
    if windows != tuple(places.pool[key] for key in ("kernel", "strides", "pads")) or sizes != shape[2:]:
        raise importer.refuse(
            node, "its windows and output must be the windows and input of the MaxPool of its indices"
        )
    _put(importer, node, places, 0, shape)


def _scatter(importer: Importer, node: Node, places: Places) -> None:
    """Over zeros in the order of the pool's input."""
    zeros, shape = importer.weight(node.inputs[0]), importer.known_shape(node.inputs[0])
    one = 1 if node.kind == "ScatterND" else 0
    flat = len(shape) == 1 and len(places.shape) == 1 + one and node.attrs.get("reduction", "none") == "none"
    if zeros is None or zeros.any() or not flat or prod(shape) != prod(importer.shape(places.x)):
        raise importer.refuse(
            node, "the indices of a MaxPool scatter numbers only over zeros, as many as it has inputs"
        )
    _put(importer, node, places, 2, shape)


def _put(importer: Importer, node: Node, places: Places, i: int, shape: Sequence[int]) -> None:
    """Operand `i` where the maxima were, and zeros elsewhere, in this shape."""
    pool, size = places.pool, prod(places.shape)
    values = importer.view(node, i).reshaped(importer.shape(places.argmax))
    if values is None or places.shift.any() or not np.array_equal(places.order.reshape(-1), np.arange(size)):
        raise importer.refuse(node, "its numbers do not stand in the order of the maxima of the MaxPool")
    if any(stride < tap for stride, tap in zip(pool["strides"], pool["kernel"], strict=True)) or pool["dilations"] != (
        1,
        1,
    ):
        raise importer.refuse(node, "its windows overlap, which is not supported")
    attrs = {**pool, "input_shape": importer.shape(places.x)}
    y = importer.step(node, "unpooled", "MaxPoolGrad", [importer.tensor(node, values), places.argmax], attrs)
    view = importer.whole(y).reshaped(shape)
    assert view is not None  # neighbours can always be put together
    importer.define(node, view)
