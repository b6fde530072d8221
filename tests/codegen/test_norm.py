"""Normalization and sums per channel."""

from __future__ import annotations

import numpy as np
import pytest

from tests.codegen.harness import Case, middle, seeded
from tests.codegen.test_pool import SHAPE, WINDOWS, image

SHAPES = [(2, 19, 9, 7), (3, 13)]
LAYOUT = {"margin": 1, "border": (1, 2), "pitch": 1}


def maps(shape: tuple[int, ...], count: int) -> list[np.ndarray]:
    random = seeded()
    return [(random.standard_normal(shape) * 2 + 3).astype(np.float32) for _ in range(count)]


def stats(channels: int) -> np.ndarray:
    return np.abs(seeded(1).standard_normal((2, channels), np.float32)) + np.float32(0.5)


def vector(channels: int, seed: int) -> np.ndarray:
    return np.abs(seeded(seed).standard_normal(channels, np.float32)) + np.float32(0.1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["ChannelSum", "ChannelMoments", "NormalizeMoments"])
def test_sums(kind: str, shape: tuple[int, ...]) -> None:
    inputs = {"ChannelSum": maps(shape, 1), "ChannelMoments": maps(shape, 1)}.get(kind) or [
        *maps(shape, 2),
        stats(shape[1]),
    ]
    case = Case(kind, inputs, {})
    case.check(rtol=2e-6, atol=1e-5)
    case.check(middle(case.domain.box, case.domain, channels=8), rtol=2e-6, atol=1e-5, **LAYOUT)


def test_sums_of_many_rows_do_not_depend_on_threads() -> None:
    case = Case("ChannelMoments", maps((2, 8, 70, 90), 1), {})
    case.check(rtol=1e-13, atol=0, threads=(1, 2, 3))


def test_sums_of_an_unblocked_input() -> None:
    Case("ChannelMoments", maps((2, 3, 9, 7), 1), {}).check(rtol=1e-13, atol=0, raw=(0,))


@pytest.mark.parametrize("channels", [19, 8])
def test_statistics(channels: int) -> None:
    sums = np.stack([vector(channels, 1) * 100, vector(channels, 2) * 900 + 1000]).astype(np.float64)
    count = {"count": 100}
    for case in (
        Case("BatchStatistics", [sums], {**count, "epsilon": 1e-5}),
        Case("FrozenStatistics", [vector(channels, 1), vector(channels, 2)], {"epsilon": 1e-3}),
        Case("NormalizeParameterGrad", [sums], {}),
        Case("RunningStatistics", [sums, vector(channels, 1), vector(channels, 2)], {**count, "momentum": 0.9}),
    ):
        case.check(rtol=1e-6, atol=0)
        case.check(((8 if channels > 8 else 0, channels),), rtol=1e-6, atol=0, margin=1)


def test_a_constant_channel_has_no_negative_variance() -> None:
    sums = np.array([[0.3 * 7], [0.3 * 0.3 * 7 * (1 - 1e-15)]])
    (result,) = Case("BatchStatistics", [sums], {"count": 7, "epsilon": 1e-5}).check(rtol=1e-6)
    assert np.isfinite(result).all()


NUMBERS = {"alpha": 0.1, "low": -0.3, "high": 0.6}  # of activations


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["", "relu", "leaky_relu", "clip", "sigmoid"])
def test_normalize(activation: str, shape: tuple[int, ...]) -> None:
    channels = shape[1]
    inputs = [*maps(shape, 1), stats(channels), vector(channels, 2), vector(channels, 3) - 1]
    case = Case("Normalize", inputs, {"count": 9, "activation": activation, **NUMBERS})
    case.check(middle(case.domain.box, case.domain, channels=8), rtol=1e-5, atol=1e-5, **LAYOUT)


@pytest.mark.parametrize("shape", SHAPES)
def test_input_gradients(shape: tuple[int, ...]) -> None:
    channels = shape[1]
    moments = seeded(5).standard_normal((2, channels)) * 50
    dy, x = maps(shape, 2)
    for case in (
        Case("NormalizeInputGrad", [dy, x, stats(channels), vector(channels, 2), moments], {"count": 126}),
        Case("FrozenNormalizeInputGrad", [dy, stats(channels), vector(channels, 2)], {"count": 0}),
    ):
        case.check(middle(case.domain.box, case.domain, channels=8), rtol=1e-5, atol=1e-5, **LAYOUT)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "clip", "mish"])
