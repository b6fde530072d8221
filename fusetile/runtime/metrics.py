"""What a validation says besides the loss, by the op that compares an output with its target.

Every device counts what it has of a batch (`measure`), the lowest rank puts the counts of all devices together
(`combine`) and makes numbers of them (`finish`), after the last batch: so they are exact over the whole data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusetile.box import Box
from fusetile.errors import ProtocolError
from fusetile.runtime import precision

Array = np.ndarray
TOP = 5
BEST_decibels = 100.0  # of an image that is the target to the last digit


@dataclass(frozen=True, slots=True)
class Compared:
    """A part of an output, and of its target: canonical arrays of the boxes. `samples`: the number in the data of each
    sample in the parts, of `count`. `shape` is that of the whole output of a batch, `attrs` are those of the op."""

    output: Array
    target: Array
    output_box: Box
    target_box: Box
    samples: Array
    count: int
    shape: tuple[int, ...]
    attrs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Metric:
    """`measure` gives an array of counts, `finish` numbers by name; if `loss` is among them, it is the loss. `best`
    names the number that is the larger the better the model is; "" if that is the loss, the smaller the better."""

    measure: Callable[[Compared], Array]
    finish: Callable[[Array], dict[str, float]]
    best: str = ""
    combine: Callable[[Sequence[Array]], Array] = lambda counts: np.sum(counts, axis=0)


def metric_of(kind: str, shape: Sequence[int]) -> Metric | None:
    """For an op that compares, and the shape of its output."""
    return METRICS.get((kind, len(shape))) or METRICS.get((kind, ANY))


# -- classes ---------------------------------------------------------------------------------------------------------


def _counted(part: Compared) -> Array:
    """Which labels count."""
    ignore = part.attrs.get("ignore")
    return np.ones(part.target.shape, bool) if ignore is None else part.target != ignore


def _ranks(part: Compared) -> Array:
    """[labels that count, right ones, among the first five]; the first of several largest outputs is the answer."""
    counted = _counted(part)
    output, label = part.output[counted], part.target[counted, None]
    chosen = np.take_along_axis(output, label, 1)
    before = (output > chosen) | ((output == chosen) & (np.arange(output.shape[1]) < label))
    rank = before.sum(axis=1)
    many = output.shape[1] > TOP
    return np.array([len(rank), (rank == 0).sum(), (rank < TOP).sum() if many else np.nan], float)


def _accuracy(counts: Array) -> dict[str, float]:
    total, first, top = (float(count) for count in counts)
    found = {"accuracy": _ratio(first, total), f"top{TOP}": _ratio(top, total)}
    return {name: value for name, value in found.items() if value == value}


def _confusion(part: Compared) -> Array:
    """[class of the label, class that was answered]: pixels."""
    classes, counted = part.shape[1], _counted(part)
    answers = part.output.argmax(axis=1)[counted]
    pairs = np.bincount(part.target[counted].astype(np.int64) * classes + answers, minlength=classes * classes)
    return pairs.reshape(classes, classes).astype(float)


def _overlap(counts: Array) -> dict[str, float]:
    """The share of right pixels; intersection over union, the mean of the classes that are anywhere."""
    right, union = counts.diagonal(), counts.sum(axis=0) + counts.sum(axis=1) - counts.diagonal()
    there = union > 0
    found = {"accuracy": _ratio(right.sum(), counts.sum()), "mean_iou": np.mean(right[there] / union[there])}
    return {name: float(value) for name, value in found.items()}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


# -- numbers ---------------------------------------------------------------------------------------------------------


def _squares(part: Compared) -> Array:
    """Per sample of the data: [sum of squared errors, elements]."""
    counts = np.zeros((part.count, 2))
    errors = np.square(part.output.astype(float) - part.target).reshape(len(part.output), -1)
    np.add.at(counts[:, 0], part.samples, errors.sum(axis=1))
    np.add.at(counts[:, 1], part.samples, errors.shape[1])
    return counts


def _psnr(counts: Array) -> dict[str, float]:
    """Of images whose values go from 0 to 1: the mean over the images, in decibels."""
    errors = np.maximum(counts[:, 0] / np.maximum(counts[:, 1], 1), 10 ** (-BEST_decibels / 10))
    return {"psnr": float(np.mean(-10 * np.log10(errors)))}


def _signs(part: Compared) -> Array:
    """[right, all]: elements whose probability is on the target's side of a half."""
    return np.array([((part.output > 0) == (part.target > 0.5)).sum(), part.output.size], float)


