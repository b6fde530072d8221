"""Every family on random shapes, parts and layouts. The kernels are those of the other tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fusetile.box import Box, volume
from tests.codegen.harness import BLOCK, Case, seeded
from tests.codegen.test_pool import WINDOWS

Inputs = list[np.ndarray]
KINDS = (
    *("LeakyRelu", "ReluGrad", "Add", "MaxPool", "MaxPoolGrad", "AveragePool", "AveragePoolGrad", "GlobalAveragePool"),
    *("ChannelSum", "ChannelMoments", "NormalizeMoments", "Normalize", "NormalizeInputGrad", "CrossEntropy"),
    *("CrossEntropyGrad", "MeanSquaredError", "Dropout", "Concat", "Slice", "Reshape"),
)


def made(kind: str, random: np.random.Generator) -> Case:
    """An op of this kind on a small random map."""
    shape = tuple(int(size) for size in random.integers(1, (4, 28, 14, 14)))
    n, c, h, w = shape

    def map_() -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    def vector(*sizes: int) -> np.ndarray:
        return np.abs(random.standard_normal((*sizes, c))) + 0.5

    stats, gamma = vector(2).astype(np.float32), vector().astype(np.float32)
    window: dict[str, Any] = {**WINDOWS[str(random.choice(list(WINDOWS)))], "count_include_pad": 0}
    if kind.startswith(("MaxPool", "AveragePool")):
        shape = (n, c, h + 4, w + 4)  # no smaller than the window
        if kind.startswith("Average"):
            window = {**WINDOWS["overlap"], "count_include_pad": int(random.integers(2))}
        forward = Case(kind.removesuffix("Grad"), [map_()], window)
        if not kind.endswith("Grad"):
            return forward
        y, *argmax = forward.expected(forward.domain.box)
        return Case(kind, [random.standard_normal(y.shape, np.float32), *argmax], {**window, "input_shape": shape})
    labels = random.integers(0, c, (n, h, w)).astype(np.int32)
    cases: dict[str, tuple[Inputs, dict[str, Any]]] = {
        "LeakyRelu": ([map_()], {"alpha": 0.1}),
        "ReluGrad": ([map_(), map_()], {}),
        "Add": ([map_(), map_()], {}),
        "GlobalAveragePool": ([map_()], {}),
        "ChannelSum": ([map_()], {}),
        "ChannelMoments": ([map_()], {}),
        "NormalizeMoments": ([map_(), map_(), stats], {}),
        "Normalize": ([map_(), stats, gamma, gamma], {"count": 9, "activation": "relu"}),
        "NormalizeInputGrad": ([map_(), map_(), stats, gamma, vector(2)], {"count": 9}),
        "CrossEntropy": ([map_(), labels], {"count": 5}),
        "CrossEntropyGrad": ([map_(), labels], {"count": 5}),
        "MeanSquaredError": ([map_(), map_()], {"count": 5}),
        "Dropout": ([map_(), np.array([3], np.int32)], {"ratio": 0.4, "seed": 5, "site": 1}),
        "Concat": ([map_(), map_(), map_()], {"axis": int(random.integers(4))}),
        "Slice": ([map_()], {"axis": 1, "start": c // 3, "stop": c}),
        "Reshape": ([map_()], {"shape": (n, h, w, c)}),
    }
    return Case(kind, *cases[kind])


def part_of(box: Box, case: Case, random: np.random.Generator) -> Box:
    """A random part of the iterations; channels are cut at multiples of the block."""
    part = []
    for axis, (start, stop) in zip(case.domain.axes, box, strict=True):
        step = BLOCK if axis.name == "k" else 1
        cuts = [*range(start, stop, step), stop]
        low, high = sorted(random.choice(len(cuts), 2, replace=False))
        part.append((cuts[low], cuts[high]))
    return tuple(part)


@pytest.mark.parametrize("kind", KINDS)
def test_random_parts(kind: str) -> None:
    for seed in range(4):
        random = seeded(seed)
        case = made(kind, random)
        box = part_of(case.domain.box, case, random)
        assert volume(box)
        border = tuple(int(width) for width in random.integers(0, 3, 2))
        layout = {"margin": int(random.integers(3)), "border": border, "pitch": int(random.integers(3))}
        case.check(box, rtol=2e-5, atol=1e-5, **layout)
