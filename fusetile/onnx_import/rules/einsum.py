"""Sums of products by their indices, as matrix products."""

from __future__ import annotations

from math import prod

from fusetile.onnx_import.contents import Node
from fusetile.onnx_import.importer import Importer
from fusetile.onnx_import.rules.matrices import mat_mul


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
