"""Boxes as YOLOv2 predicts them, and how much boxes have in common: what the loss and the metric share.

Output [N, A * (5 + C), H, W]: per anchor tx, ty, tw, th, to and the logits of C classes. In units of cells the box of
anchor (aw, ah) in cell (i, j) has its centre at (i + s(tx), j + s(ty)) and the size (aw exp(tw), ah exp(th)), where s
is the sigmoid; s(to) is its confidence. Source: Redmon and Farhadi, arXiv 1612.08242.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray
LOSS = "yolov2"


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), which overflows nowhere."""
    return np.exp(-np.logaddexp(x.dtype.type(0), -x))


def log_softmax(x: Array, axis: int | tuple[int, ...]) -> Array:
    """The logarithm of exp(x) / sum of exp(x)."""
    shifted = x - x.max(axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))


def box_iou(a: Array, b: Array) -> Array:
    """Intersection over union of boxes [4, ...]: centre and size."""
    low, high = np.maximum(a[:2] - a[2:] / 2, b[:2] - b[2:] / 2), np.minimum(a[:2] + a[2:] / 2, b[:2] + b[2:] / 2)
    common = np.maximum(high - low, 0).prod(0)
    return common / (a[2:].prod(0) + b[2:].prod(0) - common)


def boxes_of(y: Array, anchors: Sequence[float], *, row: int = 0, column: int = 0) -> Array:
    """The boxes [4, n, A, h, w] that a part of an output, [n, A, 5 + C, h, w], predicts, in units of cells. `row` and
    `column`: where the part begins."""
    h, w = y.shape[3:]
    corner = np.stack(np.meshgrid(column + np.arange(w), row + np.arange(h))).astype(y.dtype)
    sizes = np.array(anchors, y.dtype).reshape(-1, 2, 1, 1)
    return np.moveaxis(np.concatenate([sigmoid(y[:, :, :2]) + corner, np.exp(y[:, :, 2:4]) * sizes], 2), 2, 0)
