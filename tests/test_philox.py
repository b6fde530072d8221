"""Philox against Random123's published vectors, and the properties that sharding needs."""

from __future__ import annotations

import numpy as np
import pytest

from fusetile.philox import SHUFFLE, Words, permutation, philox, uniform

# kat_vectors of Random123: philox4x32 10, counter, key, output
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def counter(index: int, high: int, step: int, site: int) -> Words:
    """The counter of one block."""
    return (
        np.array([index], np.uint64),
        np.array([high], np.uint64),
        np.array([step], np.uint64),
        np.array([site], np.uint64),
    )


@pytest.mark.parametrize(("start", "key", "expected"), VECTORS)
def test_published_vectors(start: str, key: str, expected: str) -> None:
    k0, k1 = words(key)
    c0, c1, c2, c3 = words(start)
    assert [int(word[0]) for word in philox(counter(c0, c1, c2, c3), (k0, k1))] == words(expected)


def test_counter_layout_is_index_step_site_and_key_is_seed() -> None:
    index, step, site, seed = 0x5_0000_0007, 11, 3, 0x9_0000_0002
    block = philox(counter(7, 5, step, site), (2, 9))
    drawn = uniform(seed=seed, site=site, step=step, index=np.array([index]))
    assert drawn[0] == np.float32((int(block[0][0]) >> 8) / 2**24)


def test_a_tile_draws_what_the_whole_tensor_draws() -> None:
    index = np.arange(6 * 8).reshape(6, 8)
    whole = uniform(seed=1, site=2, step=3, index=index)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(uniform(seed=1, site=2, step=3, index=index[2:5, 3:]), whole[2:5, 3:])


def test_uniform_is_uniform_and_depends_on_everything() -> None:
    index = np.arange(20_000)
    base = uniform(seed=1, site=0, step=1, index=index)
    assert base.min() >= 0 and base.max() < 1
    assert np.abs(np.histogram(base, bins=10, range=(0, 1))[0] - 2000).max() < 200
    for other in ({"seed": 2}, {"site": 1}, {"step": 2}):
        changed = uniform(**({"seed": 1, "site": 0, "step": 1} | other), index=index)
        assert abs(np.corrcoef(base, changed)[0, 1]) < 0.03


def test_permutation_is_one_and_changes_with_seed_and_epoch() -> None:
    orders = [permutation(seed=seed, epoch=epoch, count=257) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(257))
    assert len({tuple(order) for order in orders}) == 3
    np.testing.assert_array_equal(orders[0], permutation(seed=0, epoch=0, count=257))


def test_permutation_sorts_64_bit_keys() -> None:
    def key(i: int) -> int:
        low, high, _, _ = philox(counter(i, 0, 4, SHUFFLE), (5, 0))
        return int(low[0]) | int(high[0]) << 32

    assert permutation(seed=5, epoch=4, count=50).tolist() == sorted(range(50), key=key)


@pytest.mark.parametrize("count", [0, 1])
def test_permutation_of_few(count: int) -> None:
    assert permutation(seed=0, epoch=0, count=count).tolist() == list(range(count))
