"""float16 on the wire: the stated bound holds, and what is not finite stays so."""

from __future__ import annotations

import numpy as np
import pytest

from fusetile.box import Box, extents
from fusetile.codegen.calls import Ref
from fusetile.codegen.narrow import decode, encode, partials_bytes
from fusetile.program import Buffer
from fusetile.runtime.storage import pack, unpack
from tests.codegen.harness import place, run_calls, seeded
from tests.codegen.test_move import LAYOUTS


def there_and_back(layout: str, values: np.ndarray, start: np.ndarray, *, add: bool, threads: int = 1) -> np.ndarray:
    """`values` of a whole buffer -> its part in another one that held `start`, by way of a message."""
    box, part, block, border = LAYOUTS[layout]
    source = Buffer("source", box, "float32", block, border)
    staging = Buffer("staging", part, "float16", block)
    scale, partials = Buffer("scale", ((0, 1),)), Buffer("partials", ((0, partials_bytes(source, part) // 4),), "int32")
    target = Buffer("target", part, "float32", block)
    buffers, arena = place([source, staging, scale, partials, target])
    pack(arena, buffers[0], box, values)
    pack(arena, buffers[4], part, start)
    calls = [
        *encode(source, staging, part, Ref("partials"), Ref("scale")),
        decode(staging, target, part, Ref("scale"), add=add),
    ]
    run_calls(calls, buffers, arena, threads=threads)
    return unpack(arena, buffers[4], part)


def inner(layout: str, values: np.ndarray) -> np.ndarray:
    box, part, *_ = LAYOUTS[layout]
    return values[tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(part, box, strict=True))]


def numbers(box: Box, exponents: tuple[int, int]) -> np.ndarray:
    """Of all magnitudes between two powers of two."""
    random = seeded()
    low, high = exponents
    return (random.choice([-1, 1], extents(box)) * 2 ** random.uniform(low, high, extents(box))).astype(np.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("exponents", [(-3, 3), (-120, -100), (100, 127), (-60, 10)])
def test_errors_are_within_the_bound(layout: str, exponents: tuple[int, int]) -> None:
    values = numbers(LAYOUTS[layout][0], exponents)
    wanted = inner(layout, values).astype(np.float64)
    found = there_and_back(layout, values, np.zeros(wanted.shape, np.float32), add=False, threads=2)
    bound = 2.0**-11 * np.abs(wanted) + 2.0**-28 * np.abs(wanted).max()
    assert (np.abs(found - wanted) <= bound).all()


def test_rounding_is_that_of_float16_and_sums_are_sums() -> None:
    values = numbers(LAYOUTS["map"][0], (-5, 5))
    wanted = inner("map", values)
    scale = np.float32(2.0 ** (14 - np.floor(np.log2(np.abs(wanted).max()))))
    rounded = (wanted * scale).astype(np.float16).astype(np.float32) / scale
    start = seeded().standard_normal(wanted.shape, np.float32)
    assert np.array_equal(there_and_back("map", values, start, add=False), rounded)
    assert np.array_equal(there_and_back("map", values, start, add=True), start + rounded)


def test_zeros_and_what_is_not_finite() -> None:
    box = LAYOUTS["map"][0]
    zeros = np.zeros(extents(box), np.float32)
    start = np.ones_like(inner("map", zeros))
    assert not there_and_back("map", zeros, start, add=False).any()
    for value in (np.nan, np.inf, -np.inf):
        broken = zeros + np.float32(0.5)
        inner("map", broken)[0, 3, 1, 4] = value
        found = there_and_back("map", broken, start, add=False)
        assert np.array_equal(found, inner("map", broken), equal_nan=True)
