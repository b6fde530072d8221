"""Joins, slices and what is picked: parts of dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from fusetile.onnx_import.contents import Node
from fusetile.onnx_import.importer import Importer
from fusetile.onnx_import.rules.common import axes_of, finish, listed
from fusetile.onnx_import.rules.resize import slice_axis
from fusetile.onnx_import.views import View
from fusetile.ops.rearrange import Dims, whole_view
from fusetile.ops.resample import Taps

PARTS = 8
"""Indices with fewer breaks than that are cut out and joined; others are looked up one by one."""


def concat(importer: Importer, node: Node) -> None:
    """Where what is joined is a whole axis of one of the tensors, as that is stored. What is empty is left out."""
    views = [importer.view(node, i) for i, name in enumerate(node.inputs) if prod(importer.known_shape(name))]
    rank = len(views[0].dims)
    (axis,) = axes_of(importer, node, [node.attrs["axis"]], rank)
    if len({(len(view.dims), *view.shape[:axis], *view.shape[axis + 1 :]) for view in views}) > 1:
        raise importer.refuse(node, f"shapes {[view.shape for view in views]} can't be joined along axis {axis}")
    if len(views) == 1:
        importer.define(node, views[0])
        return
    for dims, shape in _joined_layouts(importer, views, axis):
        ((stored, _, _),) = dims[axis]
        found = []
        for view in views:
            part = ((stored, view.shape[axis], 1),)
            own = [view.shape[axis] if i == stored else size for i, size in enumerate(shape)]
            found.append(view.stored_as((*dims[:axis], part, *dims[axis + 1 :]), own))
        laid_out = [importer.tensor(node, view) for view in found if view is not None] if None not in found else []
        if laid_out:
            whole = View("", dims).is_whole(shape)
            finish(importer, node, "Concat", laid_out, {"axis": stored}, None if whole else dims)
            return
    small, place = _around(views[0].shape, axis)
    flat = [view.reshaped([s if i != place else view.shape[axis] for i, s in enumerate(small)]) for view in views]
    joined = [importer.tensor(node, view) for view in flat if view is not None]
    shape = [*views[0].shape[:axis], sum(view.shape[axis] for view in views), *views[0].shape[axis + 1 :]]
    if rank <= 4:
        importer.emit(node, "Concat", joined, {"axis": place})
        return
    y = importer.step(node, "joined", "Concat", joined, {"axis": place})
    result = importer.whole(y).reshaped(shape)
    assert result is not None  # neighbours are taken apart again
    importer.define(node, result)


def _joined_layouts(importer: Importer, views: Sequence[View], axis: int) -> Iterator[tuple[Dims, Sequence[int]]]:
    """Dimensions and shapes in which views may be joined: those of a view that has a whole axis along which they are,
    of maps before others; for tokens whose features are channels of a map, pixels of a row."""
    total = sum(view.shape[axis] for view in views)
    shapes = {view: importer.shape(view.base) for view in views}
    for view in sorted(views, key=lambda view: -len(shapes[view])):
        digits = view.dims[axis]
        if len(digits) == 1 and digits[0][1] == shapes[view][digits[0][0]]:
            stored = digits[0][0]
            dims = (*view.dims[:axis], ((stored, total, 1),), *view.dims[axis + 1 :])
            yield dims, [total if i == stored else size for i, size in enumerate(shapes[view])]
    images, _, *features = views[0].shape
    if axis == 1 and len(features) == 1 and any(view.dims[2] == ((1, *features, 1),) for view in views):
        pixels = View("", whole_view((images, *features, 1, total)))
        yield pixels.permuted((0, 3, 1)).dims, (images, *features, 1, total)


def _around(shape: Sequence[int], axis: int) -> tuple[list[int], int]:
    """At most four sizes that a shape becomes when neighbours are put together, but not with `axis`; where it is then.
    The batch stays alone."""
    if len(shape) <= 4:
        return list(shape), axis
    before, after = list(shape[:axis]), list(shape[axis + 1 :])
    before = [*before[:1], prod(before[1:])] if len(before) > 1 else before
    return [*before, shape[axis], *([prod(after)] if after else [])], len(before)


def _cut(importer: Importer, node: Node, view: View, axis: int, indices: Sequence[int]) -> View:
    """A view of what is left of one dimension: cut in the tensor as it is stored, if it is a whole axis there, or the
    part of one that counts most."""
    digits = view.dims[axis]
    if list(indices) == list(range(view.shape[axis])):
        return view
    if (cut := _cut_in_storage(importer, node, view, axis, indices)) is not None:
        return cut
    stored = digits[0][0] if len(digits) == 1 and digits[0][1] == importer.shape(view.base)[digits[0][0]] else -1
    breaks = sum(b != a + 1 for a, b in itertools.pairwise(indices))
    if breaks >= PARTS and not (stored >= 2 and len(importer.shape(view.base)) == 4):
        return _looked_up(importer, node, view, axis, indices, (len(indices),))
    if stored >= 0:
        base = slice_axis(importer, node, view.base, stored, indices)
        dims = ((stored, len(indices), 1),) if len(indices) > 1 else ()
        return View(base, (*view.dims[:axis], dims, *view.dims[axis + 1 :]))
    small, place = _around(view.shape, axis)
    flat = view.reshaped(small)
    assert flat is not None  # neighbours can always be put together
    x = slice_axis(importer, node, importer.tensor(node, flat), place, indices)
    result = importer.whole(x).reshaped([*view.shape[:axis], len(indices), *view.shape[axis + 1 :]])
    assert result is not None
    return result


def _cut_in_storage(importer: Importer, node: Node, view: View, axis: int, indices: Sequence[int]) -> View | None:
    """A range of a dimension that is one digit, the most significant of its axis: of q, k and v that a layer makes in
    one go, each is a range of channels, whatever heads they have."""
    first, count = indices[0] if len(indices) else 0, len(indices)
    if len(view.dims[axis]) != 1 or list(indices) != list(range(first, first + count)) or not count:
        return None
    ((stored, size, step),) = view.dims[axis]
    if size * step != importer.shape(view.base)[stored] or step == 1:
        return None
    base = slice_axis(importer, node, view.base, stored, range(first * step, (first + count) * step))
    digits = ((stored, count, step),) if count > 1 else ()
    return View(base, (*view.dims[:axis], digits, *view.dims[axis + 1 :]))


def slice_(importer: Importer, node: Node) -> None:
    """Ranges of dimensions, with steps."""
    view = importer.view(node)
    rank = len(view.dims)
    starts, ends = listed(importer, node, 1, "starts"), listed(importer, node, 2, "ends")
    if starts is None or ends is None:
        raise importer.refuse(node, "it has no starts and ends")
    axes = listed(importer, node, 3, "axes") or list(range(len(starts)))
    steps = listed(importer, node, 4, "steps") or [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis = axis % rank
        indices = list(range(view.shape[axis]))[slice(start, end if end > -(2**31) else None, step)]
        if not indices:  # as in a roll by nothing: Concat leaves it out
            shape = (*view.shape[:axis], 0, *view.shape[axis + 1 :])
            importer.alias[node.outputs[0]] = importer.new_constant(f"{node.outputs[0]}.empty", np.zeros(shape))
            return
        view = _cut(importer, node, view, axis, indices)
    importer.define(node, view)


def split(importer: Importer, node: Node) -> None:
    """Parts of a dimension, one after the other."""
    view = importer.view(node)
    (axis,) = axes_of(importer, node, [node.attrs.get("axis", 0)], len(view.dims))
    sizes, size = listed(importer, node, 1, "split"), view.shape[axis]
    if sizes is None:
        each = -(-size // len(node.outputs))
        sizes = [min(each, size - i * each) for i in range(len(node.outputs))]
    start = 0
    for output, part in zip(node.outputs, sizes, strict=True):
        if output and importer.uses[output]:
            importer.define(node, _cut(importer, node, view, axis, range(start, start + part)), output)
        start += part


def split_to_sequence(importer: Importer, node: Node) -> None:
    """The parts are there for SequenceAt."""
    view = importer.view(node)
    (axis,) = axes_of(importer, node, [node.attrs.get("axis", 0)], len(view.dims))
    size, each, sizes = view.shape[axis], 1, None
    if node.has(1):
        given = importer.constant_input(node, 1, "split")
        each, sizes = (int(given), None) if given.ndim == 0 else (1, [int(part) for part in given])
    sizes = sizes or [min(each, size - start) for start in range(0, size, each)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    ranges = [range(start, start + part) for start, part in zip(starts, sizes, strict=True)]
    parts = [_cut(importer, node, view, axis, chosen) for chosen in ranges]
    drop = not node.has(1) and not node.attrs.get("keepdims", 1)
    importer.sequences[node.outputs[0]] = [part.without([axis]) if drop else part for part in parts]


def sequence_at(importer: Importer, node: Node) -> None:
    """One of the parts that SplitToSequence made."""
    parts = importer.sequences.get(importer.resolved(node.inputs[0]))
    if parts is None:
        raise importer.refuse(node, f"{node.inputs[0]!r} is not a sequence of parts of one tensor")
    importer.define(node, parts[int(importer.constant_input(node, 1, "position"))])


def gather(importer: Importer, node: Node) -> None:
    """What stands at constant indices along one dimension."""
    view = importer.view(node)
    (axis,) = axes_of(importer, node, [node.attrs.get("axis", 0)], len(view.dims))
    indices = importer.constant_input(node, 1, "indices")
    size = view.shape[axis]
    picked = (indices.reshape(-1) % size).tolist()
    if indices.ndim > 1 and len(view.dims) == 1 and indices.size * importer.batch == size * indices.shape[0]:
        # so newer exporters write as_strided of what lies in order, for the batch of the export
        whole = view.reshaped((importer.batch, *indices.shape[1:])) if picked == list(range(indices.size)) else None
        if whole is None:
            raise importer.refuse(node, f"indices of shape {indices.shape} mix the images of a batch")
        importer.define(node, whole)
    elif indices.ndim > 1:
        importer.define(node, _looked_up(importer, node, view, axis, picked, indices.shape))
    else:
        found = _cut(importer, node, view, axis, picked)
        importer.define(node, found if indices.ndim else found.without([axis]))


def _looked_up(
    importer: Importer, node: Node, view: View, axis: int, indices: Sequence[int], shape: Sequence[int]
) -> View:
    """Along one dimension what stands at these indices, which have this shape: the rows of a linear map."""
    before, after = view.shape[:axis], view.shape[axis + 1 :]
    flat = view.reshaped((*(before[:1] or (1,)), prod(before[1:]), view.shape[axis], prod(after)))
    assert flat is not None  # neighbours can always be put together
    rows, columns = Taps.picking(view.shape[axis], indices), Taps.picking(prod(after), range(prod(after)))
    x = importer.resampled(node, importer.tensor(node, flat), rows, columns)
    found = importer.whole(x).reshaped((*before, *shape, *after))
    assert found is not None  # neighbours are taken apart again
    return found


def gather_nd(importer: Importer, node: Node) -> None:
    """Constant indices that are a number, or a grid: each of the first dimensions is indexed along dimensions of its
    own, in order, as in x[rows[:, None], columns]."""
    view, indices = importer.view(node), importer.constant_input(node, 1, "indices")
    *counts, depth = indices.shape
    owners: list[int] = []
    for dimension in range(len(counts)):
        varying = [axis for axis in range(depth) if np.ptp(indices[..., axis], dimension).any()]
        owners += varying or owners[-1:] or [0]
    if int(node.attrs.get("batch_dims", 0)) or len(owners) != len(counts) or owners != sorted(owners):
        raise importer.refuse(
            node,
            f"indices of shape {indices.shape} that are no slices along single dimensions are not supported; write "
            "it as slicing, or torch.index_select along one dimension after the other",
        )
    rest = view.shape[depth:]
    for axis in range(depth):
        chosen = indices[tuple(slice(None) if owner == axis else 0 for owner in owners)][..., axis].reshape(-1)
        view = _cut(importer, node, view, axis, (chosen % view.shape[axis]).tolist())
    shape = (*counts, *rest)
    found = view.reshaped(shape) or importer.whole(importer.tensor(node, view)).reshaped(shape)
    assert found is not None  # neighbours are taken apart
    importer.define(node, found)
