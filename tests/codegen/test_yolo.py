"""The loss of YOLOv2 and its gradient against the row's reference."""

from __future__ import annotations

import numpy as np

from tests.codegen.harness import Case, middle
from tests.yolo import ANCHORS, random_boxes

LAYOUT = {"margin": 1, "border": (1, 2), "pitch": 1}


def test_yolo() -> None:
    """Several boxes in a cell, none in an image, boxes at the far edges; a part of the cells."""
    random = np.random.default_rng(0)
    y = random.standard_normal((3, 3 * 9, 6, 7), np.float32)
    boxes = random_boxes(random, images=3, most=11, classes=4)
    boxes[1, :, 0] = -1
    for kind in ("YoloV2", "YoloV2Grad"):
        case = Case(kind, [y, boxes], {"count": 3, "factors": (5.0, 1.0, 0.5, 2.0), "anchors": ANCHORS})
        case.check(rtol=3e-5, atol=1e-6)
        box = middle(case.domain.box, case.domain)
        case.check(((1, 3), *box[1:]), rtol=3e-5, atol=1e-6, **LAYOUT)
