"""Detections, which of them count, and mean average precision: against the definitions, in loops."""

from __future__ import annotations

import numpy as np
import pytest

from fusetile.runtime.precision import (
    average_precision,
    detections,
    mean_average_precision,
    suppressed,
    true_boxes,
)

ANCHORS = (1.0, 2.0, 3.0, 1.5)


def corners_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Of two rows, by their corners."""
    start = np.maximum(a[3:5] - a[5:] / 2, b[3:5] - b[5:] / 2)
    end = np.minimum(a[3:5] + a[5:] / 2, b[3:5] + b[5:] / 2)
    common = max(end[0] - start[0], 0) * max(end[1] - start[1], 0)
    return common / (a[5] * a[6] + b[5] * b[6] - common)


def test_detections_of_an_output() -> None:
    """One by one; and in parts, as devices have them."""
    rng = np.random.default_rng(0)
    output = rng.standard_normal((2, 2 * 8, 3, 4)).astype(np.float32)
    found = detections(output, ANCHORS, (3, 4), np.array([5, 9]), lowest=0.2)
    expected = []
    for n, a, c, j, i in np.ndindex(2, 2, 3, 3, 4):
        x, y, w, h, confidence, *logits = output[n, a * 8 : a * 8 + 8, j, i].astype(float)
        score = 1 / (1 + np.exp(-confidence)) * np.exp(logits[c]) / np.exp(logits).sum()
        box = [(i + 1 / (1 + np.exp(-x))) / 4, (j + 1 / (1 + np.exp(-y))) / 3]
        box += [ANCHORS[2 * a] * np.exp(w) / 4, ANCHORS[2 * a + 1] * np.exp(h) / 3]
        if score >= 0.2:
            expected.append([(5, 9)[n], c, score, *box])
    assert 10 < len(found) < output.size // 8
    np.testing.assert_allclose(found, sorted(expected, key=lambda row: (row[0], -row[2])), rtol=1e-5)
    parts = [
        detections(output[1:, :, 1:], ANCHORS, (3, 4), np.array([9]), row=1, lowest=0.2),
        detections(output[:, :, :1, :3], ANCHORS, (3, 4), np.array([5, 9]), lowest=0.2),
        detections(output[:, :, :1, 3:], ANCHORS, (3, 4), np.array([5, 9]), column=3, lowest=0.2),
        detections(output[:1, :, 1:], ANCHORS, (3, 4), np.array([5]), row=1, lowest=0.2),
    ]
    np.testing.assert_allclose(np.unique(np.concatenate(parts), axis=0), np.unique(found, axis=0), rtol=1e-5)


def random_rows(rng: np.random.Generator, count: int, samples: int = 3, classes: int = 2) -> np.ndarray:
    rows = np.column_stack([rng.integers(0, samples, count), rng.integers(0, classes, count), rng.random((count, 5))])
    rows[:, 5:] = 0.3 + 0.4 * rows[:, 5:]
    return rows


def test_of_boxes_that_overlap_the_best_stays() -> None:
    rows = random_rows(np.random.default_rng(1), 120)
    kept: list[np.ndarray] = []
    for row in sorted(rows, key=lambda row: -row[2]):
        if not any((row[:2] == other[:2]).all() and corners_iou(row, other) > 0.45 for other in kept):
            kept.append(row)
    assert 20 < len(kept) < 100
    np.testing.assert_array_equal(suppressed(rows), kept)
    assert suppressed(rows[:0]).shape == (0, 7)


def test_average_precision_by_hand() -> None:
    """Right, wrong, found before, right: recall 1/3 at precision 1, 2/3 at 1/2, and a box that nobody finds."""
    true = np.array([[0, 0, 1, 0.2, 0.2, 0.2, 0.2], [0, 0, 1, 0.7, 0.7, 0.2, 0.2], [1, 0, 1, 0.5, 0.5, 0.2, 0.2]])
    near, far = [0.21, 0.2, 0.2, 0.2], [0.2, 0.9, 0.1, 0.1]
    found = np.array(
        [[0, 0, 0.6, 0.7, 0.7, 0.25, 0.2], [0, 0, 0.9, *near], [0, 0, 0.7, *near], [1, 0, 0.8, *far]], float
    )
    assert average_precision(found, true) == pytest.approx(1 / 3 * 1 + 1 / 3 * 0.5)
    other = np.array([[0, 3, 1, 0.5, 0.5, 0.1, 0.1]])  # of another class, never found
    assert mean_average_precision(found, np.concatenate([true, other])) == pytest.approx((1 / 3 + 1 / 6) / 2)
    assert average_precision(found[:0], true) == 0
    assert mean_average_precision(found, true[:0]) == 0


def test_a_box_is_right_at_an_iou_of_a_half() -> None:
    true = np.array([[0, 0, 1, 0.5, 0.5, 0.5, 0.5]])
    for height, expected in ((0.25, 1.0), (0.249, 0.0)):
        assert average_precision(np.array([[0, 0, 0.9, 0.5, 0.5, 0.5, height]]), true) == expected


def test_true_boxes() -> None:
    target = np.array([[[1, 0.1, 0.2, 0.3, 0.4], [-1, 0, 0, 0, 0]], [[-1, 0, 0, 0, 0], [0, 0.5, 0.5, 0.1, 0.1]]])
    expected = [[7, 1, 1, 0.1, 0.2, 0.3, 0.4], [8, 0, 1, 0.5, 0.5, 0.1, 0.1]]
    np.testing.assert_allclose(true_boxes(target, np.array([7, 8])), expected)
    perfect = true_boxes(target, np.array([7, 8]))
    assert mean_average_precision(perfect, perfect) == 1
