"""Ops beside convolutions, whose instructions are counted per element."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.emulated.work import Work, work
from fusetile.codegen.targets import Target

SHAPE = (1, 64, 26, 26)
POOL = {"kernel": (2, 2), "strides": (2, 2), "dilations": (1, 1), "pads": (0, 0, 0, 0), "ceil_mode": 0}


@dataclass(frozen=True)
class Other:
    """An op on random data; `elements` is what its instructions are divided by."""

    name: str
    kind: str
    values: tuple[np.ndarray, ...]
    attrs: Mapping[str, Any]
    elements: int
    filters: Sequence[int] = ()

    def work(self, target: Target) -> Work:
        return work(self.kind, self.values, self.attrs, target, filters=self.filters)


def others() -> Iterator[Other]:
    """Batch normalization, pooling and the weight update of a 64-channel layer; products of attention."""
    random = np.random.default_rng(0)
    x, dy = (random.standard_normal(SHAPE, np.float32) for _ in range(2))
    pooled = random.standard_normal((1, 64, 13, 13), np.float32)
    channels = SHAPE[1]
    stats = np.stack([np.zeros(channels), np.ones(channels)]).astype(np.float32)
    gamma, beta = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    moments = random.standard_normal((2, channels))
    leaky = {"activation": "leaky_relu", "alpha": 0.1}
    count = {"count": x.size // channels}
    yield Other("ChannelMoments, of x", "ChannelMoments", (x,), {}, x.size)
    yield Other("Normalize + leaky, of y", "Normalize", (x, stats, gamma, beta), {**count, **leaky}, x.size)
    scale = (stats, gamma)
    yield Other("NormalizeMoments + leaky, of dy", "NormalizeMoments", (dy, x, *scale, beta), leaky, x.size)
    gradient = (dy, x, *scale, moments, beta)
    yield Other("NormalizeInputGrad + leaky, of dx", "NormalizeInputGrad", gradient, {**count, **leaky}, x.size)
    yield Other("MaxPool 2x2, of x", "MaxPool", (x,), POOL, x.size)
    argmax = random.integers(0, 4, pooled.shape).astype(np.uint8)
    yield Other("MaxPoolGrad 2x2, of dx", "MaxPoolGrad", (pooled, argmax), {**POOL, "input_shape": SHAPE}, x.size)
    w, g, v = (random.standard_normal((64, 64, 3, 3), np.float32) for _ in range(3))
    rate = np.array([0.1], np.float32)
    update = {"momentum": 0.9, "weight_decay": 0.01}
    yield Other("SGD with momentum, of w", "SGD", (w, g, rate, v), update, w.size, (0, 1, 3))
    yield from products_of_attention(random)


def products_of_attention(random: np.random.Generator) -> Iterator[Other]:
    """Those of attention, forward: 2 heads of 52 tokens with 32 channels each."""
    heads, weights = (1, 32, 2, 52), (1, 52, 2, 52)
    for name, shapes, terms in (
        ("q k^T", (heads, heads), ("nchk", "nchw")),
        ("w v", (weights, heads), ("nwhc", "nkhc")),
    ):
        values = [random.standard_normal(shape, np.float32) for shape in shapes]
        count = 2 * 52 * 52 * 32 // 4
        yield Other(f"{name}, of 4 multiply-adds", "MatMul", tuple(values), {"terms": terms}, count)
