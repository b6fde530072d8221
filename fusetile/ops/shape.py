"""Ops that only move elements: concatenation, slices, padding with zeros, and reshapes that keep the batch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from fusetile.box import Box, extents
from fusetile.errors import UserError
from fusetile.graph import BACKWARD, Graph, Op, Tensor
from fusetile.ops.base import Access, All, Along, Array, Attrs, Axis, Domain, Row, Spec, element_axes, register


def _concat_shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    axis, first = attrs["axis"], inputs[0]
    for tensor in inputs[1:]:
        if any(a != b for i, (a, b) in enumerate(zip(first.shape, tensor.shape, strict=True)) if i != axis):
            raise UserError(f"{first.name!r} of shape {first.shape} and {tensor.name!r} of shape {tensor.shape} differ")
    joined = sum(tensor.shape[axis] for tensor in inputs)
    return [Spec((*first.shape[:axis], joined, *first.shape[axis + 1 :]), first.dtype)]


def _moved(access: Access, axis: int, size: int, offset: int) -> Access:
    """`access` with its dimension `axis` shifted: index = iteration - offset, in a tensor of `size` there."""
    dim = access[axis]
    assert isinstance(dim, Along)
    return (*access[:axis], Along(dim.axis, size, offset), *access[axis + 1 :])


def _concat_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, access = element_axes(outputs[0])
    axis, offset, reads = attrs["axis"], 0, []
    for tensor in inputs:
        reads.append(_moved(access, axis, tensor.shape[axis], offset))
        offset += tensor.shape[axis]
    return Domain(axes, tuple(reads), (access,))


def _concat(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    # an input that the box does not reach is empty in every dimension
    return [np.concatenate([x for x in inputs if x.size], op.attrs["axis"])]


def _concat_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    dy = grads[0]
    assert dy is not None
    axis, start = op.attrs["axis"], 0
    parts: list[str | None] = []
    for x in op.inputs:
        stop = start + graph.tensors[x].shape[axis]
        attrs = {"axis": axis, "start": start, "stop": stop}
        parts += graph.add("Slice", [dy], attrs=attrs, stem=f"grad.{x}", phase=BACKWARD, origin=op.origin)
        start = stop
    return parts


def _slice_shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    axis, shape = attrs["axis"], inputs[0].shape
    return [Spec((*shape[:axis], attrs["stop"] - attrs["start"], *shape[axis + 1 :]), inputs[0].dtype)]


def _slice_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, access = element_axes(outputs[0])
    axis = attrs["axis"]
    return Domain(axes, (_moved(access, axis, inputs[0].shape[axis], -attrs["start"]),), (access,))


def _slice_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    dy, x, axis = grads[0], op.inputs[0], op.attrs["axis"]
    assert dy is not None
    attrs = {"axis": axis, "before": op.attrs["start"], "after": graph.tensors[x].shape[axis] - op.attrs["stop"]}
    return [*graph.add("Pad", [dy], attrs=attrs, stem=f"grad.{x}", phase=BACKWARD, origin=op.origin)]


def _pad_shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    axis, shape = attrs["axis"], inputs[0].shape
    longer = shape[axis] + attrs["before"] + attrs["after"]
    return [Spec((*shape[:axis], longer, *shape[axis + 1 :]), inputs[0].dtype)]


def _pad_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, access = element_axes(outputs[0])
    axis = attrs["axis"]
    return Domain(axes, (_moved(access, axis, inputs[0].shape[axis], attrs["before"]),), (access,))


def _pad(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    y = np.zeros(extents(domain.output(box)), inputs[0].dtype)
    if inputs[0].size:
        axis = op.attrs["axis"]
        start = domain.need(box, 0)[axis][0] + op.attrs["before"] - domain.output(box)[axis][0]
        place = [slice(None)] * y.ndim
        place[axis] = slice(start, start + inputs[0].shape[axis])
        y[tuple(place)] = inputs[0]
    return [y]


def _pad_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    dy, x, axis, start = grads[0], op.inputs[0], op.attrs["axis"], op.attrs["before"]
    assert dy is not None
    attrs = {"axis": axis, "start": start, "stop": start + graph.tensors[x].shape[axis]}
    return [*graph.add("Slice", [dy], attrs=attrs, stem=f"grad.{x}", phase=BACKWARD, origin=op.origin)]


def _reshape_shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    x, shape = inputs[0], attrs["shape"]
    if prod(shape) != prod(x.shape) or shape[0] != x.shape[0]:
        raise UserError(f"{x.name!r} of shape {x.shape} can't become {shape}: the batch dimension must stay as it is")
    return [Spec(tuple(shape), x.dtype)]


def _reshape_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    """Only cuts of the batch survive; those of the channels too where they stay as they are."""
    x, y = inputs[0].shape, outputs[0].shape
    axes, kept = [Axis("n", x[0])], 1
    if x[1] == y[1]:
        axes, kept = [*axes, Axis("k", x[1])], 2

    def access(shape: Sequence[int]) -> Access:
        return (*(Along(axis.name, axis.size) for axis in axes), *(All(size) for size in shape[kept:]))

    return Domain(tuple(axes), (access(x),), (access(y),))


def _reshape_vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
    dy, x = grads[0], op.inputs[0]
    assert dy is not None
    attrs = {"shape": graph.tensors[x].shape}
    return [*graph.add("Reshape", [dy], attrs=attrs, stem=f"grad.{x}", phase=BACKWARD, origin=op.origin)]


register(Row("Concat", _concat_shape, _concat_domain, _concat, _concat_vjp, kernel="concat"))
register(
    Row(
        "Slice",
        _slice_shape,
        _slice_domain,
        lambda op, domain, box, inputs: [inputs[0].copy()],
        _slice_vjp,
        kernel="slice",
    )
)
register(Row("Pad", _pad_shape, _pad_domain, _pad, _pad_vjp, kernel="pad"))
register(
    Row(
        "Reshape",
        _reshape_shape,
        _reshape_domain,
        lambda op, domain, box, inputs: [inputs[0].reshape(extents(domain.output(box)))],
        _reshape_vjp,
        kernel="reshape",
    )
)
