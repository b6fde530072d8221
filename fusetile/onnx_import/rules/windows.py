"""Convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from fusetile.graph import Parameter
from fusetile.onnx_import.contents import Node
from fusetile.onnx_import.importer import Importer
from fusetile.onnx_import.rules import unpool
from fusetile.onnx_import.rules.reduce import reduce
from fusetile.onnx_import.views import View
from fusetile.ops.pool import divisors, pooled_size
from fusetile.ops.resample import Taps


def _same_pads(total: Sequence[int], mode: str) -> tuple[int, ...]:
    """An odd pad goes to the end (UPPER) or the start (LOWER)."""
    small, large = tuple(pad // 2 for pad in total), tuple(pad - pad // 2 for pad in total)
    return (*small, *large) if mode == "SAME_UPPER" else (*large, *small)


def _window(importer: Importer, node: Node, sizes: Sequence[int], kernel: Sequence[int]) -> dict[str, Any]:
    """strides, dilations and explicit pads (top, left, bottom, right) of a convolution or pool over rows and columns;
    one dimension of pixels is a row of columns."""
    missing = 2 - len(sizes)
    strides = (1,) * missing + tuple(node.attrs.get("strides", (1,) * len(sizes)))
    dilations = (1,) * missing + tuple(node.attrs.get("dilations", (1,) * len(sizes)))
    match node.attrs.get("auto_pad", "NOTSET"):
        case "NOTSET":
            given = tuple(node.attrs.get("pads", (0, 0) * len(sizes)))
            half = len(given) // 2
            pads = (0,) * missing + given[:half] + (0,) * missing + given[half:]
        case "VALID":
            pads = (0, 0, 0, 0)
        case "SAME_UPPER" | "SAME_LOWER" as mode:
            # as many outputs as strides fit
            total = [
                max((-(-size // stride) - 1) * stride + dilation * (taps - 1) + 1 - size, 0)
                for size, stride, dilation, taps in zip(
                    (1,) * missing + tuple(sizes), strides, dilations, (1,) * missing + tuple(kernel), strict=False
                )
            ]
            pads = _same_pads(total, mode)
        case other:
            raise importer.refuse(node, f"auto_pad={other!r} is not one of NOTSET, VALID, SAME_UPPER, SAME_LOWER")
    if (len(strides), len(dilations), len(pads)) != (2, 2, 4):
        raise importer.refuse(
            node, f"strides {strides}, dilations {dilations}, pads {pads} must have 2, 2 and 4 numbers"
        )
    if min(strides) < 1 or min(dilations) < 1 or min(pads) < 0:
        raise importer.refuse(node, f"strides {strides}, dilations {dilations}, pads {pads}: need >= 1, >= 1, >= 0")
    return {"strides": strides, "dilations": dilations, "pads": pads}


def _image(importer: Importer, node: Node, kernel_dimensions: int) -> tuple[str, tuple[int, ...], bool]:
    """The input as [N, C, H, W], its pixels' dimensions, and whether it is one row [N, C, W] of them."""
    view = importer.view(node)
    shape = view.shape
    if len(shape) not in (3, 4) or len(shape) != kernel_dimensions + 2:
        raise importer.refuse(
            node, f"only windows on [N, C, H, W] or [N, C, W] are supported; the input has shape {shape}"
        )
    row = len(shape) == 3
    if row:
        view = View(view.base, (*view.dims[:2], (), view.dims[2]))
    return importer.tensor(node, view), shape[2:], row


def _result(importer: Importer, node: Node, row: bool, kind: str, inputs: Sequence[str], attrs: dict[str, Any]) -> None:
    if not row:
        importer.emit(node, kind, inputs, attrs)
        return
    y = importer.step(node, "image", kind, inputs, attrs)
    importer.define(node, importer.whole(y).without([2]))


