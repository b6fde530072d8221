"""Reshapes, transposes, slices and joins."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from fusetile.onnx_import.contents import Node
from fusetile.onnx_import.importer import Importer
from fusetile.onnx_import.rules.common import axes_of, finish, listed, moved
from fusetile.onnx_import.rules.resize import slice_axis
from fusetile.onnx_import.views import View, merged
from fusetile.ops.rearrange import Dims, whole_view
from fusetile.ops.resample import Taps

PARTS = 8
"""Indices with fewer breaks than that are cut out and joined; others are looked up one by one."""


def _reshape_to(importer: Importer, node: Node, target: Sequence[int]) -> None:
    """A view in another shape; where its digits can't make that up, it becomes a tensor first."""
    view, target = importer.view(node), tuple(int(size) for size in target)
    found = None
    if prod(target) == prod(view.shape):
        found = view.reshaped(target)
        if found is None:
            flat = view.reshaped((view.shape[0], prod(view.shape[1:]))) or view.reshaped((prod(view.shape),))
            assert flat is not None  # neighbours can always be put together
            found = importer.whole(importer.tensor(node, flat)).reshaped(target)
    if found is None or not _keeps_batch(importer, view, found):
        raise importer.refuse(
            node,
            f"it turns shape {view.shape} into {target}, and the batch must stay first. If a batch size is built into "
            "this node, export the model with a dynamic batch, or use that --batch",
        )
    importer.define(node, found)


def _keeps_batch(importer: Importer, view: View, found: View) -> bool:
    """Whether the batch, if it was the first dimension or the outer part of it, still is."""
    batch = (0, importer.batch, 1)
    return importer.batch == 1 or view.dims[0][:1] != (batch,) or found.dims[0][:1] == (batch,)


def reshape(importer: Importer, node: Node) -> None:
    """Of a map as a view; of a weight as another shape of the same parameter. A batch that was baked in gives way."""
    if (weight := importer.weight(node.inputs[0])) is not None:
        importer.reshape_weight(node, importer.constant_input(node, 1, "shape").tolist(), weight)
        return
    shape = importer.view(node).shape
    target = [int(size) for size in importer.constant_input(node, 1, "shape")]
    if not node.attrs.get("allowzero", 0):
        target = [shape[i] if size == 0 and i < len(shape) else size for i, size in enumerate(target)]
    baked, batch = importer.baked_batch or 1, importer.batch
    wrong = -1 in target[1:] or (-1 not in target and prod(target) != prod(shape))
    exported = baked != batch and wrong and target[0] > 0 and target[0] % baked == 0
    whole = target[0] == baked and shape[0] % batch == 0  # a map of weights has one image, whatever the batch
    if exported and (whole or prod(target) * batch == prod(shape) * baked):
        target[0] = target[0] // baked * batch  # the model was exported for another batch
    if -1 in target:
        known = prod(size for size in target if size != -1)
        target[target.index(-1)] = prod(shape) // known if known > 0 else 0
    _reshape_to(importer, node, target)


def flatten(importer: Importer, node: Node) -> None:
    """A reshape to two dimensions."""
    shape = importer.view(node).shape
    axis = node.attrs.get("axis", 1)
    axis += len(shape) * (axis < 0)
    _reshape_to(importer, node, (prod(shape[:axis]), prod(shape[axis:])))


def squeeze(importer: Importer, node: Node) -> None:
    """Dimensions of one left out."""
    if (weight := importer.weight(node.inputs[0])) is not None:
        importer.reshape_weight(node, [size for size in weight.shape if size != 1], weight)
        return
    view = importer.view(node)
    axes = listed(importer, node, 1, "axes")
    if axes is None:  # every dimension of one but the batch, which happens to be one
        axes = [i for i, size in enumerate(view.shape) if size == 1 and i > 0]
    dropped = axes_of(importer, node, axes, len(view.dims))
    if any(view.shape[i] != 1 for i in dropped):
        raise importer.refuse(node, f"axes {dropped} of shape {view.shape} are not all of size 1")
    importer.define(node, view.without(dropped))


def unsqueeze(importer: Importer, node: Node) -> None:
    """Dimensions of one put in."""
    axes = listed(importer, node, 1, "axes") or []
    weight = importer.weight(node.inputs[0])
    view = None if weight is not None else importer.view(node)
    rank = len(axes) + (weight.ndim if weight is not None else len(view.dims) if view else 0)
    new = axes_of(importer, node, axes, rank)
    if weight is not None:
        rest_sizes = iter(weight.shape)
        importer.reshape_weight(node, [1 if i in new else next(rest_sizes) for i in range(rank)], weight)
    elif view is not None:
        rest = iter(view.dims)
        importer.define(node, View(view.base, tuple(() if i in new else next(rest) for i in range(rank))))


