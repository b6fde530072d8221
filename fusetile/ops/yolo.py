"""The loss of YOLOv2: a grid of cells, in each of which every anchor predicts a box (see fusetile/yolo.py).

Boxes [N, M, 5]: class, centre and size, as parts of the image; those of class -1 are none. Responsible for a true box
is, in the cell that holds its centre, the anchor whose shape has the largest IoU with it (of two boxes with the same
cell and anchor the later counts). Over the batch, divided by N, the loss sums up

    coord     (s(tx) - x)^2 + (s(ty) - y)^2 + (tw - log(w / aw))^2 + (th - log(h / ah))^2    where responsible
    object    (s(to) - IoU)^2                                                                where responsible
    noobject  s(to)^2               elsewhere, unless the IoU with some true box is above 0.6
    class     -log softmax(logits)[class]                                                    where responsible

each times its factor. The IoU with the true box is a target: no gradient goes through it.
Sources: Redmon et al., arXiv 1506.02640, equation 3 (the terms); Redmon and Farhadi, arXiv 1612.08242 (anchors); and
the authors' darknet, region_layer.c (0.6, IoU as the target, which anchor is responsible, softmax with logarithms).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusetile.box import Box
from fusetile.errors import UserError
from fusetile.graph import Op, Tensor
from fusetile.ops.base import Access, All, Along, Array, Attrs, Axis, Domain, Row, Spec, register, same_spec
from fusetile.ops.loss import gradient_of_loss, sum64
from fusetile.yolo import LOSS, box_iou, boxes_of, log_softmax, sigmoid

IGNORED_above = 0.6


def classes_of(channels: int, anchors: int) -> int:
    """How many classes the output's channels stand for. Raises UserError if they stand for none."""
    if channels % anchors or channels // anchors <= 5:
        raise UserError(
            f"--loss {LOSS}: {channels} channels are not {anchors} anchors with 5 numbers and at least one class each; "
            "see --anchors"
        )
    return channels // anchors - 5


