"""Fully connected layers, and products of two feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from fusetile.onnx_import.contents import Node
from fusetile.onnx_import.importer import Importer
from fusetile.onnx_import.rules.common import finish
from fusetile.onnx_import.views import View, merged

LANES, FILLED = 8, 0.8  # heads may be channels if they fill so much of vectors of so many
Product = tuple[
    list[str], tuple[str, str], tuple[int, ...]
]  # operands, their axes, the result's order as the model has it
_POINT = {"strides": (1, 1), "dilations": (1, 1), "pads": (0, 0, 0, 0)}


def gemm(importer: Importer, node: Node) -> None:
    """alpha * x @ w^T + beta * b, with the factors as Scale ops in front."""
    y, view = node.outputs[0], importer.view(node)
    if len(view.dims) != 2:
        raise importer.refuse(node, f"its input must be [N, C]; it has shape {view.shape}")
    if node.attrs.get("transA", 0):
        view = view.permuted((1, 0))
    if importer.weight(node.inputs[1]) is None:
        raise importer.refuse(node, f"its operand {node.inputs[1]!r} must be an initializer; export it as MatMul")
    w = importer.parameter(node, 1, rank=2, transposed=not node.attrs.get("transB", 0))
    operands = [importer.tensor(node, view), w]
    if node.has(2):
        channels = importer.shape(w)[0]
        bias = importer.constant_shape(node, 2)
        if prod(bias) == 1 != channels:
            raise importer.refuse(node, f"its bias of shape {bias} is one number; export it with one per output")
        operands.append(importer.parameter(node, 2, shape=(channels,)))
    for i, key in ((0, "alpha"), (2, "beta")):
        factor = float(node.attrs.get(key, 1.0))
        if i < len(operands) and factor != 1:
            scaled = importer.fresh(f"{y}.{key}")
            operands[i] = importer.emit(node, "Scale", [operands[i]], {"factor": factor}, outputs=[scaled])
    importer.emit(node, "Gemm", operands)


def mat_mul(importer: Importer, node: Node) -> None:
    """By a matrix of weights: a fully connected layer, or, of several rows per image, a 1x1 convolution. What it is
    applied to may be constant, too: coordinates that a small network turns into a bias."""
    weight = importer.weight(node.inputs[1])
    if weight is not None and weight.ndim == 2 and not importer.is_map(node.inputs[1]):
        _linear(importer, node)
    else:
        _products(importer, node)


def _linear(importer: Importer, node: Node) -> None:
    view = importer.view(node)
    channels, filters = importer.constant_shape(node, 1)
    stored, lead = importer.shape(view.base), view.shape[:-1]
    if view.shape[-1] != channels or not lead:
        raise importer.refuse(node, f"{view.shape} and {(channels, filters)} have no matrix product")
    if len(stored) in (2, 4) and view.dims[-1] == ((1, channels, 1),) and stored[1] == channels:
        w = importer.parameter(node, 1, transposed=True, more=(1,) * (len(stored) - 2))
        result = View("", (*view.dims[:-1], ((1, filters, 1),) if filters > 1 else ()))
        shape = (stored[0], filters, *stored[2:])
        kind, attrs = ("Gemm", {}) if len(stored) == 2 else ("Conv", _POINT)
        finish(importer, node, kind, [view.base, w], attrs, None if result.is_whole(shape) else result.dims)
        return
    if len(lead) == 1:
        importer.emit(node, "Gemm", [importer.tensor(node, view), importer.parameter(node, 1, transposed=True)])
        return
    pixels = view.reshaped((lead[0], prod(lead[1:-1]), lead[-1], channels))
    assert pixels is not None  # neighbours can always be put together
    w = importer.parameter(node, 1, transposed=True, more=(1, 1))
    y = importer.step(node, "pixels", "Conv", [importer.tensor(node, pixels.permuted((0, 3, 1, 2))), w], _POINT)
    result_view = importer.whole(y).permuted((0, 2, 3, 1)).reshaped((*lead, filters))
    assert result_view is not None  # they are taken apart again
    importer.define(node, result_view)


def _products(importer: Importer, node: Node) -> None:
    shapes = [importer.known_shape(name) for name in node.inputs]
    if min(map(len, shapes)) == 1:
        _of_vectors(importer, node, [len(shape) == 1 for shape in shapes])
        return
    rank = max(map(len, shapes))
    wide = [(*(1,) * (rank - len(shape)), *shape) for shape in shapes]
    four = _four(wide)
    if four is None:
        raise importer.refuse(node, f"the product of {shapes[0]} and {shapes[1]} is not supported")
    images = tuple(max(sizes) for sizes in zip(*(shape[:-2] for shape in wide), strict=True))
    views: list[View] = []
    for i in (0, 1):
        if importer.weight(node.inputs[i]) is not None and not importer.is_map(node.inputs[i]):
            views.append(importer.whole(importer.parameter(node, i, shape=four[i], kind="map")))
            continue
        view = importer.view(node, i).reshaped(four[i])
        assert view is not None  # neighbours are put together, and dimensions of one added
        views.append(view)
    names, terms, order = (_by_channels if _heads_are_channels(importer, views) else _by_rows)(importer, node, views)
    y = importer.step(node, "product", "MatMul", names, {"terms": terms})
    result = importer.whole(y).permuted(order).reshaped((*images, four[0][2], four[1][3]))
    if result is None:
        raise importer.refuse(node, f"the product of {shapes[0]} and {shapes[1]} is not supported")
    importer.define(node, result)


def _heads_are_channels(importer: Importer, views: Sequence[View]) -> bool:
    """Whether the larger operand is stored so already, and the heads fill vectors."""
    view, heads = max(views, key=lambda view: prod(view.shape)), max(view.shape[1] for view in views)
    stored = importer.shape(view.base)
    return heads >= FILLED * LANES * -(-heads // LANES) and (view.is_whole(stored) or _turned(view).is_whole(stored))


def _turned(view: View) -> View:
    """Its matrices transposed."""
    return view.permuted((0, 1, 3, 2))


def _by_channels(importer: Importer, node: Node, views: Sequence[View]) -> Product:
    """Heads are channels, rows and columns those of the map, or the other way round if the operand is stored so."""
    names, terms = [], []
    for view, term in zip(views, ("nkhc", "nkcw"), strict=True):
        other = _turned(view).is_whole(importer.shape(view.base))
        names.append(view.base if other else importer.tensor(node, view))
        terms.append(term[:2] + term[:1:-1] if other else term)
    return names, (terms[0], terms[1]), (0, 1, 2, 3)


def _by_rows(importer: Importer, node: Node, views: Sequence[View]) -> Product:
    """Few heads would leave most lanes empty: they become rows of maps, whose channels are the rows or the columns of
    the matrices. Those of the result are what fills vectors (a class token is one row), and what is channels of an
    operand too, rather of one that comes from the network's channels than of a product: they will be these again."""
    places = [_channels_of(importer, view) for view in views]
    orders = [(0, place, 1, 5 - place) for place in places]
    names = [importer.tensor(node, view.permuted(order)) for view, order in zip(views, orders, strict=True)]
    moved = [name != view.base for name, view in zip(names, views, strict=True)]
    filled = [min(LANES, size) for size in (views[0].shape[2], views[1].shape[3])]
    columns = places[1] == 3 and (places[0] != 2 or (moved[1] and not moved[0]))
    if filled[0] != filled[1]:
        columns = filled[1] > filled[0]
    axes = ("nhwc", "nhck") if columns else ("nhkc", "nhcw")  # of the operands as the model has them
    terms = ["".join(term[place] for place in order) for term, order in zip(axes, orders, strict=True)]
    return names, (terms[0], terms[1]), (0, 2, 3, 1) if columns else (0, 2, 1, 3)


