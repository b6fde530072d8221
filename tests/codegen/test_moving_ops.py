"""Concat, Slice, Reshape and Dropout against the rows' references."""

from __future__ import annotations

import numpy as np
import pytest

from tests.codegen.harness import Case, middle, seeded

LAYOUT = {"margin": 1, "border": (1, 2), "pitch": 1}
STEP = np.array([7], np.int32)


def tensor(*shape: int, seed: int = 0) -> np.ndarray:
    return seeded(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("channels", [(8, 16, 5), (3, 10, 4, 20)])
def test_concat_and_slice_of_channels(channels: tuple[int, ...]) -> None:
    parts = [tensor(2, count, 5, 7, seed=i) for i, count in enumerate(channels)]
    case = Case("Concat", parts, {"axis": 1})
    case.check(rtol=0, atol=0)
    case.check(((0, 2), (8, sum(channels)), (1, 4), (2, 7)), rtol=0, atol=0, **LAYOUT)
    case.check(((0, 2), (0, 16), (1, 4), (2, 7)), rtol=0, atol=0, **LAYOUT)
    start = sum(channels[:-1])
    back = Case("Slice", case.expected(case.domain.box), {"axis": 1, "start": start, "stop": sum(channels)})
    back.check(rtol=0, atol=0, **LAYOUT)
    back = Case("Slice", case.expected(case.domain.box), {"axis": 1, "start": 0, "stop": channels[0]})
    back.check(middle(back.domain.box, back.domain), rtol=0, atol=0, **LAYOUT)


@pytest.mark.parametrize("axis", [0, 2, 3])
def test_concat_along_other_axes(axis: int) -> None:
    case = Case("Concat", [tensor(2, 11, 5, 7), tensor(2, 11, 5, 7, seed=1)], {"axis": axis})
    case.check(middle(case.domain.box, case.domain), rtol=0, atol=0, **LAYOUT)


def test_slice_of_flat_tensors() -> None:
    case = Case("Slice", [tensor(3, 29)], {"axis": 1, "start": 5, "stop": 18})
    case.check(rtol=0, atol=0, margin=1)


@pytest.mark.parametrize("raw", [(), (0,)])
@pytest.mark.parametrize(
    ("before", "after"),
    [((3, 5, 4, 3), (3, 60)), ((3, 60), (3, 5, 4, 3)), ((3, 5, 4, 3), (3, 10, 2, 3)), ((3, 11, 1, 1), (3, 11))],
)
def test_reshape(before: tuple[int, ...], after: tuple[int, ...], raw: tuple[int, ...]) -> None:
    case = Case("Reshape", [tensor(*before)], {"shape": after})
    case.check(((1, 3), *case.domain.box[1:]), rtol=0, atol=0, raw=raw if before[1] < 8 else (), **LAYOUT)


@pytest.mark.parametrize("shape", [(3, 19, 5, 6), (4, 27)])
def test_dropout(shape: tuple[int, ...]) -> None:
    attrs = {"ratio": 0.3, "seed": 0x9ABCDEF0FEDCBA98, "site": 3}
    case = Case("Dropout", [tensor(*shape), STEP], attrs)
    case.check(rtol=1e-7, atol=0)
    box = middle(case.domain.box, case.domain, channels=8)
    (y,) = case.check(((1, shape[0]), *box[1:]), rtol=1e-7, atol=0, **LAYOUT)
    assert 0.5 < np.count_nonzero(y) / y.size < 0.9
