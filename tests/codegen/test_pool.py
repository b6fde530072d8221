"""Pooling against the rows' references: overlapping windows, ceil mode, ties, asymmetric pads, tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.codegen.harness import Case, middle, seeded

WINDOWS: dict[str, dict[str, Any]] = {
    "2x2": {"kernel": (2, 2), "strides": (2, 2), "dilations": (1, 1), "pads": (0, 0, 0, 0), "ceil_mode": 0},
    "overlap": {"kernel": (3, 3), "strides": (2, 2), "dilations": (1, 1), "pads": (1, 1, 1, 1), "ceil_mode": 1},
    "uneven": {"kernel": (3, 2), "strides": (1, 3), "dilations": (2, 1), "pads": (1, 0, 2, 1), "ceil_mode": 0},
}
LAYOUT = {"margin": 1, "border": (1, 2), "pitch": 1}
SHAPE = (2, 19, 11, 13)


def image(*, ties: bool = False) -> np.ndarray:
    random = seeded()
    return random.integers(-2, 3, SHAPE).astype(np.float32) if ties else random.standard_normal(SHAPE, np.float32)


@pytest.mark.parametrize("window", WINDOWS)
def test_max_pool(window: str) -> None:
    case = Case("MaxPool", [image(ties=True)], WINDOWS[window])
    case.check(rtol=0, atol=0)
    case.check(middle(case.domain.box, case.domain, channels=8), rtol=0, atol=0, **LAYOUT)
    y, argmax = case.expected(case.domain.box)
    dy = seeded(1).standard_normal(y.shape, np.float32)
    back = Case("MaxPoolGrad", [dy, argmax], {**WINDOWS[window], "input_shape": SHAPE})
    back.check(rtol=1e-6, atol=1e-6)
    back.check(middle(back.domain.box, back.domain, channels=8), rtol=1e-6, atol=1e-6, **LAYOUT)
    pick = Case("MaxPoolPick", [image(), argmax], WINDOWS[window])
    pick.check(rtol=0, atol=0)
    pick.check(middle(pick.domain.box, pick.domain, channels=8), rtol=0, atol=0, **LAYOUT)


@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("window", ["2x2", "overlap"])
def test_average_pool(window: str, include: int) -> None:
    attrs = {**WINDOWS[window], "count_include_pad": include}
    del attrs["dilations"]
    case = Case("AveragePool", [image()], attrs)
    case.check(rtol=1e-5, atol=1e-6)
    case.check(middle(case.domain.box, case.domain, channels=8), rtol=1e-5, atol=1e-6, **LAYOUT)
    (y,) = case.expected(case.domain.box)
    back = Case("AveragePoolGrad", [seeded(1).standard_normal(y.shape, np.float32)], {**attrs, "input_shape": SHAPE})
    back.check(rtol=1e-5, atol=1e-6)
    back.check(middle(back.domain.box, back.domain, channels=8), rtol=1e-5, atol=1e-6, **LAYOUT)


def test_pixels_between_windows_get_no_gradient() -> None:
    attrs = {"kernel": (2, 2), "strides": (3, 3), "dilations": (1, 1), "pads": (0, 0, 0, 0), "ceil_mode": 0}
    x = image()
    case = Case("MaxPool", [x], attrs)
    y, argmax = case.check(rtol=0, atol=0)
    back = Case("MaxPoolGrad", [np.ones_like(y), argmax], {**attrs, "input_shape": SHAPE})
    back.check(((0, 2), (0, 19), (2, 3), (0, 13)), rtol=0, atol=0)


def test_pool_of_an_unblocked_input() -> None:
    Case("MaxPool", [image()[:, :3]], WINDOWS["2x2"]).check(rtol=0, atol=0, raw=(0,), margin=1)


def test_a_nan_is_a_maximum() -> None:
    x = image()
    x[0, 3, 4, 5] = np.nan
    Case("MaxPool", [x], WINDOWS["overlap"]).check(rtol=0, atol=0)


def test_global_average_pool() -> None:
    case = Case("GlobalAveragePool", [image()], {})
    case.check(rtol=1e-6, atol=1e-6)
    case.check(middle(case.domain.box, case.domain, channels=8), rtol=1e-6, atol=1e-6, **LAYOUT)
    (y,) = case.expected(case.domain.box)
    back = Case("GlobalAveragePoolGrad", [y], {"input_shape": SHAPE})
    back.check(middle(back.domain.box, back.domain, channels=8), rtol=1e-6, atol=1e-6, **LAYOUT)
