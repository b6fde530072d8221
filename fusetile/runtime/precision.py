"""How well a detector detects: mean average precision at an IoU of 0.5.

Per class, detections of all images in the order of their scores: right is one whose best box among the true ones of its
image has an IoU of at least 0.5 with it and has not been found before. Average precision is the area under precision
over recall, where precision is the best at that recall or above: all points of the curve count, as in Pascal VOC from
2010 on (Everingham et al., The PASCAL Visual Object Classes Challenge: A Retrospective, 2015). The mean is over the
classes that are anywhere.

Both kinds of boxes are rows [sample, class, score, centre x, centre y, width, height], as parts of the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusetile.yolo import box_iou, boxes_of, log_softmax, sigmoid

Array = np.ndarray
FIELDS = 7
LOWEST_score = 0.005  # a detection below it is none; darknet's, where it measures precision
MOST = 500  # detections of an image: the best, before those that overlap are left out
SAME_iou = 0.45  # a detection that overlaps more with a better one of its class is none; darknet's
RIGHT_iou = 0.5


def detections(
    output: Array,
    anchors: Sequence[float],
    grid: tuple[int, int],
    samples: Array,
    *,
    row: int = 0,
    column: int = 0,
    lowest: float = LOWEST_score,
) -> Array:
    """What a part [n, A * (5 + C), h, w] of YOLOv2's output says, before `suppressed`: the best of each image. `grid`:
    rows and columns of the whole, `row` and `column`: where the part begins; `samples` are the numbers of its samples.
    A score is the confidence times the probability of the class."""
    n, _, h, w = output.shape
    y = output.reshape(n, len(anchors) // 2, -1, h, w)
    scores = sigmoid(y[:, :, 4:5]) * np.exp(log_softmax(y[:, :, 5:], 2))
    at = np.argwhere(scores >= lowest)
    sample, anchor, label, j, i = at.T
    boxes = boxes_of(y, anchors, row=row, column=column)[:, sample, anchor, j, i]
    parts = boxes / np.array([grid[1], grid[0]] * 2).reshape(4, 1)
    return best(np.column_stack([samples[sample], label, scores[tuple(at.T)], *parts]).astype(float))


def best(found: Array) -> Array:
    """The `MOST` best of every image, which are among those of its parts; in an order that depends on nothing else."""
    _, label, score, *box = found.T
    found = found[np.lexsort((*box, label, -score, found[:, 0]))]
    _, first, count = np.unique(found[:, 0], return_index=True, return_counts=True)
    return found[np.arange(len(found)) - np.repeat(first, count) < MOST]


def true_boxes(target: Array, samples: Array) -> Array:
    """The boxes [n, most, 5] of samples with these numbers; their score is 1."""
    sample, m = np.nonzero(target[:, :, 0] >= 0)
    boxes = target[sample, m]
    return np.column_stack([samples[sample], boxes[:, 0], np.ones(len(sample)), boxes[:, 1:]]).astype(float)


def suppressed(found: Array) -> Array:
    """Of detections of the same class in the same image that overlap, the best; by score, the best first."""
    found = found[np.argsort(-found[:, 2], kind="stable")]
    kept = np.ones(len(found), bool)
    for group in _groups(found):
        left = group
        while len(left):
            first, left = left[0], left[1:]
            over = box_iou(found[first, 3:, None], found[left, 3:].T) > SAME_iou
            kept[left[over]] = False
            left = left[~over]
    return found[kept]


def mean_average_precision(found: Array, true: Array) -> float:
    """`found` in any order, suppressed already."""
    classes = np.unique(true[:, 1])
    parts = [average_precision(found[found[:, 1] == label], true[true[:, 1] == label]) for label in classes]
    return float(np.mean(parts)) if parts else 0.0


def average_precision(found: Array, true: Array) -> float:
    """Of one class."""
    found = found[np.argsort(-found[:, 2], kind="stable")]
    right, taken = np.zeros(len(found), bool), np.zeros(len(true), bool)
    for i, row in enumerate(found):
        (there,) = np.nonzero(true[:, 0] == row[0])
        if len(there):
            iou = box_iou(row[3:, None], true[there, 3:].T)
            nearest = there[iou.argmax()]
            right[i] = iou.max() >= RIGHT_iou and not taken[nearest]
            taken[nearest] |= right[i]
    recall = np.cumsum(right) / len(true)
    precision = np.cumsum(right) / np.arange(1, len(found) + 1)
    from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * from_here))


def _groups(found: Array) -> list[Array]:
    """Rows of the same sample and class, in order."""
    if not len(found):
        return []
    _, group = np.unique(found[:, :2], axis=0, return_inverse=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
