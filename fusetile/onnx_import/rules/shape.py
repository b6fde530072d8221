"""Reshapes and transposes, and maps that are repeated."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from fusetile.onnx_import.contents import Node
from fusetile.onnx_import.importer import Importer
from fusetile.onnx_import.rules.common import axes_of, listed
from fusetile.onnx_import.views import View, merged


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
