"""Convolutions in groups and depthwise ones, and their gradients, against the rows' references."""

from __future__ import annotations

from math import gcd, lcm
from typing import Any

import numpy as np
import pytest

from fusetile.box import Box
from fusetile.codegen.depthwise import UNROLLED
from tests.codegen.harness import BLOCK, Case, seeded

# x, output channels, kernel, groups, strides, dilations, pads
PROBLEMS: dict[str, tuple[Any, ...]] = {
    "depthwise": ((2, 19, 9, 11), 19, (3, 3), 19, (1, 1), (1, 1), (1, 1, 1, 1)),
    "depthwise, strided": ((1, 16, 9, 10), 16, (3, 3), 16, (2, 2), (1, 1), (1, 1, 1, 1)),
    "depthwise, dilated": ((1, 9, 11, 12), 9, (3, 2), 9, (2, 3), (2, 3), (2, 0, 1, 3)),
    "depthwise, large window": ((1, 8, 12, 9), 8, (8, 7), 8, (1, 1), (1, 1), (4, 3, 3, 3)),
    "two outputs per channel": ((2, 11, 7, 6), 22, (3, 3), 11, (1, 1), (1, 1), (1, 1, 1, 1)),
    "depthwise, few channels": ((2, 3, 7, 6), 3, (3, 3), 3, (1, 1), (1, 1), (1, 1, 1, 1)),
    "groups of 4": ((2, 24, 7, 6), 24, (3, 3), 6, (2, 1), (1, 1), (1, 1, 1, 1)),
    "groups of 6 and 4": ((1, 18, 6, 5), 12, (2, 3), 3, (1, 1), (1, 2), (1, 2, 0, 2)),
    "groups of whole blocks": ((1, 32, 6, 5), 16, (3, 3), 2, (1, 1), (1, 1), (1, 1, 1, 1)),
    "groups of 1 pixel": ((3, 12, 1, 1), 20, (1, 1), 4, (1, 1), (1, 1), (0, 0, 0, 0)),
}


def part(case: Case) -> Box:
    """Without the first channels, as far as they may be cut, and without the first row and the last column."""
    box = []
    for axis in case.domain.axes:
        per, times = axis.group
        step = per * lcm(BLOCK // gcd(BLOCK, per), BLOCK // gcd(BLOCK, times))
        first = {"k": step if axis.size > step else 0, "h": min(1, axis.size - 1)}.get(axis.name, 0)
        box.append((first, axis.size - (axis.name == "w" and axis.size > 1)))
    return tuple(box)


@pytest.mark.parametrize("name", PROBLEMS)
def test_against_references(name: str) -> None:
    x, channels, kernel, groups, strides, dilations, pads = PROBLEMS[name]
    random = seeded()
    window = {"strides": strides, "dilations": dilations, "pads": pads, "groups": groups}
    w = random.standard_normal((channels, x[1] // groups, *kernel), np.float32)
    x_NCHW, bias = random.standard_normal(x, np.float32), random.standard_normal(channels, np.float32)
    forward = Case("Conv", [x_NCHW, w, bias], {**window, "activation": "relu"}, filters=(1,))
    dy = random.standard_normal(forward.graph.tensors[forward.op.outputs[0]].shape).astype(np.float32)
    cases = [
        forward,
        Case("Conv", [x_NCHW, w], window, filters=(1,)),
        Case("ConvInputGrad", [dy, w], {**window, "input_shape": x}, filters=(1,)),
        Case("ConvWeightGrad", [x_NCHW, dy], {**window, "kernel_shape": kernel}),
    ]
    for case in cases:
        for box in (case.domain.box, part(case)):
            for layout in ({"border": (6, 6)}, {"border": (7, 8), "margin": 1, "pitch": 2}):
                case.check(box, rtol=1e-4, atol=1e-4, **layout)


def test_few_input_channels_that_are_stored_without_a_block() -> None:
    random = seeded()
    x, w = random.standard_normal((2, 3, 6, 5), np.float32), random.standard_normal((6, 1, 3, 3), np.float32)
    window = {"strides": (1, 1), "dilations": (1, 1), "pads": (1, 1, 1, 1), "groups": 3}
    for weights in (w, w[:3]):
        Case("Conv", [x, weights], window, filters=(1,)).check(rtol=1e-4, raw=(0,), border=(1, 1))
        dy = random.standard_normal((2, len(weights), 6, 5), np.float32)
        Case("ConvWeightGrad", [x, dy], {**window, "kernel_shape": (3, 3)}).check(
            rtol=1e-4, atol=1e-4, raw=(0,), border=(1, 1)
        )


def test_one_of_the_windows_above_is_a_loop() -> None:
    assert max(np.prod(problem[2]) for problem in PROBLEMS.values()) > UNROLLED
