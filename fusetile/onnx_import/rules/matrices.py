"""Fully connected layers, and products of two feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from fusetile.onnx_import.contents import Node
from fusetile.onnx_import.importer import Importer
from fusetile.onnx_import.rules.common import finish
from fusetile.onnx_import.views import View, merged

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
    """By a matrix of weights: a fully connected layer, or, along the channels of a stored map, a 1x1 convolution. What
    it is applied to may be constant, too: coordinates that a small network turns into a bias."""
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
    w = importer.parameter(node, 1, transposed=True)
    rows = view.reshaped((prod(lead), channels))
    assert rows is not None  # neighbours can always be put together
    if len(lead) == 1:
        importer.emit(node, "Gemm", [importer.tensor(node, rows), w])
        return
    y = importer.step(node, "rows", "Gemm", [importer.tensor(node, rows), w])
    result_view = importer.whole(y).reshaped((*lead, filters))
    assert result_view is not None
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
    names, turned = [], []
    for i in (0, 1):
        if importer.weight(node.inputs[i]) is not None and not importer.is_map(node.inputs[i]):
            names.append(importer.parameter(node, i, shape=four[i], kind="map"))
            turned.append(False)
            continue
        view = importer.view(node, i).reshaped(four[i])
        assert view is not None  # neighbours are put together, and dimensions of one added
        other = view.permuted((0, 1, 3, 2))
        turned.append(other.is_whole(importer.shape(view.base)))
        names.append(view.base if turned[-1] else importer.tensor(node, view))
    attrs = {"turned": tuple(turned)}
    if rank == 4:
        importer.emit(node, "MatMul", names, attrs)
        return
    y = importer.step(node, "images", "MatMul", names, attrs)
    images = tuple(max(sizes) for sizes in zip(*(shape[:-2] for shape in wide), strict=True))
    result = importer.whole(y).reshaped((*images, *importer.shape(y)[2:]))
    if result is None:
        raise importer.refuse(node, f"the product of {shapes[0]} and {shapes[1]} is not supported")
    importer.define(node, result)


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


def einsum(importer: Importer, node: Node) -> None:
    """A product of two operands as MatMul between views; of one operand, its dimensions in another order.

    bhid,bhjd->bhij    ==>    MatMul of [b, h, i, d] and [b, h, d, j]"""
    terms, result = _equation(importer, node)
    if len(terms) == 1:
        view = importer.view(node)
        if sorted(result) != sorted(terms[0]):
            raise importer.refuse(node, f"{_text(node)} sums one operand; write that as ReduceSum")
        importer.define(node, view.permuted([terms[0].index(label) for label in result]))
        return
    a, b = terms
    images = [label for label in result if label in a and label in b]
    rows, columns = ([label for label in result if label in term and label not in images] for term in (a, b))
    summed = [label for label in a if label in b and label not in result]
    if (set(a) | set(b)) - set(images) - set(rows) - set(columns) - set(summed):
        raise importer.refuse(node, f"{_text(node)} sums a dimension of one operand; write that as ReduceSum before it")
    views = [
        None if importer.weight(name) is not None else importer.view(node, i) for i, name in enumerate(node.inputs)
    ]
    if views[0] is None and views[1] is not None and not images:
        a, b, rows, columns, views = b, a, columns, rows, views[::-1]
        inputs = node.inputs[::-1]
    else:
        inputs = node.inputs
    product = importer.fresh(f"{node.outputs[0]}.product")
    if views[0] is None:
        raise importer.refuse(node, f"its operand {inputs[0]!r} is a weight of several images; write it as MatMul")
    left, sizes = views[0], dict(zip(a, views[0].shape, strict=True))
    names = [importer.fresh(f"{node.outputs[0]}.left"), importer.fresh(f"{node.outputs[0]}.right")]
    if views[1] is None:
        if images or len(b) != 2 or len(columns) != 1 or len(summed) != 1:
            raise importer.refuse(node, f"{_text(node)} with the weight {inputs[1]!r} is no product with a matrix")
        importer.define(node, left.permuted([a.index(label) for label in (*rows, *summed)]), names[0])
        matrix = importer.resolved(inputs[1])
        turned = matrix in importer.transposes
        matrix = importer.transposes.get(matrix, matrix)
        (importer.alias if (b[0] == summed[0]) is not turned else importer.transposes)[names[1]] = matrix
        mat_mul(importer, Node("MatMul", (names[0], names[1]), (product,), {}, node.origin, node.opset))
    else:
        right = views[1]
        sizes |= dict(zip(b, right.shape, strict=True))
        groups = (images[:1], images[1:], rows, summed, columns)
        first, more, height, inner, width = (prod(sizes[label] for label in group) for group in groups)
        for name, view, term, labels, shape in (
            (names[0], left, a, (*images, *rows, *summed), (first, more, height, inner)),
            (names[1], right, b, (*images, *summed, *columns), (first, more, inner, width)),
        ):
            flat = view.permuted([term.index(label) for label in labels]).reshaped(shape)
            assert flat is not None  # neighbours can always be put together
            importer.define(node, flat, name)
        mat_mul(importer, Node("MatMul", (names[0], names[1]), (product,), {}, node.origin, node.opset))
    found = importer.view(Node("Einsum", (product,), node.outputs, {}, node.origin, node.opset))
    order = [*images, *rows, *columns]
    if views[1] is not None:
        taken_apart = found.reshaped([sizes[label] for label in order])
        assert taken_apart is not None  # the product is stored as it is
        found = taken_apart
    importer.define(node, found.permuted([order.index(label) for label in result]))


def _text(node: Node) -> str:
    return f"equation {node.attrs.get('equation', '')!r}"


def _equation(importer: Importer, node: Node) -> tuple[list[str], str]:
    """The labels of the operands and of the result; dimensions behind an ellipsis are named by capitals from the end of
    the alphabet, and where no result is written it is what occurs once, in order."""
    text = str(node.attrs["equation"]).replace(" ", "")
    written, _, result = text.partition("->")
    terms = written.split(",")
    if len(terms) != len(node.inputs) or len(terms) > 2:
        raise importer.refuse(node, f"{_text(node)} has {len(terms)} operands; supported are one and two")
    ranks = [len(importer.known_shape(name)) for name in node.inputs]
    hidden = [
        rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)
    ]
    spare = [chr(number) for number in range(ord("Z"), ord("A"), -1) if chr(number) not in text][: max(hidden)][::-1]
    terms = [
        term.replace("...", "".join(spare[len(spare) - count :])) for term, count in zip(terms, hidden, strict=True)
    ]
    if "->" not in text:
        once = sorted(label for label in set(written) - set(",.") if written.count(label) == 1)
        result = "".join([*spare, *once])
    result = result.replace("...", "".join(spare))
    if any(len(set(term)) != len(term) for term in (*terms, result)):
        raise importer.refuse(node, f"{_text(node)} names a dimension twice in one operand, which is not supported")
    if any(len(term) != rank for term, rank in zip(terms, ranks, strict=True)):
        raise importer.refuse(node, f"{_text(node)} does not fit operands of {ranks} dimensions")
    return terms, result
