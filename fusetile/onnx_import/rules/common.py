"""What rules share: axes, operands that are broadcast, and results that are views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from fusetile.onnx_import.contents import Node
from fusetile.onnx_import.importer import Importer
from fusetile.onnx_import.views import View, merged
from fusetile.ops.rearrange import Digit, Dims, joined, reshaped, shape_of, whole_view

Rule = Callable[[Importer, Node], None]


def axes_of(importer: Importer, node: Node, axes: Sequence[int], rank: int) -> list[int]:
    """Axes counted from the front, in order."""
    if any(not -rank <= axis < rank for axis in axes):
        raise importer.refuse(node, f"axes {list(axes)} are not all dimensions of a tensor of {rank}")
    return sorted({axis % rank for axis in axes})


def listed(importer: Importer, node: Node, i: int, key: str) -> list[int] | None:
    """Numbers that are an attribute in older opsets and input `i` in newer ones."""
    if node.has(i):
        return [int(number) for number in importer.constant_input(node, i, key).reshape(-1)]
    value = node.attrs.get(key)
    return None if value is None else [int(number) for number in value]


def number_of(importer: Importer, name: str) -> float | None:
    """The value of an operand that is a constant of one element; what has dimensions may be a weight to train."""
    array = importer.weight(name)
    if array is None or array.size != 1 or (array.ndim and importer.is_initializer(name)):
        return None
    return float(array.reshape(()))


def finish(
    importer: Importer,
    node: Node,
    kind: str,
    inputs: Sequence[str],
    attrs: Mapping[str, Any] | None = None,
    dims: Dims | None = None,
) -> None:
    """The node's output is that of an op, seen through a view if there is one."""
    if dims is None:
        importer.emit(node, kind, inputs, attrs)
        return
    stored = importer.step(node, "stored", kind, inputs, attrs)
    importer.define(node, View(stored, dims))


def stored_anew(importer: Importer, node: Node, view: View, sizes: Sequence[int]) -> View:
    """The same view of a tensor that is stored with these sizes, made by joining neighbours of the view's."""
    flat = view.reshaped(sizes)
    assert flat is not None  # neighbours can always be put together
    again = importer.whole(importer.tensor(node, flat)).reshaped(view.shape)
    assert again is not None
    return again


def pointwise(importer: Importer, node: Node, kind: str, view: View, attrs: Mapping[str, Any] | None = None) -> None:
    """An op of one operand that works element by element, on the tensor as it is stored."""
    finish(importer, node, kind, [view.base], attrs, importer.seen_through(view))


def operands(importer: Importer, node: Node, indices: Sequence[int]) -> tuple[list[str], Dims | None]:
    """Operands that are broadcast against each other, as tensors of the graph that fit each other, and the view of the
    result: the layout of an operand as large as that, if all others fit it or can be moved there, else the model's."""
    mapped = [i for i in indices if importer.weight(node.inputs[i]) is None] or indices[:1]
    views = {i: importer.view(node, i) for i in mapped}
    shapes = {i: views[i].shape if i in views else importer.constant_shape(node, i) for i in indices}
    try:
        full = np.broadcast_shapes(*shapes.values())
    except ValueError:
        raise importer.refuse(node, f"its operands of shapes {list(shapes.values())} do not fit each other") from None
    anchors = [view for view in views.values() if view.shape == full]
    for lay_out in (_laid_out, _moved):
        # maps rather than rows, which fully connected layers leave behind
        for anchor in sorted(anchors, key=lambda view: -len(importer.shape(view.base))):
            found: dict[int, str] = {}
            for i in sorted(indices, key=lambda i: i not in views):  # a weight has one form: once the others fit
                name = lay_out(importer, node, i, views.get(i), shapes[i], anchor)
                if name is None:
                    break
                found[i] = name
            else:
                return [found[i] for i in indices], importer.seen_through(anchor)
    rank = max(1, len(full))  # a number is stored with a dimension of one
    wide = {i: (1,) * (rank - len(shape)) + tuple(shape) for i, shape in shapes.items()}
    small = merged([wide[i] for i in indices])
    if small is None:
        raise importer.refuse(node, f"its operands of shapes {list(shapes.values())} have too many dimensions")
    names = []
    for i, shape in zip(indices, small, strict=True):
        if i not in views:
            names.append(importer.parameter(node, i, shape=shape, kind="map"))
            continue
        view = views[i].of_rank(rank).reshaped(shape)
        assert view is not None  # neighbours can always be put together
        names.append(importer.tensor(node, view))
    result = View("", whole_view([max(sizes) for sizes in zip(*small, strict=True)])).reshaped(full)
    assert result is not None
    return names, None if 1 <= len(full) <= 4 else result.dims


def _laid_out(
    importer: Importer, node: Node, i: int, view: View | None, shape: Sequence[int], anchor: View
) -> str | None:
    """Operand i in the layout in which the anchor is stored, or None if it is stored in another one."""
    stored, rank = importer.shape(anchor.base), len(anchor.dims)
    if view is not None:
        dims = view.of_rank(rank).dims
        if any(own and own != digits for own, digits in zip(dims, anchor.dims, strict=True)):
            return None
        kept = {axis for digits in dims for axis, _, _ in digits}
        wanted = tuple(size if axis in kept else 1 for axis, size in enumerate(stored))
        return view.base if importer.shape(view.base) == wanted else None
    sizes = (1,) * (rank - len(shape)) + tuple(shape)
    digits = [digit for size, part in zip(sizes, anchor.dims, strict=True) if size > 1 for digit in part]
    axes = [axis for axis, _, _ in digits]
    if axes != sorted(set(axes)) or any(size != stored[axis] for axis, size, _ in digits):
        return None
    if len(stored) > 1 and axes in ([], [1]):
        return importer.parameter(node, i, shape=(prod(shape),))
    return importer.parameter(node, i, shape=[s if a in axes else 1 for a, s in enumerate(stored)], kind="map")


def _moved(importer: Importer, node: Node, i: int, view: View | None, shape: Sequence[int], anchor: View) -> str | None:
    """Operand i in the layout in which the anchor is stored, moved there if need be; None if that can't be."""
    fitting = _laid_out(importer, node, i, view, shape, anchor)
    if fitting is not None:
        return fitting
    own = (importer.view(node, i) if view is None else view).of_rank(len(anchor.dims))
    return moved(importer, node, own, anchor.dims, importer.shape(anchor.base))


def moved(importer: Importer, node: Node, view: View, dims: Dims, stored: Sequence[int]) -> str | None:
    """A tensor of the shape `stored`, of which this view is what `dims` are of it; broadcast along an axis if the view
    does not vary there. None if it varies along a part of an axis only."""
    digits: list[list[tuple[int, tuple[Digit, ...]]]] = [[] for _ in stored]
    for own, wanted in zip(view.dims, dims, strict=True):
        parts = reshaped((own,), [size for _, size, _ in wanted]) if own else ()
        if parts is None:
            return None
        for (axis, _, step), part in zip(wanted, parts, strict=False):
            digits[axis].append((step, part))
    found = tuple(joined([digit for _, part in sorted(along, reverse=True) for digit in part]) for along in digits)
    if any(size not in (1, whole) for size, whole in zip(shape_of(found), stored, strict=True)):
        return None
    return importer.tensor(node, View(view.base, found))
