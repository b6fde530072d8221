"""Random small networks: all layer kinds, odd sizes, strides, dilations, asymmetric pads, branches that meet."""

from __future__ import annotations

import numpy as np

from fusetile.graph import Graph
from tests.graphs import Net


def random_graph(seed: int, batch: int | None = None) -> Graph:
    """Four to nine layers; the same seed gives the same network."""
    rng = np.random.default_rng([seed, 99])
    shape = (batch or int(rng.integers(1, 5)), int(rng.integers(1, 4)), *(int(size) for size in rng.integers(7, 16, 2)))
    net = Net(shape, seed)
    x = net.conv(net.x, int(rng.integers(3, 20)), pad=_pads(rng, 3), bias=bool(rng.integers(2)))
    seen = [x]
    for _ in range(rng.integers(3, 9)):
        x = _layer(net, rng, x, seen)
        seen.append(x)
    if rng.integers(2):
        x = net.global_pool(x) if rng.integers(2) else x
        return net.done(net.gemm(net.flatten(x), int(rng.integers(2, 12)), bias=bool(rng.integers(2))))
    return net.done(net.conv(x, 3, window=1))


def _pads(rng: np.random.Generator, window: int) -> tuple[int, int, int, int]:
    top, left, bottom, right = (int(pad) for pad in rng.integers(0, window // 2 + 1, 4))
    return (top, left, bottom, right)


def _layer(net: Net, rng: np.random.Generator, x: str, seen: list[str]) -> str:
    shapes = {name: net.graph.tensors[name].shape for name in seen}
    _, channels, *sizes = shapes[x]
    like = [name for name in seen if shapes[name] == shapes[x]]
    aligned = [name for name in seen if (shapes[name][0], *shapes[name][2:]) == (shapes[x][0], *sizes)]
    small = min(sizes) < 5
    match rng.choice(["conv", "conv", "act", "max", "average", "norm", "add", "concat", "dropout", "identity"]):
        case "conv":
            window, stride, dilation = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(1, 3))
            if small:
                window, stride, dilation = 1, 1, 1
            return net.conv(
                x, int(rng.integers(1, 21)), window, stride, _pads(rng, window), dilation, bool(rng.integers(2))
            )
        case "act":
            return net.relu(x) if rng.integers(2) else net.leaky(x, alpha=float(rng.choice([0.1, 0.0, -0.3])))
        case "max" if not small:
            return net.max_pool(
                x,
                int(rng.integers(2, 4)),
                int(rng.integers(1, 4)),
                _pads(rng, 2),
                bool(rng.integers(2)),
                int(rng.integers(1, 3)),
            )
        case "average" if not small:
            return net.average_pool(
                x,
                int(rng.integers(2, 4)),
                int(rng.integers(1, 4)),
                _pads(rng, 2),
                bool(rng.integers(2)),
                bool(rng.integers(2)),
            )
        case "norm":
            return net.batch_norm(x, frozen=bool(rng.integers(2)))
        case "add":
            return net.add(x, str(rng.choice(like)))
        case "concat" if channels < 30:
            return net.concat(x, str(rng.choice(aligned)))
        case "dropout":
            return net.dropout(x)
        case "identity":
            return net._op("Identity", x)
    return net.relu(x)