def conv(importer: Importer, node: Node) -> None:
    """Padding with zeros by an op of its own in front becomes the convolution's."""
    if (groups := node.attrs.get("group", 1)) < 1:
        raise importer.refuse(node, f"group={groups} must be at least 1")
    out_channels, _, *kernel = importer.known_shape(node.inputs[1])
    x, sizes, row = _image(importer, node, len(kernel))
    if list(node.attrs.get("kernel_shape", kernel)) != kernel:
        raise importer.refuse(node, f"kernel_shape {node.attrs['kernel_shape']} is not that of its weights, {kernel}")
    w = importer.filter(node, 1, row=row)
    bias = [importer.parameter(node, 2, shape=(out_channels,))] if node.has(2) else []
    attrs = _window(importer, node, sizes, kernel) | ({"groups": groups} if groups > 1 else {})
    if x in importer.zero_padded:
        x, before = importer.zero_padded[x]
        attrs["pads"] = tuple(one + two for one, two in zip(attrs["pads"], before, strict=True))
    _result(importer, node, row, "Conv", [x, w, *bias], attrs)


def conv_transpose(importer: Importer, node: Node) -> None:
    """The input gradient of a convolution, as an op of the forward pass; a bias is added."""
    channels, filters, *kernel = importer.known_shape(node.inputs[1])
    x, pixels, row = _image(importer, node, len(kernel))
    missing = (1,) * row
    w = importer.filter(node, 1, row=row)
    shape, taps = importer.shape(x), (*missing, *kernel)
    groups = node.attrs.get("group", 1)
    if shape[1] != channels or groups < 1 or channels % groups:
        raise importer.refuse(node, f"weights {importer.shape(w)} in {groups} groups do not fit the input {shape}")
    attrs = _window(importer, node, pixels, kernel)
    extra = (0,) * row + tuple(node.attrs.get("output_padding", (0,) * len(kernel)))
    # ONNX leaves output_padding below the stride or the dilation
    limits = [max(pair) for pair in zip(attrs["strides"], attrs["dilations"], strict=True)]
    if len(extra) != 2 or any(not 0 <= more < limit for more, limit in zip(extra, limits, strict=True)):
        raise importer.refuse(node, f"output_padding {extra} must be less than the strides {attrs['strides']}")
    spans = [
        (size - 1) * stride + dilation * (tap - 1) + 1 + more
        for size, stride, dilation, tap, more in zip(
            shape[2:], attrs["strides"], attrs["dilations"], taps, extra, strict=True
        )
    ]
    mode, wanted = node.attrs.get("auto_pad", "NOTSET"), node.attrs.get("output_shape")
    if wanted is not None or mode.startswith("SAME"):
        sizes = [1] * row + [int(size) for size in wanted[-len(kernel) :]] if wanted is not None else None
        sizes = sizes or [size * stride for size, stride in zip(shape[2:], attrs["strides"], strict=True)]
        total = [max(span - size, 0) for span, size in zip(spans, sizes, strict=True)]
        attrs["pads"] = _same_pads(total, "SAME_UPPER" if mode == "SAME_UPPER" else "SAME_LOWER")
    else:
        sizes = [span - attrs["pads"][i] - attrs["pads"][i + 2] for i, span in enumerate(spans)]
    if min(sizes) < 1:
        raise importer.refuse(node, f"pads {attrs['pads']} leave nothing of its output")
    attrs |= {"input_shape": (shape[0], filters * groups, *sizes)} | ({"groups": groups} if groups > 1 else {})
    if not node.has(2):
        _result(importer, node, row, "ConvInputGrad", [x, w], attrs)
        return
    bias = importer.parameter(node, 2, shape=(filters * groups,))
    y = importer.step(node, "plain", "ConvInputGrad", [x, w], attrs)
    _result(importer, node, row, "Add", [y, bias], {})


