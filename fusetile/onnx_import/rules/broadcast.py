"""Operands that are broadcast against each other, in one layout."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from fusetile.onnx_import.contents import Node
from fusetile.onnx_import.importer import Importer
from fusetile.onnx_import.views import View, merged
from fusetile.ops.rearrange import Dims, whole_view


def operands(importer: Importer, node: Node, indices: Sequence[int]) -> tuple[list[str], Dims | None]:
    """Tensors of the graph that fit each other, and the view of the result: in the layout of an operand as large as
    that, if all others fit it or can be moved there, else in the model's."""
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
        if i not in views and not _has_another_form(importer, node, i, shape):
            names.append(importer.parameter(node, i, shape=shape, kind="map"))
            continue
        view = (views[i] if i in views else importer.view(node, i)).of_rank(rank).reshaped(shape)
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
    per_channel = len(stored) > 1 and axes in ([], [1])
    form = [prod(shape)] if per_channel else [size if axis in axes else 1 for axis, size in enumerate(stored)]
    if _has_another_form(importer, node, i, form):
        return None
    return importer.parameter(node, i, shape=form, kind=None if per_channel else "map")


def _has_another_form(importer: Importer, node: Node, i: int, shape: Sequence[int]) -> bool:
    """Whether a weight is a map already, of another shape."""
    name = node.inputs[i]
    return importer.is_map(name) and importer.shape(importer.base_of(name)) != tuple(shape)


def _moved(importer: Importer, node: Node, i: int, view: View | None, shape: Sequence[int], anchor: View) -> str | None:
    """Operand i in the layout in which the anchor is stored, moved there if need be; None if that can't be."""
    fitting = _laid_out(importer, node, i, view, shape, anchor)
    if fitting is not None:
        return fitting
    stored, rank = importer.shape(anchor.base), len(anchor.dims)
    if view is None:
        if View("", whole_view(shape)).of_rank(rank).stored_as(anchor.dims, stored) is None:
            return None
        view = importer.view(node, i)
    found = view.of_rank(rank).stored_as(anchor.dims, stored)
    return None if found is None else importer.tensor(node, found)