def _shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
    y, boxes = inputs
    classes_of(y.shape[1], len(attrs["anchors"]) // 2)
    if len(boxes.shape) != 3 or boxes.shape[0] != y.shape[0] or boxes.shape[2] != 5:
        raise UserError(f"boxes {boxes.name!r} of shape {boxes.shape} are not [{y.shape[0]}, boxes per image, 5]")
    return [Spec((1,))]


def _axes(inputs: Sequence[Tensor]) -> tuple[tuple[Axis, ...], tuple[Access, ...]]:
    (n, channels, h, w), boxes = (tensor.shape for tensor in inputs)
    spots = (Along("n", n), All(channels), Along("h", h), Along("w", w))
    truth = (Along("n", n), All(boxes[1]), All(5))
    return tuple(Axis(*axis) for axis in (("n", n), ("h", h), ("w", w))), (spots, truth)


def _domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, reads = _axes(inputs)
    return Domain(tuple(Axis(a.name, a.size, "reduction") for a in axes), reads, ((All(1),),))


def _grad_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes, reads = _axes(inputs)
    return Domain(axes, reads, (reads[0],))


def _flops(attrs: Attrs, inputs: Sequence[Tensor]) -> float:
    """Per cell: every anchor's box with every true one, and functions of every channel."""
    y, boxes = inputs
    return 10.0 * len(attrs["anchors"]) * boxes.shape[1] + 20.0 * y.shape[1]


# -- in numpy ----------------------------------------------------------------------------------------------------------


def shape_iou(a: Array, b: Array) -> Array:
    """The IoU of boxes [..., 2] (width, height) with the same centre."""
    common = np.minimum(a, b).prod(-1)
    return common / (a.prod(-1) + b.prod(-1) - common)


@dataclass(frozen=True, slots=True)
class _Cells:
    """What there is in a box of cells: y [n, A, 5 + C, h, w]; the confidence and the predicted centre (within its cell)
    [n, A, 2, h, w]; which are responsible, and which are for nothing [n, A, h, w]; where responsible, what they should
    be: `box` [n, A, 4, h, w], in the terms of the loss, its IoU and class [n, A, h, w]."""

    y: Array
    centre: Array
    confidence: Array
    responsible: Array
    nothing: Array
    box: Array
    iou: Array
    label: Array


def _cells(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> _Cells:
    y, boxes = inputs
    sizes, (n, _, h, w) = np.array(op.attrs["anchors"], y.dtype).reshape(-1, 2), y.shape
    y = y.reshape(n, len(sizes), -1, h, w)
    grid = np.array([domain.axes[2].size, domain.axes[1].size], y.dtype)  # columns, rows
    (row, _), (column, _) = box[1:]
    first = np.array([column, row])
    true = boxes[:, :, 1:] * np.concatenate([grid, grid])
    exists = boxes[:, :, 0] >= 0
    predicted = boxes_of(y, op.attrs["anchors"], row=row, column=column)
    iou = box_iou(predicted[:, :, None], np.moveaxis(true, 2, 0)[..., None, None, None])  # [n, M, A, h, w]
    best = np.where(exists[..., None, None, None], iou, 0).max(1)
    responsible = np.zeros((n, len(sizes), h, w), bool)
    target, overlap, label = np.zeros((n, len(sizes), 4, h, w), y.dtype), np.zeros_like(best), np.zeros(best.shape, int)
    # a cell is found in float32, whatever the rest is computed in
    cells = (boxes[:, :, 1:3].astype(np.float32) * grid.astype(np.float32)).astype(int)
    cells = np.minimum(cells, grid.astype(int) - 1) - first
    for sample, m in np.argwhere(exists):
        i, j = cells[sample, m]
        if 0 <= i < w and 0 <= j < h:
            size = true[sample, m, 2:]
            at = (sample, int(shape_iou(size, sizes).argmax()))
            responsible[*at, j, i], overlap[*at, j, i] = True, iou[sample, m, at[1], j, i]
            label[*at, j, i] = boxes[sample, m, 0]
            target[*at, :2, j, i] = true[sample, m, :2] - first - np.array([i, j])
            target[*at, 2:, j, i] = np.log(size / sizes[at[1]])
    nothing = ~responsible & (best <= IGNORED_above)
    return _Cells(y, sigmoid(y[:, :, :2]), sigmoid(y[:, :, 4]), responsible, nothing, target, overlap, label)


def _loss(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    cells, (coord, obj, noobject, class_) = _cells(op, domain, box, inputs), op.attrs["factors"]
    off = np.concatenate([cells.centre, cells.y[:, :, 2:4]], 2) - cells.box
    chosen = np.take_along_axis(log_softmax(cells.y[:, :, 5:], 2), cells.label[:, :, None], 2)[:, :, 0]
    found = coord * (off**2).sum(2) + obj * (cells.confidence - cells.iou) ** 2 - class_ * chosen
    each = np.where(cells.responsible, found, cells.nothing * noobject * cells.confidence**2)
    return [sum64(each)[0] / op.attrs["count"]]


def _gradient(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    cells, (coord, obj, noobject, class_) = _cells(op, domain, box, inputs), op.attrs["factors"]
    centre, confidence = cells.centre, cells.confidence
    dy = np.empty_like(cells.y)
    dy[:, :, :2] = 2 * coord * (centre - cells.box[:, :, :2]) * centre * (1 - centre)
    dy[:, :, 2:4] = 2 * coord * (cells.y[:, :, 2:4] - cells.box[:, :, 2:])
    dy[:, :, 4] = 2 * obj * (confidence - cells.iou) * confidence * (1 - confidence)
    classes = np.arange(dy.shape[2] - 5)[:, None, None]
    dy[:, :, 5:] = class_ * (np.exp(log_softmax(cells.y[:, :, 5:], 2)) - (classes == cells.label[:, :, None]))
    dy *= cells.responsible[:, :, None]
    dy[:, :, 4] += 2 * noobject * cells.nothing * confidence**2 * (1 - confidence)
    return [dy.reshape(inputs[0].shape) / op.attrs["count"]]


register(Row("YoloV2", _shape, _domain, _loss, gradient_of_loss, flops=_flops, kernel="yolo"))
register(Row("YoloV2Grad", same_spec, _grad_domain, _gradient, flops=_flops, kernel="yolo_grad"))
