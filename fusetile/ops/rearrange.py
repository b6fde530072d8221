"""Reshapes and transposes of any kind, put together into one move: every index is written in other digits.

    channel shuffle of 6 channels in 2 groups        y[n, c, h, w] = x[n, c % 2 * 3 + c // 2, h, w]

A view of a tensor is, per dimension, a tuple of digits (axis, size, step), the most significant first: a digit counts
`size` steps of `step` along an axis of the tensor. Every axis is covered by its digits exactly once, so that the
gradient is the inverse move.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from fusetile.box import Box
from fusetile.graph import BACKWARD, Graph, Op, Tensor
from fusetile.ops.base import Array, Attrs, Digits, Domain, Row, Spec, element_axes, register

Digit = tuple[int, int, int]  # axis, size, step
Dims = tuple[tuple[Digit, ...], ...]


def shape_of(dims: Dims) -> tuple[int, ...]:
    """The shape of a view."""
    return tuple(prod(size for _, size, _ in digits) for digits in dims)


def whole_view(shape: Sequence[int]) -> Dims:
    """A tensor as it is."""
    return tuple(((axis, size, 1),) if size > 1 else () for axis, size in enumerate(shape))


def joined(digits: Sequence[Digit]) -> tuple[Digit, ...]:
    """The same digits with neighbours that are one number put together."""
    found: list[Digit] = []
    for axis, size, step in digits:
        if found and found[-1][0] == axis and found[-1][2] == size * step:
            found[-1] = (axis, found[-1][1] * size, step)
        else:
            found.append((axis, size, step))
    return tuple(found)


def reshaped(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """The view with the same elements in another shape, or None if that is not made of whole digits."""
    rest = [digit for digits in dims for digit in digits]
    found = []
    for size in shape:
        taken: list[Digit] = []
        while size > 1:
            axis, count, step = rest.pop(0)
            if size % count == 0:
                taken.append((axis, count, step))
                size //= count
            elif count % size == 0:
                taken.append((axis, size, step * (count // size)))
                rest.insert(0, (axis, count // size, step))
                size = 1
            else:
                return None
        found.append(joined(taken))
    return tuple(found)


def inverse(dims: Dims, axes: int) -> Dims:
    """The view of the result that is the tensor of `axes` dimensions again."""
    found: list[list[tuple[int, Digit]]] = [[] for _ in range(axes)]
    for place, digits in enumerate(dims):
        inner = 1
        for axis, size, step in reversed(digits):
            found[axis].append((step, (place, size, inner)))
            inner *= size
    return tuple(joined([digit for _, digit in sorted(digits, reverse=True)]) for digits in found)


def _domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, access = element_axes(outputs[0])
    terms: list[list[tuple[str, int, int, int]]] = [[] for _ in inputs[0].shape]
    for axis, digits in zip(axes, attrs["dims"], strict=True):
        inner = 1
        for source, size, step in reversed(digits):
            terms[source].append((axis.name, inner, size, step))
            inner *= size
    reads = tuple(Digits(tuple(term), size) for term, size in zip(terms, inputs[0].shape, strict=True))
    return Domain(axes, (reads,), (access,))


def _rearrange(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    at = dict(zip((axis.name for axis in domain.axes), np.ix_(*(np.arange(*part) for part in box)), strict=True))
    index = []
    for dim, (start, _) in zip(domain.reads[0], domain.need(box, 0), strict=True):
        assert isinstance(dim, Digits)
        digits = [times * (at[axis] // inner % size) for axis, inner, size, times in dim.terms]
        index.append(sum(digits, np.zeros((1,) * len(box), np.int64)) - start)
    return [np.asarray(inputs[0][tuple(np.broadcast_arrays(*index, *at.values())[: len(index)])])]


def _vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    dy, x = grads[0], op.inputs[0]
    assert dy is not None
    attrs = {"dims": inverse(op.attrs["dims"], len(graph.tensors[x].shape))}
    return [*graph.add("Rearrange", [dy], attrs=attrs, stem=f"grad.{x}", phase=BACKWARD, origin=op.origin)]


register(
    Row(
        "Rearrange",
        lambda attrs, inputs: [Spec(shape_of(attrs["dims"]), inputs[0].dtype)],
        _domain,
        _rearrange,
        _vjp,
        kernel="rearrange",
    )
)
