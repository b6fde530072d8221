"""Losses and their gradients against the rows' references."""

from __future__ import annotations

import numpy as np
import pytest

from fusetile.ops.loss import PAIRS
from tests.codegen.harness import Case, middle, seeded

LAYOUT = {"margin": 1, "border": (1, 2), "pitch": 1}


@pytest.mark.parametrize("shape", [(5, 11), (2, 19, 6, 5)])
def test_cross_entropy(shape: tuple[int, ...]) -> None:
    random = seeded()
    logits = (random.standard_normal(shape) * 30).astype(np.float32)
    labels = random.integers(0, shape[1], (shape[0], *shape[2:])).astype(np.int32)
    for kind in ("CrossEntropy", "CrossEntropyGrad"):
        case = Case(kind, [logits, labels], {"count": 40})
        case.check(rtol=3e-5, atol=1e-7)
        box = middle(case.domain.box, case.domain)
        case.check(((1, shape[0]), *box[1:]), rtol=3e-5, atol=1e-7, **LAYOUT)


def test_all_classes_equally_likely() -> None:
    logits = np.full((4, 10), 1e4, np.float32)
    (loss,) = Case("CrossEntropy", [logits, np.zeros(4, np.int32)], {"count": 4}).check()
    assert loss == pytest.approx(np.log(10))


@pytest.mark.parametrize("shape", [(5, 11), (2, 19, 6, 5)])
@pytest.mark.parametrize("kind", ["CrossEntropy", "NegativeLogLikelihood"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weights_ignored_labels_and_smoothing(kind: str, smoothing: float, shape: tuple[int, ...]) -> None:
    random = seeded()
    logits = random.standard_normal(shape, np.float32)
    labels = random.integers(0, shape[1], (shape[0], *shape[2:])).astype(np.int32)
    labels[1] = 255
    weights, total = random.random(shape[1], np.float32), np.array([7.5], np.float32)
    if smoothing and kind != "CrossEntropy":
        return
    attrs = {"count": 40, "smoothing": smoothing, "ignore": 255}
    for suffix in ("", "Grad"):
        case = Case(f"{kind}{suffix}", [logits, labels, weights, total], attrs)
        box = middle(case.domain.box, case.domain)
        case.check(((1, shape[0]), *box[1:]), rtol=3e-5, atol=1e-7, **LAYOUT)
        Case(f"{kind}{suffix}", [logits, labels], attrs).check(rtol=3e-5, atol=1e-7)
    case = Case("LabelWeight", [labels, weights], {"ignore": 255})
    case.check(((1, shape[0]), *middle(case.domain.box, case.domain)[1:]), rtol=1e-6)


def test_nothing_but_ignored_labels() -> None:
    """The total is zero, and so are the loss and its gradient."""
    logits, nothing = np.ones((4, 10), np.float32), np.zeros(1, np.float32)
    labels = np.full(4, -100, np.int32)
    for kind in ("CrossEntropy", "CrossEntropyGrad", "NegativeLogLikelihood", "NegativeLogLikelihoodGrad"):
        (found,) = Case(kind, [logits, labels, logits[0], nothing], {"count": 4, "ignore": -100}).check()
        assert not found.any()


@pytest.mark.parametrize("raw", [(), (1,)])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 6, 5), (2, 3, 70, 50)])
@pytest.mark.parametrize("loss", PAIRS)
def test_losses_of_pairs(loss: str, shape: tuple[int, ...], raw: tuple[int, ...]) -> None:
    y, target = (seeded(i).standard_normal(shape, np.float32) for i in range(2))
    for kind in (loss, f"{loss}Grad"):
        case = Case(kind, [y, target], {"count": 40})
        box = middle(case.domain.box, case.domain)
        case.check(((1, shape[0]), *box[1:]), rtol=1e-6, atol=1e-7, raw=raw, **LAYOUT)