def _channels_of(importer: Importer, view: View) -> int:
    """Which dimension of matrices [n, h, rows, columns] should be channels: that for which nothing is to be moved, or
    only whole blocks of channels."""
    for place in (2, 3):
        if view.permuted((0, place, 1, 5 - place)).is_whole(importer.shape(view.base)):
            return place
    channels = min(1, len(importer.shape(view.base)) - 1)
    whole_blocks = [bool(digits) and digits[-1][0] == channels and digits[-1][2] == 1 for digits in view.dims]
    return 3 if whole_blocks[3] else 2


def _of_vectors(importer: Importer, node: Node, vectors: list[bool]) -> None:
    """A vector is a matrix of one row on the left and of one column on the right; the result lacks that dimension."""
    names = list(node.inputs)
    for i, vector in enumerate(vectors):
        if vector:
            view = importer.view(node, i)
            names[i] = importer.fresh(f"{node.outputs[0]}.matrix{i}")
            importer.define(node, View(view.base, ((), *view.dims) if i == 0 else (*view.dims, ())), names[i])
    product = importer.fresh(f"{node.outputs[0]}.product")
    mat_mul(importer, Node("MatMul", tuple(names), (product,), {}, node.origin, node.opset))
    found = importer.view(Node("MatMul", (product,), node.outputs, {}, node.origin, node.opset))
    rank = len(found.dims)
    importer.define(node, found.without([rank - 2 + i for i, vector in enumerate(vectors) if vector]))


def _four(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]] | None:
    """Two shapes of one rank as [images, channels, rows, columns]: more dimensions of images become two where they are
    broadcast alike; None if that leaves more."""
    images = merged([shape[:-2] for shape in shapes], most=2)
    if images is None:
        return None
    return [(*sizes, *(1,) * (2 - len(sizes)), *shape[-2:]) for sizes, shape in zip(images, shapes, strict=True)]