def col2im(importer: Importer, node: Node) -> None:
    """Patches [N, C * taps, positions] added up where they lie in an image: elements in another order, if patches touch
    without overlap; else the input gradient of a convolution whose filters pick one tap each."""
    size, taps = ([int(n) for n in importer.constant_input(node, i, what)] for i, what in ((1, "size"), (2, "block")))
    if len(size) != 2:
        raise importer.refuse(node, f"it makes images of {len(size)} dimensions; supported are two")
    attrs, view = _window(importer, node, size, taps), importer.view(node)
    counts = [
        pooled_size(size[i], taps[i], attrs["strides"][i], attrs["dilations"][i], attrs["pads"][i::2], False)
        for i in (0, 1)
    ]
    images, channels = view.shape[0], view.shape[1] // prod(taps)
    if view.shape != (images, channels * prod(taps), prod(counts)):
        raise importer.refuse(node, f"its input of shape {view.shape} does not fit {counts} patches of {taps} pixels")
    x = importer.whole(importer.tensor(node, view))
    plain = {"strides": tuple(taps), "dilations": (1, 1), "pads": (0, 0, 0, 0)}
    if attrs == plain and size == [n * count for n, count in zip(taps, counts, strict=True)]:
        apart = x.reshaped((images, channels, *taps, *counts))
        assert apart is not None  # a tensor as it is stored can be taken apart
        image = apart.permuted((0, 1, 4, 2, 5, 3)).reshaped((images, channels, *size))
        assert image is not None  # neighbours can always be put together
        importer.define(node, image)
        return
    pictures = x.reshaped((images, channels * prod(taps), *counts))
    assert pictures is not None  # so it is here
    weights = np.tile(np.eye(prod(taps), dtype=np.float32), (channels, 1)).reshape(-1, 1, *taps)
    picks = importer.fresh(f"{node.outputs[0]}.picks")
    importer.graph.add_parameter(picks, Parameter(weights, trainable=False))
    attrs |= {"input_shape": (images, channels, *size)} | ({"groups": channels} if channels > 1 else {})
    importer.emit(node, "ConvInputGrad", [importer.tensor(node, pictures), picks], attrs)


def _pool(importer: Importer, node: Node) -> tuple[str, bool, dict[str, Any]]:
    kernel = tuple(node.attrs["kernel_shape"])
    x, sizes, row = _image(importer, node, len(kernel))
    taps = (1,) * row + kernel
    attrs = {"kernel": taps, **_window(importer, node, sizes, kernel)}
    reach = [dilation * (tap - 1) + 1 for tap, dilation in zip(taps, attrs["dilations"], strict=True)]
    if any(pad >= span for pad, span in zip(attrs["pads"], reach * 2, strict=True)):
        raise importer.refuse(node, f"pads {attrs['pads']} leave windows of {kernel} that hold nothing but padding")
    return x, row, attrs | {"ceil_mode": bool(node.attrs.get("ceil_mode", 0))}


def max_pool(importer: Importer, node: Node) -> None:
    """With the places of the maxima, for a MaxUnpool, if they are read."""
    x, row, attrs = _pool(importer, node)
    y = node.outputs[0]
    if not row:
        argmax = importer.fresh(f"{y}.argmax")
        importer.emit(node, "MaxPool", [x], attrs, outputs=[y, argmax])
        for name in filter(None, node.outputs[1:2]):
            unpool.found(importer, name, x, argmax, attrs)
        return
    importer.require_unused(node, node.outputs[1:2])
    names = [importer.fresh(f"{y}.{label}") for label in ("image", "argmax")]
    importer.define(node, importer.whole(importer.emit(node, "MaxPool", [x], attrs, outputs=names)).without([2]))


def average_pool(importer: Importer, node: Node) -> None:
    """With dilations it is a linear map of rows and of columns, as resizing is."""
    if len(node.attrs["kernel_shape"]) == 3:
        _average_channels(importer, node)
        return
    x, row, attrs = _pool(importer, node)
    attrs["count_include_pad"] = bool(node.attrs.get("count_include_pad", 0))
    if attrs.pop("dilations") == (1, 1):
        _result(importer, node, row, "AveragePool", [x], attrs)
        return
    dilations = (1,) * row + tuple(node.attrs["dilations"])
    maps = [_averages(attrs, axis, size, dilations[axis]) for axis, size in enumerate(importer.shape(x)[2:])]
    y = importer.resampled(node, x, *maps, name=node.outputs[0] if not row else "")
    if row:
        importer.define(node, importer.whole(y).without([2]))