def _products(part: Compared) -> Array:
    """Per channel of the output: the sums of p * t, p and t."""
    counts = np.zeros((3, part.shape[1]))
    p, t = part.output.astype(float), part.target.astype(float)
    axes = (0, *range(2, p.ndim))
    counts[:, slice(*part.output_box[1])] = [(p * t).sum(axes), p.sum(axes), t.sum(axes)]
    return counts


def _dice(counts: Array) -> dict[str, float]:
    """The loss, as if all of the data were one batch."""
    products, p, t = counts
    return {"loss": float(1 - np.mean((2 * products + 1) / (p + t + 1)))}


# -- boxes -----------------------------------------------------------------------------------------------------------


def _boxes(part: Compared) -> Array:
    """Rows [what, sample, ...]: 0 is a detection, 1 a true box, which the device with the first cell tells."""
    row, column = part.output_box[2][0], part.output_box[3][0]
    grid = part.shape[2], part.shape[3]
    rows = [precision.detections(part.output, part.attrs["anchors"], grid, part.samples, row=row, column=column)]
    if row == column == 0:
        rows.append(precision.true_boxes(part.target, part.samples))
    return np.concatenate([np.insert(kind, 0, what, axis=1) for what, kind in enumerate(rows)])


def _joined(rows: Sequence[Array]) -> Array:
    return np.concatenate([np.empty((0, 1 + precision.FIELDS)), *rows])


def _precision(rows: Array) -> dict[str, float]:
    found, true = (rows[rows[:, 0] == what, 1:] for what in (0, 1))
    return {"map50": precision.mean_average_precision(precision.suppressed(precision.best(found)), true)}


ANY = 0
_CLASSES = Metric(_ranks, _accuracy, "accuracy")
_PIXELS = Metric(_confusion, _overlap, "mean_iou")
_IMAGES = Metric(_squares, _psnr)
METRICS: dict[tuple[str, int], Metric] = {
    ("CrossEntropy", 2): _CLASSES,
    ("CrossEntropy", 4): _PIXELS,
    ("NegativeLogLikelihood", 2): _CLASSES,
    ("NegativeLogLikelihood", 4): _PIXELS,
    ("MeanSquaredError", 4): _IMAGES,
    ("MeanAbsoluteError", 4): _IMAGES,
    ("SmoothL1", 4): _IMAGES,
    ("BinaryCrossEntropy", ANY): Metric(_signs, lambda counts: {"accuracy": _ratio(*map(float, counts))}),
    ("YoloV2", 4): Metric(_boxes, _precision, "map50", _joined),
    ("SumTo", ANY): Metric(_products, _dice),  # of dice: of p = sigmoid(output) and the target
}
"""The op that compares, and the dimensions of the output -> the metric. An op without one has its loss alone."""


def as_bytes(counts: Array) -> tuple[dict[str, Any], memoryview]:
    """Counts on their way: what they are, and their bytes."""
    little = np.ascontiguousarray(counts, "<f8")
    return {"shape": list(little.shape)}, little.reshape(-1).view(np.uint8).data


def from_bytes(description: Mapping[str, Any], view: memoryview) -> Array:
    """The reverse of `as_bytes`."""
    try:
        return np.frombuffer(view, "<f8").reshape(description["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"counts that are none: {description}") from error
