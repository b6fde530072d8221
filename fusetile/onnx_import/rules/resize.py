"""Resize, Upsample and Pad: linear maps of rows and of columns.

Source of coordinates, roundings and weights: https://onnx.ai/onnx/operators/onnx__Resize.html
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import ceil, floor

import numpy as np

from fusetile.graph import Parameter
from fusetile.onnx_import.contents import Node
from fusetile.onnx_import.importer import Importer
from fusetile.onnx_import.rules.common import axes_of, listed, number_of
from fusetile.onnx_import.views import View
from fusetile.ops.resample import Taps

HALF = Fraction(1, 2)


def resize(importer: Importer, node: Node) -> None:
    """By scales or by sizes; batch and channels must stay."""
    view = importer.view(node)
    shape, rank = view.shape, len(view.shape)
    if rank not in (3, 4):
        raise importer.refuse(node, f"its input has shape {shape}; supported are [N, C, H, W] and [N, C, W]")
    for key, plain in (("antialias", 0), ("keep_aspect_ratio_policy", "stretch")):
        if node.attrs.get(key, plain) != plain:
            raise importer.refuse(node, f"{key}={node.attrs[key]!r} is not supported")
    axes = axes_of(importer, node, node.attrs.get("axes", range(rank)), rank)
    old = node.kind == "Upsample" or node.opset < 11
    if not old and node.has(3):
        given = [int(size) for size in importer.constant_input(node, 3, "sizes")]
        sizes = dict(zip(axes, given, strict=True))
        scales = {axis: Fraction(size, shape[axis]) for axis, size in sizes.items()}
        sizes[0], scales[0] = shape[0], Fraction(1)  # perhaps the batch of the export
    else:
        if "scales" in node.attrs:
            numbers = [float(scale) for scale in node.attrs["scales"]]
        else:
            array = importer.weight(node.inputs[1 if old else 2])
            if array is None:
                raise importer.refuse(node, "its scales must be a constant")
            numbers = [float(scale) for scale in array]
        scales = {axis: _exact(scale) for axis, scale in zip(axes, numbers, strict=True)}
        sizes = {axis: floor(shape[axis] * scale) for axis, scale in scales.items()}
    if any(sizes.get(axis, shape[axis]) != shape[axis] for axis in (0, 1)) or min(sizes.values()) < 1:
        raise importer.refuse(node, f"it turns shape {shape} into sizes {sizes}; batch and channels must stay")
    maps = [
        _taps(importer, node, shape[axis], sizes.get(axis, shape[axis]), scales.get(axis, Fraction(1)), old)
        for axis in range(2, rank)
    ]
    if rank == 4:
        importer.resampled(node, importer.tensor(node, view), maps[0], maps[1], name=node.outputs[0])
        return
    row = importer.tensor(node, View(view.base, (*view.dims[:2], (), view.dims[2])))
    y = importer.resampled(node, row, Taps.picking(1, [0]), maps[0])
    importer.define(node, importer.whole(y).without([2]))


def _exact(scale: float) -> Fraction:
    """A scale that was written as a float32, with the small numbers that it stood for."""
    near = Fraction(scale).limit_denominator(4096)
    return near if np.float32(float(near)) == np.float32(scale) else Fraction(scale)


def _taps(importer: Importer, node: Node, size: int, wanted: int, scale: Fraction, old: bool) -> Taps:
    mode = node.attrs.get("mode", "nearest")
    form = node.attrs.get("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    if size == wanted and scale == 1:
        return Taps.picking(size, range(size))
    places = [_place(importer, node, i, size, wanted, scale, form) for i in range(wanted)]
    match mode:
        case "nearest":
            rounding = node.attrs.get("nearest_mode", "floor" if old else "round_prefer_floor")
            roundings = {
                "floor": floor,
                "ceil": ceil,
                "round_prefer_floor": lambda x: ceil(x - HALF),
                "round_prefer_ceil": lambda x: floor(x + HALF),
            }
            if rounding not in roundings:
                raise importer.refuse(node, f"nearest_mode={rounding!r} is not one of {', '.join(roundings)}")
            return Taps.picking(size, [min(max(roundings[rounding](place), 0), size - 1) for place in places])
        case "linear" | "bilinear":
            return _weighted(node, size, places, lambda distance: max(0.0, 1 - abs(distance)), 1)
        case "cubic":
            a = float(node.attrs.get("cubic_coeff_a", -0.75))

            def weight(distance: float) -> float:
                x = abs(distance)
                if x <= 1:
                    return ((a + 2) * x - (a + 3)) * x * x + 1
                return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0

            return _weighted(node, size, places, weight, 2)
    raise importer.refuse(node, f"mode={mode!r} is not one of nearest, linear and cubic")


def _place(importer: Importer, node: Node, i: int, size: int, wanted: int, scale: Fraction, form: str) -> Fraction:
    """Where an output lies among the inputs."""
    match form:
        case "half_pixel":
            return (i + HALF) / scale - HALF
        case "pytorch_half_pixel":
            return (i + HALF) / scale - HALF if wanted > 1 else Fraction(0)
        case "align_corners":
            return Fraction(i * (size - 1), wanted - 1) if wanted > 1 else Fraction(0)
        case "asymmetric":
            return i / scale
        case "half_pixel_symmetric":
            adjustment = wanted / (size * scale)
            return Fraction(size) / 2 * (1 - adjustment) + (i + HALF) / scale - HALF
    raise importer.refuse(node, f"coordinate_transformation_mode={form!r} is not supported")


def _weighted(node: Node, size: int, places: Sequence[Fraction], weight: Callable[[float], float], reach: int) -> Taps:
    exclude = bool(node.attrs.get("exclude_outside", 0))
    pairs = []
    for place in places:
        first = floor(place) - reach + 1
        taps = [(at, float(weight(float(place - at)))) for at in range(first, first + 2 * reach)]
        if exclude:
            taps = [(at, part) for at, part in taps if 0 <= at < size]
            total = sum(part for _, part in taps)
            taps = [(at, part / total) for at, part in taps]
        pairs.append([(min(max(at, 0), size - 1), part) for at, part in taps])
    return Taps.weighted(size, pairs)


def pad(importer: Importer, node: Node) -> None:
    """Rows and columns by any mode, other dimensions by a constant; negative pads cut off."""
    view = importer.view(node)
    shape, rank = view.shape, len(view.shape)
    pads = listed(importer, node, 1, "pads")
    if pads is None:
        raise importer.refuse(node, "it has no pads")
    axes = axes_of(importer, node, importer.constant_input(node, 3, "axes").tolist(), rank) if node.has(3) else None
    before, after = [0] * rank, [0] * rank
    for i, axis in enumerate(axes if axes is not None else range(rank)):
        before[axis], after[axis] = pads[i], pads[i + len(pads) // 2]
    mode = node.attrs.get("mode", "constant")
    value = number_of(importer, node.inputs[2]) if node.has(2) else float(node.attrs.get("value", 0.0))
    if value is None:
        raise importer.refuse(node, "its value must be a constant number")
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise importer.refuse(node, f"mode={mode!r} is not one of constant, reflect, edge and wrap")
    if not any(before) and not any(after):
        importer.define(node, view)
        return
    if rank == 5 and mode == "constant" and not value and _pad_stored(importer, node, view, before, after):
        return
    if rank not in (2, 3, 4) or (mode != "constant" and any((*before[:2], *after[:2]))):
        raise importer.refuse(node, f"pads {pads} of shape {shape} by mode {mode!r} are not supported")
    x = importer.tensor(node, View(view.base, view.dims + ((),) * (4 - rank)) if rank == 3 else view)
    plain = x
    for axis in range(2):
        x = _pad_dimension(importer, node, x, axis, before[axis], after[axis])
    if any((*before[2:], *after[2:])):
        sizes = (*shape[2:], 1)[:2]
        ends = [(one, other) for one, other in zip((*before[2:], 0), (*after[2:], 0), strict=True)][:2]
        maps = [_padded(importer, node, size, *pair, mode) for size, pair in zip(sizes, ends, strict=True)]
        x = importer.resampled(node, x, *maps)
        if mode == "constant" and not value and not any((*before[:2], *after[:2])) and min(*before, *after) >= 0:
            importer.zero_padded[x] = (plain, (ends[0][0], ends[1][0], ends[0][1], ends[1][1]))
    if mode == "constant" and value:
        x = _fill(importer, node, x, importer.shape(plain), before, after, value)
    whole = importer.whole(x)
    importer.define(node, whole.without([3]) if rank == 3 else whole)


def _pad_stored(importer: Importer, node: Node, view: View, before: Sequence[int], after: Sequence[int]) -> bool:
    """Zeros along dimensions that are whole axes of the tensor as it is stored; whether they all are."""
    padded = [i for i in range(len(view.dims)) if before[i] or after[i]]
    stored = importer.shape(view.base)
    places = {i: view.dims[i][0][0] for i in padded if len(view.dims[i]) == 1}
    if set(places) != set(padded) or any(view.shape[i] != stored[axis] for i, axis in places.items()):
        return False
    x, dims = view.base, list(view.dims)
    for i, axis in places.items():
        x = _pad_dimension(importer, node, x, axis, before[i], after[i])
        dims[i] = ((axis, importer.shape(x)[axis], 1),)
    importer.define(node, View(x, tuple(dims)))
    return True


def _pad_dimension(importer: Importer, node: Node, x: str, axis: int, before: int, after: int) -> str:
    size = importer.shape(x)[axis]
    start, stop = max(0, -before), size + min(0, after)
    if (start, stop) != (0, size):
        x = importer.step(node, "cut", "Slice", [x], {"axis": axis, "start": start, "stop": stop})
    if before > 0 or after > 0:
        x = importer.step(node, "wide", "Pad", [x], {"axis": axis, "before": max(0, before), "after": max(0, after)})
    return x


def _padded(importer: Importer, node: Node, size: int, before: int, after: int, mode: str) -> Taps:
    if mode == "reflect" and max(before, after) >= size:
        raise importer.refuse(node, f"{max(before, after)} can't be reflected of {size}")
    places = np.arange(-before, size + after)
    match mode:
        case "reflect":
            places = np.abs(places)
            places = np.where(places >= size, 2 * (size - 1) - places, places)
        case "edge":
            places = places.clip(0, size - 1)
        case "wrap":
            places = places % size
        case _:
            places = np.where(places < size, places, -1)
    return Taps.picking(size, [int(place) for place in places])


def _fill(
    importer: Importer,
    node: Node,
    x: str,
    inner: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    value: float,
) -> str:
    """x, which has zeros around it, plus a constant that is zero inside."""
    rank = len(inner)
    grown = [axis for axis in range(rank) if axis < len(before) and (before[axis] > 0 or after[axis] > 0)]
    shape = [importer.shape(x)[axis] if axis in grown else 1 for axis in range(rank)]
    frame = np.full(shape, value, np.float32)
    inside = [
        slice(max(0, before[axis]), shape[axis] - max(0, after[axis])) if axis in grown else slice(None)
        for axis in range(rank)
    ]
    frame[tuple(inside)] = 0
    name = importer.graph.add_parameter(
        importer.fresh(f"{node.outputs[0]}.frame"), Parameter(frame, trainable=False), kind="map"
    )
    return importer.step(node, "filled", "Add", [x, name])


def slice_axis(importer: Importer, node: Node, x: str, axis: int, indices: Sequence[int]) -> str:
    """x with only these indices of one axis, in this order."""
    size = importer.shape(x)[axis]
    if list(indices) == list(range(size)):
        return x
    if axis >= 2 and len(importer.shape(x)) == 4 and _steps(indices) != 1:
        maps = [Taps.picking(n, indices if i == axis else range(n)) for i, n in enumerate(importer.shape(x)[2:], 2)]
        return importer.resampled(node, x, *maps)
    parts, start = [], 0
    for end in range(1, len(indices) + 1):
        if end == len(indices) or indices[end] != indices[end - 1] + 1:
            attrs = {"axis": axis, "start": indices[start], "stop": indices[end - 1] + 1}
            parts.append(importer.step(node, "part", "Slice", [x], attrs))
            start = end
    return parts[0] if len(parts) == 1 else importer.step(node, "parts", "Concat", parts, {"axis": axis})


def _steps(indices: Sequence[int]) -> int:
    steps = {b - a for a, b in itertools.pairwise(indices)} or {1}
    return steps.pop() if len(steps) == 1 else 0
