"""Comparisons, and choices by them. Of random numbers they are a dropout written out: random numbers compared with a
constant, and the map times what comes of it.

    RandomUniformLike(x) -> Less(., 0.7) -> Cast -> Div(., 0.7) -> Mul(x, .)      ==>      Dropout(x), ratio 0.3

So newer exporters write what has no op of its own: dropout of whole channels, or of the branch of a residual block
(stochastic depth). Others write Floor(0.7 + random). The masks are fusetile's own, not the file's: the same on any
number of nodes.

Other comparisons are maps of 1 for true and 0 for false.
"""

from __future__ import annotations

from dataclasses import replace

from fusetile.onnx_import.contents import Node
from fusetile.onnx_import.importer import Importer, Mask
from fusetile.onnx_import.rules.broadcast import operands
from fusetile.onnx_import.rules.common import Rule, finish, number_of, pointwise, stored_anew
from fusetile.onnx_import.rules.norm import dropped
from fusetile.onnx_import.views import View, merged


def uniform(importer: Importer, node: Node) -> None:
    """Random numbers between 0 and 1, of the shape of an operand or of an attribute."""
    low, high = float(node.attrs.get("low", 0.0)), float(node.attrs.get("high", 1.0))
    if (low, high) != (0.0, 1.0):
        raise importer.refuse(node, f"random numbers from {low} to {high} are not supported; only a dropout's, 0 to 1")
    shape = importer.known_shape(node.inputs[0]) if node.inputs else tuple(node.attrs["shape"])
    importer.masks[node.outputs[0]] = Mask(shape)


def compared(kind: str, *, turned: bool) -> Rule:
    """The first operand greater than the second, or at least it; `turned`: the other way round. Of random numbers that
    says which part is kept."""

    def rule(importer: Importer, node: Node) -> None:
        masks = [importer.mask(name) for name in node.inputs]
        if masks == [None, None]:
            names, dims = operands(importer, node, (1, 0) if turned else (0, 1))
            finish(importer, node, kind, names, dims=dims)
            return
        drawn, other = (0, 1) if masks[0] is not None else (1, 0)
        mask, level = masks[drawn], number_of(importer, node.inputs[other])
        level = None if level is None or mask is None else level - mask.low
        if mask is None or mask.kept is not None or level is None or not 0 <= level <= 1:
            raise importer.refuse(
                node, "random numbers, between 0 and 1, are compared with a constant only (a dropout)"
            )
        kept = level if turned is (drawn == 0) else 1 - level
        importer.masks[node.outputs[0]] = replace(mask, kept=kept)

    return rule


def floor(importer: Importer, node: Node) -> None:
    """Of random numbers between p and 1 + p: which are 1 or more."""
    mask = importer.mask(node.inputs[0])
    if mask is None or mask.kept is not None or not 0 <= mask.low <= 1:
        raise importer.refuse(node, "only Floor(p + random numbers between 0 and 1) is supported (a dropout)")
    importer.masks[node.outputs[0]] = replace(mask, kept=mask.low, low=0.0)


def equal(importer: Importer, node: Node) -> None:
    """Each at least the other."""
    names, dims = operands(importer, node, (0, 1))
    sides = [importer.step(node, f"side{i}", "IsAtLeast", pair) for i, pair in enumerate((names, names[::-1]))]
    finish(importer, node, "Mul", sides, dims=dims)


def is_nan(importer: Importer, node: Node) -> None:
    """What is not at least itself."""
    view = importer.view(node)
    number = importer.step(node, "number", "IsAtLeast", [view.base, view.base])
    _inverse(importer, node, view.over(number))


def both(kind: str) -> Rule:
    """And, which is a product, and Or, a maximum."""

    def rule(importer: Importer, node: Node) -> None:
        names, dims = operands(importer, node, (0, 1))
        finish(importer, node, kind, names, dims=dims)

    return rule


