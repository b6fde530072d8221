"""What rules share: axes, constants, and results that are views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusetile.onnx_import.contents import Node
from fusetile.onnx_import.importer import Importer
from fusetile.onnx_import.views import View
from fusetile.ops.rearrange import Dims

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
