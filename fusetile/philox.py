"""Counter-based random numbers, the same on every device and for every number of devices: Philox4x32-10.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); Random123's test vectors.

Every number is a function of where it is used and of nothing else. One block of four 32-bit words is drawn per element:

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (index & 0xffffffff, index >> 32, step, site)

`index` is the element's position in the whole tensor (row-major, canonical order), so a tile draws what the whole
tensor would; `step` counts training steps from 1 (or epochs from 0, when shuffling); `site` tells apart the places that
draw. A dropout mask takes the first word of the block: u = (word0 >> 8) * 2^-24 in [0, 1), and keeps the element if
u >= ratio. Shuffling takes the first two words as a 64-bit sort key (word0 is the low half), at the site SHUFFLE. What
happens to a sample in an epoch comes from a few blocks at the site AUGMENT, see `runtime.augment`.
"""

from __future__ import annotations

import numpy as np

SHUFFLE = 0xFFFFFFFF  # the site of `permutation`; dropout sites count from 0
AUGMENT = 0xFFFFFFFE

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_ROUNDS = 10
_AT_ONCE = 1 << 14  # keys that are drawn: each takes some 600 bytes meanwhile

Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """The four output words for four counter words: uint64 arrays (of any one shape) that hold 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _32) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def draw(*, seed: int, site: int, step: int, index: np.ndarray) -> Words:
    """The block of every element: `index` holds the elements' positions in the whole tensor, in any shape."""
    index = np.asarray(index).astype(np.uint64)
    high = np.broadcast_to(np.uint64(step), index.shape), np.broadcast_to(np.uint64(site), index.shape)
    return philox((index & _LOW, index >> _32, *high), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))


def uniform(*, seed: int, site: int, step: int, index: np.ndarray) -> np.ndarray:
    """float32 in [0, 1) per element of `index`, from the top 24 bits of the first word of its block."""
    word, _, _, _ = draw(seed=seed, site=site, step=step, index=index)
    return (word >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)


def permutation(*, seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` samples in an epoch: indices, sorted by the samples' 64-bit keys."""
    keys = np.empty(count, np.uint64)
    for start in range(0, count, _AT_ONCE):
        part = slice(start, min(start + _AT_ONCE, count))
        low, high, _, _ = draw(seed=seed, site=SHUFFLE, step=epoch, index=np.arange(part.start, part.stop))
        keys[part] = low | high << _32
    return np.argsort(keys, kind="stable")