def inverted(importer: Importer, node: Node) -> None:
    """Not: of the mask of a dropout, or of a map of zeros and ones."""
    mask = importer.mask(node.inputs[0])
    if mask is None:
        _inverse(importer, node, importer.view(node))
        return
    if mask.kept is None:
        raise importer.refuse(node, "random numbers are true or false only after a comparison")
    importer.masks[node.outputs[0]] = replace(mask, kept=1 - mask.kept)


def _inverse(importer: Importer, node: Node, view: View) -> None:
    """1 for 0, and 0 for 1."""
    turned = importer.step(node, "turned", "Scale", [view.base], {"factor": -1.0})
    pointwise(importer, node, "Shift", view.over(turned), {"offset": 1.0})


def masked(importer: Importer, node: Node) -> bool:
    """Whether an Add, Mul or Div was one of a mask: with a number, or the dropout of a map."""
    masks = [importer.mask(name) for name in node.inputs]
    if masks == [None, None]:
        return False
    at = 0 if masks[0] is not None else 1
    mask, other = masks[at], node.inputs[1 - at]
    if node.kind == "Add" and mask is not None and mask.kept is None:
        if (number := number_of(importer, other)) is None:
            raise importer.refuse(node, "random numbers are added to a constant number only (a dropout)")
        importer.masks[node.outputs[0]] = replace(mask, low=mask.low + number)
        return True
    if node.kind == "Add" or mask is None or mask.kept is None or None not in masks or (node.kind == "Div" and at == 1):
        raise importer.refuse(
            node, "of random numbers, only the mask of a dropout, times or over a number, is supported"
        )
    number = number_of(importer, other)
    if number is not None:
        factor = mask.factor * number if node.kind == "Mul" else mask.factor / number
        importer.masks[node.outputs[0]] = replace(mask, factor=factor)
        return True
    if node.kind == "Div":
        raise importer.refuse(node, f"it divides a mask by {other!r}, which is not a number")
    _drop(importer, node, 1 - at, mask)
    return True


def _drop(importer: Importer, node: Node, i: int, mask: Mask) -> None:
    """Operand i times a mask; one of fewer elements is drawn in a map of ones and broadcast."""
    view = importer.view(node, i)
    assert mask.kept is not None
    view, small = _fitted(importer, node, view, mask)
    scale = {"factor": mask.kept * mask.factor}
    if small == importer.shape(view.base):
        kept = dropped(importer, node, view.base, 1 - mask.kept)
        if abs(scale["factor"] - 1) < 1e-6:
            importer.define(node, view.over(kept))
        else:
            pointwise(importer, node, "Scale", view.over(kept), scale)
        return
    total = importer.step(node, "small", "SumTo", [view.base], {"shape": small})
    ones = importer.step(node, "ones", "Clip", [total], {"low": 1.0, "high": 1.0})
    kept = dropped(importer, node, ones, 1 - mask.kept)
    if abs(scale["factor"] - 1) >= 1e-6:
        kept = importer.step(node, "scaled", "Scale", [kept], scale)
    finish(importer, node, "Mul", [view.base, kept], dims=importer.seen_through(view))


def _fitted(importer: Importer, node: Node, view: View, mask: Mask) -> tuple[View, tuple[int, ...]]:
    """The map that a mask is for, and the mask's shape in the axes of the tensor that the view shows: another tensor if
    those are not whole, as in windows that are dropped by image."""
    shape = (1,) * (len(view.shape) - len(mask.shape)) + mask.shape
    fits = len(shape) == len(view.shape) and all(map(lambda size, full: size in (1, full), shape, view.shape))
    left_out = view.axes({i for i, size in enumerate(shape) if size < view.shape[i]}) if fits else None
    if left_out is not None:
        return view, tuple(1 if axis in left_out else size for axis, size in enumerate(importer.shape(view.base)))
    sizes = merged([view.shape, shape]) if fits else None
    if sizes is None:
        raise importer.refuse(node, f"its mask of shape {mask.shape} does not fit the map of shape {view.shape}")
    return stored_anew(importer, node, view, sizes[0]), tuple(sizes[1])