def transpose(importer: Importer, node: Node) -> None:
    """Of weights: exporters write a fully connected layer without bias as MatMul(x, Transpose(w))."""
    w = importer.weight(node.inputs[0])
    rank = w.ndim if w is not None else len(importer.view(node).dims)
    order = [int(axis) for axis in node.attrs.get("perm", range(rank)[::-1])]
    if w is None:
        importer.define(node, importer.view(node).permuted(order))
    elif w.ndim == 2 and order == [1, 0]:
        importer.transpose(node)
    elif order == list(range(rank)):
        importer.alias[node.outputs[0]] = node.inputs[0]
    else:
        importer.define(node, importer.view(node).permuted(order))


def depth_to_space(importer: Importer, node: Node) -> None:
    """Channels become blocks of pixels, in either order of channels."""
    view, block = importer.view(node), int(node.attrs["blocksize"])
    n, c, h, w = view.shape
    depth_first = node.attrs.get("mode", "DCR") == "DCR"
    split = (n, block, block, c // block**2, h, w) if depth_first else (n, c // block**2, block, block, h, w)
    order = (0, 3, 4, 1, 5, 2) if depth_first else (0, 1, 4, 2, 5, 3)
    _rearranged(importer, node, view, split, order, (n, c // block**2, h * block, w * block))


def space_to_depth(importer: Importer, node: Node) -> None:
    """Blocks of pixels become channels."""
    view, block = importer.view(node), int(node.attrs["blocksize"])
    n, c, h, w = view.shape
    split = (n, c, h // block, block, w // block, block)
    _rearranged(importer, node, view, split, (0, 3, 5, 1, 2, 4), (n, c * block**2, h // block, w // block))


def _rearranged(
    importer: Importer, node: Node, view: View, split: Sequence[int], order: Sequence[int], result: Sequence[int]
) -> None:
    if prod(split) != prod(view.shape):
        raise importer.refuse(node, f"blocks of {node.attrs['blocksize']} do not fit the shape {view.shape}")
    parts = view.reshaped(split) or importer.whole(importer.tensor(node, view)).reshaped(split)
    assert parts is not None  # sizes that divide
    found = parts.permuted(order).reshaped(result)
    assert found is not None
    importer.define(node, found)


def expand(importer: Importer, node: Node) -> None:
    """A map repeated along dimensions of one."""
    view = importer.view(node)
    target = [int(size) for size in importer.constant_input(node, 1, "shape")]
    rank = max(len(target), len(view.dims))
    view, target = view.of_rank(rank), [1] * (rank - len(target)) + target
    if target[0] == importer.baked_batch and view.shape[0] == importer.batch:
        target[0] = importer.batch
    shape = tuple(max(pair) for pair in zip(view.shape, target, strict=True))
    if shape == view.shape:
        importer.define(node, view)
    elif rank <= 4:
        importer.emit(node, "Expand", [importer.tensor(node, view)], {"shape": shape})
    else:
        small = merged([view.shape, shape])
        if small is None:
            raise importer.refuse(node, f"it expands {view.shape} to {shape} along too many dimensions")
        flat = view.reshaped(small[0])
        assert flat is not None  # neighbours can always be put together
        x = importer.step(node, "expanded", "Expand", [importer.tensor(node, flat)], {"shape": tuple(small[1])})
        found = importer.whole(x).reshaped(shape)
        assert found is not None  # neighbours are taken apart again
        importer.define(node, found)


def tile(importer: Importer, node: Node) -> None:
    """Copies, joined."""
    repeats = [int(times) for times in importer.constant_input(node, 1, "repeats")]
    x = importer.data(node)
    for axis, times in enumerate(repeats):
        if times > 1 and importer.shape(x)[axis] == 1:
            shape = list(importer.shape(x))
            shape[axis] = times
            x = importer.step(node, "tiled", "Expand", [x], {"shape": tuple(shape)})
        elif times > 1:
            x = importer.step(node, "tiled", "Concat", [x] * times, {"axis": axis})
    importer.define(node, importer.whole(x))


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
        names = []
        for view in views:
            part = ((stored, view.shape[axis], 1),)
            own = [view.shape[axis] if i == stored else size for i, size in enumerate(shape)]
            names.append(moved(importer, node, view, (*dims[:axis], part, *dims[axis + 1 :]), own))
        if None not in names:
            parts = [name for name in names if name is not None]
            whole = View("", dims).is_whole(shape)
            finish(importer, node, "Concat", parts, {"axis": stored}, None if whole else dims)
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
