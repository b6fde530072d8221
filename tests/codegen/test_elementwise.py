"""Elementwise kernels against the rows' references."""

from __future__ import annotations

import numpy as np
import pytest

from fusetile.ops import ROWS
from fusetile.ops.functions import FUNCTIONS
from tests.codegen.harness import Case, middle, seeded
from tests.ops.cases import FUNCTION_ATTRS, POSITIVE

LAYOUT = {"margin": 1, "border": (1, 2), "pitch": 1}

KINDS = [
    ("Relu", 1, {}),
    ("LeakyRelu", 1, {"alpha": 0.1}),
    ("ReluGrad", 2, {}),
    ("LeakyReluGrad", 2, {"alpha": 0.1}),
    ("Add", 2, {}),
    ("Scale", 1, {"factor": 0.3}),
    *((kind, 2, {}) for kind in ("IsGreater", "IsAtLeast", "Masked", "MaskedOut")),
    ("Identity", 1, {}),
    ("MeanSquaredErrorGrad", 2, {"count": 7}),
]


@pytest.mark.parametrize(("kind", "count", "attrs"), KINDS)
def test_maps_in_part(kind, count, attrs):
    random = seeded()
    case = Case(kind, [random.standard_normal((2, 19, 9, 7), np.float32) for _ in range(count)], attrs)
    case.check(middle(case.domain.box, case.domain, channels=8), rtol=0, atol=0, margin=1, border=(1, 2), pitch=1)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_and_their_gradients(kind):
    """Of 19 channels: the lanes of the last block stay zero, also where f(0) is not."""
    random, attrs = seeded(), FUNCTION_ATTRS.get(kind, {})
    x = 3 * random.standard_normal((2, 19, 9, 7), np.float32)
    x = np.abs(x) + 0.1 if kind in POSITIVE else x
    operands = 1 + sum(name in ROWS[f"{kind}Grad"].expression for name in ("x1", "x2"))
    for case in (Case(kind, [x], attrs), Case(f"{kind}Grad", [x] * operands, attrs)):
        case.check(middle(case.domain.box, case.domain, channels=8), **LAYOUT)


@pytest.mark.parametrize("kind", ["Exp", "Sigmoid", "Tanh", "Softplus", "Erf", "Gelu", "Mish"])
def test_functions_far_out(kind):
    """Large, tiny and infinite arguments; a NaN stays one."""
    ends = np.array([0, 1e-30, 1e-6, 0.1, 5, 8, 15, 20, 80, 87.5, 88.7, 90, 1e4, 3e38, np.inf], np.float32)
    x = np.concatenate([ends, -ends[:-1], [np.nan]] if kind in ("Gelu", "Mish") else [ends, -ends, [np.nan]])
    x = np.broadcast_to(x.astype(np.float32), (1, 3, 1, x.size))
    finite = x if kind not in ("Gelu", "Mish") else np.where(np.isinf(x), np.float32(3e38), x)
    Case(kind, [finite], {}).check(rtol=2e-6, atol=1e-6 if kind == "Gelu" else 1e-9)  # 1 + erf(x) cancels


def test_logarithms_far_out():
    ends = np.array([1e-45, 1e-40, 1.2e-38, 1e-30, 0.5, 0.70710677, 0.7071068, 0.99999, 1, 1.0001, 2, 1e30, 3.4e38])
    x = np.concatenate([ends, [0, np.inf, np.nan, -1, -np.inf]]).astype(np.float32)
    Case("Log", [np.broadcast_to(x, (1, 3, 1, x.size))], {}).check(rtol=3e-7, atol=1e-12)


MAP = (2, 19, 5, 6)
FIT = (MAP, (2, 19, 1, 1), (1, 19, 1, 1), (19,), (1,), (2, 1, 5, 6), (1, 1, 1, 1))


def positive(random, shape):
    return np.abs(random.standard_normal(shape, np.float32)) + np.float32(0.5)


@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div", "Max", "Min", "PRelu", "Exceeds", "Reaches"])
def test_arithmetic_with_broadcasting(kind):
    random = seeded()
    pairs = [(MAP, other) for other in FIT] + [((19,), MAP), ((2, 19, 1, 1), (2, 1, 5, 6)), ((4, 11), (11,))]
    for pair in pairs:
        case = Case(kind, [positive(random, shape) for shape in pair], {})
        case.check(**LAYOUT)
        case.check(middle(case.domain.box, case.domain, channels=8), **LAYOUT)


@pytest.mark.parametrize("shape", FIT[1:])
def test_sums_over_what_another_tensor_lacks(shape):
    random = seeded()
    for operands in ((MAP,), (MAP, MAP), (MAP, (19,)), (MAP, (2, 1, 5, 6))):
        case = Case("SumTo", [positive(random, operand) for operand in operands], {"shape": shape})
        case.check(rtol=2e-5, **LAYOUT)
        case.check(middle(case.domain.box, case.domain, channels=8), rtol=2e-5, **LAYOUT)
    Case("SumTo", [positive(random, (4, 11))], {"shape": (1,) if shape == (1,) else (11,)}).check()


@pytest.mark.parametrize("shape", [(2, 19, 1, 1), (2, 1, 5, 6), (2, 19, 5, 1), (2, 1, 1, 1)])
def test_maxima_over_what_another_tensor_lacks(shape):
    """Of negative numbers: the zeros in pad lanes do not count. A NaN is greater than all."""
    x = -positive(seeded(), MAP)
    x[0, 5, 1, 2] = np.nan
    case = Case("MaxTo", [x], {"shape": shape})
    case.check(rtol=0, atol=0, **LAYOUT)
    case.check(middle(case.domain.box, case.domain, channels=8), rtol=0, atol=0, **LAYOUT)


@pytest.mark.parametrize("shape", FIT[1:])
def test_broadcast_copies(shape):
    Case("Expand", [positive(seeded(), shape)], {"shape": MAP}).check(rtol=0, atol=0, **LAYOUT)


def test_three_operands():
    random = seeded()
    maps = [random.standard_normal(MAP, np.float32) for _ in range(2)]
    for slope in ((19,), (1,), MAP):
        Case("PReluGrad", [*maps, positive(random, slope)], {}).check(rtol=0, atol=0, **LAYOUT)


def test_inputs_with_few_channels_and_a_number_added():
    random = seeded()
    x = positive(random, (2, 3, 5, 6))
    Case("Shift", [x], {"offset": 2.0}).check(raw=(0,))
    Case("Mul", [x, positive(random, (3,))], {}).check(raw=(0,))
    Case("Sigmoid", [x], {}).check(raw=(0,))
