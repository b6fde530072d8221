"""Sums, means, norms and maxima over any dimensions, and softmax."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from fusetile.onnx_import.contents import Node
from fusetile.onnx_import.importer import Importer
from fusetile.onnx_import.rules.common import Rule, axes_of, finish, listed, stored_anew
from fusetile.onnx_import.views import View, merged


def reducible(importer: Importer, node: Node, view: View, axes: Sequence[int]) -> tuple[View, tuple[int, ...]]:
    """A view with the same dimensions of a tensor whose own axes are what is reduced, and that tensor's shape when they
    have become one."""
    reduced = view.axes(set(axes))
    if reduced is None:
        sizes = [list(view.shape), [1 if i in axes else size for i, size in enumerate(view.shape)]]
        small = merged(sizes)
        if small is None:
            raise importer.refuse(node, f"axes {list(axes)} of shape {view.shape} can't be reduced")
        view = stored_anew(importer, node, view, small[0])
        reduced = view.axes(set(axes)) or set()
    stored = importer.shape(view.base)
    return view, tuple(1 if axis in reduced else size for axis, size in enumerate(stored))


def reduce(kind: str) -> Rule:
    """ReduceSum, ReduceMean, ReduceMax, ReduceMin, ReduceL2, ReduceL1, ReduceSumSquare."""

    def rule(importer: Importer, node: Node) -> None:
        view = importer.view(node)
        rank = len(view.dims)
        axes = listed(importer, node, 1, "axes")
        if axes is None or not axes:
            if node.attrs.get("noop_with_empty_axes", 0):
                importer.define(node, view)
                return
            axes = list(range(rank))
        axes = axes_of(importer, node, axes, rank)
        if kind == "mean" and len(importer.shape(view.base)) == 4 and view.axes(set(axes)) == {2, 3}:
            pooled, dims = "GlobalAveragePool", _left(view, axes, node)
            _finish(importer, node, pooled, view, {}, dims, (*importer.shape(view.base)[:2], 1, 1))
            return
        view, shape = reducible(importer, node, view, axes)
        dims = _left(view, axes, node)
        if kind in ("max", "min"):
            if prod(shape) == 1:
                raise importer.refuse(node, "the maximum over the whole batch is not supported")
            if kind == "max":
                _finish(importer, node, "MaxTo", view, {"shape": shape}, dims, shape)
                return
            minus = importer.step(node, "minus", "Scale", [view.base], {"factor": -1.0})
            y = importer.step(node, "highest", "MaxTo", [minus], {"shape": shape})
            _finish(importer, node, "Scale", view.over(y), {"factor": -1.0}, dims, shape)
            return
        x = [view.base, view.base] if kind in ("l2", "square") else [view.base]
        if kind == "l1":
            x = [importer.step(node, "abs", "Abs", x)]
        if kind in ("sum", "square", "l1"):
            _finish(importer, node, "SumTo", view, {"shape": shape}, dims, shape, x)
            return
        total = importer.step(node, "sum", "SumTo", x, {"shape": shape})
        if kind == "l2":
            _finish(importer, node, "Sqrt", view.over(total), {}, dims, shape)
        else:
            count = prod(importer.shape(view.base)) // prod(shape)
            _finish(importer, node, "Scale", view.over(total), {"factor": 1 / count}, dims, shape)

    return rule


def _left(view: View, axes: Sequence[int], node: Node) -> View:
    """The view of what is left: reduced dimensions are one, or gone."""
    kept = View(view.base, tuple(() if i in axes else digits for i, digits in enumerate(view.dims)))
    return kept if node.attrs.get("keepdims", 1) else kept.without(axes)


def _finish(
    importer: Importer,
    node: Node,
    kind: str,
    view: View,
    attrs: dict[str, object],
    left: View,
    shape: Sequence[int],
    inputs: Sequence[str] | None = None,
) -> None:
    dims = None if left.is_whole(shape) else left.dims
    finish(importer, node, kind, inputs or [view.base], attrs, dims)


def softmax(importer: Importer, node: Node) -> None:
    """And its logarithm. Before opset 13 they are over all dimensions from `axis` on."""
    view = importer.view(node)
    rank = len(view.dims)
    (axis,) = axes_of(importer, node, [node.attrs.get("axis", 1 if node.opset < 13 else -1)], rank)
    axes = range(axis, rank) if node.opset < 13 else [axis]
    view, shape = reducible(importer, node, view, axes)
    if prod(shape) == 1 and importer.batch == 1 and len(shape) < 2:
        raise importer.refuse(node, "softmax over the whole batch is not supported")
    finish(importer, node, node.kind, [view.base], {"shape": shape}, importer.seen_through(view))