def test_gradients_behind_an_activation(activation: str, shape: tuple[int, ...]) -> None:
    channels = shape[1]
    (dy, x), moments = maps(shape, 2), seeded(5).standard_normal((2, channels)) * 50
    shift = vector(channels, 3) - 4  # signs of both kinds
    attrs = {"activation": activation, **NUMBERS}
    scale = [stats(channels), vector(channels, 2)]
    sums = Case("NormalizeMoments", [dy, x, *scale, shift], attrs)
    sums.check(middle(sums.domain.box, sums.domain, channels=8), rtol=2e-6, atol=1e-5, **LAYOUT)
    gradient = Case("NormalizeInputGrad", [dy, x, *scale, moments, shift], {"count": 126, **attrs})
    gradient.check(middle(gradient.domain.box, gradient.domain, channels=8), rtol=1e-5, atol=1e-5, **LAYOUT)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("activation", ["", "leaky_relu"])
def test_gradients_behind_a_pool(activation: str, window: str) -> None:
    channels = SHAPE[1]
    y, argmax = (pool := Case("MaxPool", [image()], WINDOWS[window])).expected(pool.domain.box)
    attrs = {**WINDOWS[window], "input_shape": SHAPE, "activation": activation, **NUMBERS}
    moments, shift = seeded(5).standard_normal((2, channels)) * 50, vector(channels, 3) - 1
    given = [seeded(1).standard_normal(y.shape, np.float32), argmax, image(), stats(channels)]
    gamma, *beta = [vector(channels, 2), *([shift] if activation else [])]
    sums = Case("PooledNormalizeMoments", [*given, *([gamma, *beta] if activation else [])], attrs)
    gradient = Case("PooledNormalizeInputGrad", [*given, gamma, moments, *beta], {"count": 126, **attrs})
    for case in (sums, gradient):
        case.check(middle(case.domain.box, case.domain, channels=8), rtol=1e-5, atol=1e-5, **LAYOUT)


@pytest.mark.parametrize(
    ("shape", "per"), [((2, 18, 1, 1), 1), ((2, 18, 1, 1), 3), ((2, 18, 5, 1), 1), ((2, 1, 5, 7), 1)]
)
def test_normalization_of_instances_groups_and_layers(shape: tuple[int, ...], per: int) -> None:
    """`shape` is what is left; scale and bias are of channels or of columns."""
    x, dy = maps((2, 18, 5, 7), 2)
    mean, inverse, slope = (np.abs(array[tuple(slice(0, size) for size in shape)]) + 0.1 for array in (x, dy, x - dy))
    gamma = vector(18, 1) if shape[3] == 1 and shape[2] == 1 else maps((1, 1, 1, 7), 1)[0]
    count = {"count": 35, "per_group": per}
    sums = [35.0 * mean.astype(np.float64), 400.0 * inverse.astype(np.float64) + 9000]
    for case in (
        Case("Moments", [x], {"shape": shape}),
        Case("AffineGrad", [dy, x, mean, inverse], {"shape": gamma.shape}),
        Case("StandardizeMoments", [dy, x, mean, inverse, gamma], {"shape": shape}),
        Case("Statistics", sums, {**count, "epsilon": 1e-3}),
        Case("StandardizeMeans", sums, count),
        Case("Standardize", [x, mean, inverse, gamma, np.ones(1, np.float32)], {}),
        Case("StandardizeGrad", [dy, x, mean, inverse, gamma, slope, mean], {}),
    ):
        case.check(rtol=2e-6, atol=1e-4)
        channels = 8 if case.domain.axes[1].size > 1 else 0
        case.check(middle(case.domain.box, case.domain, channels=channels), rtol=2e-6, atol=1e-4, **LAYOUT)


def test_layers_of_one_pixel() -> None:
    """Nothing is broadcast along rows and columns: the kernel has the most strides."""
    dy, x = maps((2, 18, 1, 1), 2)
    mean, inverse = dy[:, :1] + 0, np.abs(x[:, :1]) + 0.1
    Case("StandardizeMoments", [dy, x, mean, inverse, vector(18, 1)], {"shape": (2, 1, 1, 1)}).check(
        rtol=2e-6, atol=1e-4
    )
