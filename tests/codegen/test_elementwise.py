"""Elementwise kernels against the rows' references."""

from __future__ import annotations

import numpy as np
import pytest

from tests.codegen.harness import Case, middle, seeded

KINDS = [
    ("Relu", 1, {}),
    ("LeakyRelu", 1, {"alpha": 0.1}),
    ("ReluGrad", 2, {}),
    ("LeakyReluGrad", 2, {"alpha": 0.1}),
    ("Add", 2, {}),
    ("Scale", 1, {"factor": 0.3}),
    ("Identity", 1, {}),
    ("MeanSquaredErrorGrad", 2, {"count": 7}),
]


@pytest.mark.parametrize(("kind", "count", "attrs"), KINDS)
def test_maps_in_part(kind, count, attrs):
    random = seeded()
    case = Case(kind, [random.standard_normal((2, 19, 9, 7), np.float32) for _ in range(count)], attrs)
    case.check(middle(case.domain.box, case.domain, channels=8), rtol=0, atol=0, margin=1, border=(1, 2), pitch=1)