def _average_channels(importer: Importer, node: Node) -> None:
    """A window over the channels of [N, 1, C, H, W], as exporters write local response normalization: a 1x1 convolution
    with a band of equal weights."""
    view, (taps, *rest) = importer.view(node), node.attrs["kernel_shape"]
    stored = importer.shape(view.base)
    plain = {"strides": [1, 1, 1], "pads": [0] * 6, "dilations": [1, 1, 1], "ceil_mode": 0}
    if rest != [1, 1] or view.dims != (importer.whole(view.base).dims[0], (), *importer.whole(view.base).dims[1:]):
        raise importer.refuse(
            node, "windows over three dimensions are not supported, but over channels [N, 1, C, H, W]"
        )
    if any(
        list(value) != plain[key] if key != "ceil_mode" else value for key, value in node.attrs.items() if key in plain
    ):
        raise importer.refuse(node, "of windows over channels only those without strides and pads are supported")
    left = stored[1] - taps + 1
    band = np.zeros((left, stored[1], 1, 1), np.float32)
    for channel in range(left):
        band[channel, channel : channel + taps] = 1 / taps
    y = importer.convolved(node, view.base, band, "averages")
    found = importer.whole(y)
    importer.define(node, View(y, (found.dims[0], (), *found.dims[1:])))


def _averages(attrs: dict[str, Any], axis: int, size: int, dilation: int) -> Taps:
    """The weights of one axis of an average pool."""
    taps, stride, pads = attrs["kernel"][axis], attrs["strides"][axis], (attrs["pads"][axis], attrs["pads"][axis + 2])
    count = pooled_size(size, taps, stride, dilation, pads, attrs["ceil_mode"])
    if dilation == 1:
        divisor = divisors(attrs, axis, size, (0, count))
        rows = [range(i * stride - pads[0], i * stride - pads[0] + taps) for i in range(count)]
        pairs = [[(at, 1 / divisor[i]) for at in row if 0 <= at < size] for i, row in enumerate(rows)]
        return Taps.weighted(size, pairs)
    pairs = []
    for i in range(count):
        reads = [i * stride - pads[0] + tap * dilation for tap in range(taps)]
        inside = [at for at in reads if 0 <= at < size]
        padded = [at for at in reads if at < size + pads[1]]
        pairs.append([(at, 1 / len(padded if attrs["count_include_pad"] else inside)) for at in inside])
    return Taps.weighted(size, pairs)


def global_average_pool(importer: Importer, node: Node) -> None:
    """Over all dimensions behind the channels."""
    reduce("mean")(importer, _over_all(importer, node))


def global_max_pool(importer: Importer, node: Node) -> None:
    """The first of equal maxima, as long as max pooling can tell which it is."""
    shape = importer.known_shape(node.inputs[0])
    if len(shape) != 4 or prod(shape[2:]) > 256:
        reduce("max")(importer, _over_all(importer, node))
        return
    window = {"kernel": shape[2:], "strides": (1, 1), "dilations": (1, 1), "pads": (0, 0, 0, 0), "ceil_mode": False}
    y = node.outputs[0]
    importer.emit(node, "MaxPool", [importer.data(node)], window, outputs=[y, importer.fresh(f"{y}.argmax")])


def _over_all(importer: Importer, node: Node) -> Node:
    """A global pool as a reduction."""
    shape = importer.known_shape(node.inputs[0])
    if len(shape) < 3:
        raise importer.refuse(node, f"its input has shape {shape}; there is nothing behind the channels")
    return replace(node, attrs={"axes": range(2, len(shape))})
