"""Small networks, built directly as graphs, for tests of passes, plans and kernels."""

from __future__ import annotations

import numpy as np

from fusetile.graph import UPDATE, Graph, Parameter
from fusetile.ops.resample import Taps, resample


class Net:
    """A graph in the making: each method appends a layer and returns the name of its output."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.graph = Graph("test")
        self.rng = np.random.default_rng(seed)
        self.x = self.graph.add_tensor("x", shape)
        self.graph.inputs = ["x"]
        self.count = 0

    def parameter(
        self, stem: str, shape: tuple[int, ...], scale: float, offset: float = 0.0, trainable: bool = True
    ) -> str:
        value = (self.rng.standard_normal(shape) * scale + offset).astype(np.float32)
        return self.graph.add_parameter(f"{stem}{self.count}", Parameter(value, trainable, f"{stem}{self.count}"))

    def _op(self, kind: str, *inputs: str, **attrs: object) -> str:
        self.count += 1
        return self.graph.add(kind, inputs, attrs=attrs, stem=f"{kind.lower()}{self.count}", origin=f"{kind} node")[0]

    def conv(self, x: str, k: int, window=3, stride=1, pad=None, dilation=1, bias=False, groups=1) -> str:
        r, s = window if isinstance(window, tuple) else (window, window)
        pads = pad if isinstance(pad, tuple) else (r // 2 if pad is None else pad,) * 4
        c = self.graph.tensors[x].shape[1] // groups
        inputs = [x, self.parameter("w", (k, c, r, s), (2 / (c * r * s)) ** 0.5)]
        inputs += [self.parameter("b", (k,), 0.1)] if bias else []
        window = {"strides": (stride, stride), "dilations": (dilation, dilation), "pads": pads}
        return self._op("Conv", *inputs, **window, **({"groups": groups} if groups > 1 else {}))

    def gemm(self, x: str, k: int, bias=True) -> str:
        c = self.graph.tensors[x].shape[1]
        inputs = [x, self.parameter("w", (k, c), c**-0.5)] + ([self.parameter("b", (k,), 0.1)] if bias else [])
        return self._op("Gemm", *inputs)

    def resized(self, x: str, height: int, width: int) -> str:
        """Twice as large, every new row and column between two old ones."""
        sizes = self.graph.tensors[x].shape[2:]
        maps = [
            Taps.weighted(size, [[(i // 2, 0.75), (min(i // 2 + 1, size - 1), 0.25)] for i in range(wanted)])
            for size, wanted in zip(sizes, (height, width), strict=True)
        ]
        return resample(self.graph, x, *maps, stem=f"{x}.resized", origin="Resize node")

    def shuffled(self, x: str, groups: int) -> str:
        n, c, h, w = self.graph.tensors[x].shape
        channels = ((1, c // groups, 1), (1, groups, c // groups))
        return self._op("Rearrange", x, dims=(((0, n, 1),), channels[::-1], ((2, h, 1),), ((3, w, 1),)))

    def softmax(self, x: str) -> str:
        """Over the channels."""
        n, _, h, w = self.graph.tensors[x].shape
        lowered = self._op("Sub", x, self._op("MaxTo", x, shape=(n, 1, h, w), constant=True))
        powers = self._op("Exp", lowered)
        return self._op("Div", powers, self._op("SumTo", powers, shape=(n, 1, h, w)))

    def batch_norm(self, x: str, frozen=False) -> str:
        g, channels = self.graph, self.graph.tensors[x].shape[1]
        size = g.tensors[x].shape
        count = int(np.prod(size)) // channels
        gamma = self.parameter("gamma", (channels,), 0.2, 1.0)
        beta = self.parameter("beta", (channels,), 0.2)
        mean = self.parameter("mean", (channels,), 0.1, trainable=False)
        variance = g.add_parameter(
            f"var{self.count}", Parameter(np.full(channels, 1.5, np.float32), False, f"var{self.count}")
        )
        if frozen:
            stats = self._op("FrozenStatistics", mean, variance, epsilon=1e-5)
            return self._op("Normalize", x, stats, gamma, beta, count=0)
        sums = self._op("ChannelMoments", x)
        stats = self._op("BatchStatistics", sums, count=count, epsilon=1e-5)
        outputs = [f"{mean}.new", f"{variance}.new"]
        g.add(
            "RunningStatistics",
            [sums, mean, variance],
            attrs={"count": count, "momentum": 0.9},
            outputs=outputs,
            phase=UPDATE,
        )
        g.next_value.update({mean: outputs[0], variance: outputs[1]})
        return self._op("Normalize", x, stats, gamma, beta, count=count)

    def relu(self, x: str) -> str:
        return self._op("Relu", x)

    def leaky(self, x: str, alpha=0.1) -> str:
        return self._op("LeakyRelu", x, alpha=alpha)

    def max_pool(self, x: str, kernel=2, stride=2, pads=(0, 0, 0, 0), ceil_mode=False, dilation=1) -> str:
        two = (kernel, kernel)
        return self._op(
            "MaxPool",
            x,
            kernel=two,
            strides=(stride, stride),
            dilations=(dilation, dilation),
            pads=pads,
            ceil_mode=ceil_mode,
        )

    def average_pool(self, x: str, kernel=2, stride=2, pads=(0, 0, 0, 0), ceil_mode=False, include=False) -> str:
        two = (kernel, kernel)
        return self._op(
            "AveragePool",
            x,
            kernel=two,
            strides=(stride, stride),
            pads=pads,
            ceil_mode=ceil_mode,
            count_include_pad=include,
        )

    def global_pool(self, x: str) -> str:
        return self._op("GlobalAveragePool", x)

    def flatten(self, x: str) -> str:
        shape = self.graph.tensors[x].shape
        return self._op("Reshape", x, shape=(shape[0], int(np.prod(shape[1:]))))

    def add(self, a: str, b: str) -> str:
        return self._op("Add", a, b)

    def mul(self, a: str, b: str) -> str:
        return self._op("Mul", a, b)

    def function(self, kind: str, x: str, **attrs: float) -> str:
        return self._op(kind, x, **attrs)

    def gate(self, x: str, channels: int) -> str:
        """Squeeze and excitation (Hu et al., arXiv 1709.01507)."""
        squeezed = self.function("Mish", self.conv(self.global_pool(x), channels, window=1, bias=True))
        width = self.graph.tensors[x].shape[1]
        return self.mul(x, self.function("Sigmoid", self.conv(squeezed, width, window=1, bias=True)))

    def concat(self, *parts: str, axis=1) -> str:
        return self._op("Concat", *parts, axis=axis)

    def dropout(self, x: str, ratio=0.4, seed=5) -> str:
        if not self.graph.controls:
            self.graph.controls[self.graph.add_tensor("step", (1,), "int32")] = "step"
        return self._op("Dropout", x, "step", ratio=ratio, seed=seed, site=self.count)

    def done(self, *outputs: str) -> Graph:
        self.graph.outputs = list(outputs)
        return self.graph


def plain(batch=2) -> Graph:
    """Convolutions, odd sizes, bias, pooling, a classifier."""
    net = Net((batch, 3, 13, 11))
    x = net.relu(net.conv(net.x, 6, bias=True))
    x = net.max_pool(x)
    x = net.leaky(net.conv(x, 20, window=(3, 2), pad=(1, 0, 1, 1), bias=True))
    x = net.relu(net.gemm(net.flatten(x), 9))
    return net.done(net.gemm(x, 5))


def normalized(batch=2) -> Graph:
    """BatchNorm, stride, overlapping pool, a residual with a projection, global pooling."""
    net = Net((batch, 3, 17, 15))
    x = net.relu(net.batch_norm(net.conv(net.x, 8, window=5, stride=2)))
    x = net.max_pool(x, kernel=3, stride=2, pads=(1, 1, 1, 1))
    a = net.relu(net.batch_norm(net.conv(x, 20, stride=2)))
    a = net.batch_norm(net.conv(a, 20))
    x = net.relu(net.add(a, net.batch_norm(net.conv(x, 20, window=1, stride=2))))
    return net.done(net.gemm(net.flatten(net.global_pool(x)), 4))


def branches(batch=2) -> Graph:
    """Concat at an odd channel, average pooling, dilation, dropout, frozen BatchNorm; an output that is a map."""
    net = Net((batch, 2, 12, 14))
    x = net.leaky(net.conv(net.x, 12))
    a = net.conv(x, 6, dilation=2, pad=2)
    b = net.average_pool(net.conv(x, 11, bias=True), kernel=3, stride=1, pads=(1, 1, 1, 1))
    x = net.batch_norm(net.concat(a, b), frozen=True)
    x = net.dropout(net.relu(x))
    return net.done(net.conv(x, 3, window=2, stride=2, pad=(0, 1, 1, 0)))


def gated(batch=2) -> Graph:
    """Functions that are not 0 at 0, a gate, a factor and an offset per channel and one for all, a quotient of maps."""
    net = Net((batch, 3, 12, 13))
    x = net.conv(net.x, 12, bias=True)
    x = net.mul(x, net.function("Sigmoid", x))
    x = net.gate(net.function("Clip", net.conv(x, 11, stride=2), low=-1.0, high=6.0), 5)
    x = net._op("Add", net.mul(net.parameter("scale", (11,), 0.1, 1.0), x), net.parameter("offset", (11,), 0.3))
    x = net.mul(net._op("Sub", net.function("Exp", net.function("Tanh", x)), x), net.parameter("one", (1,), 0.1, 1.0))
    x = net._op("Div", x, net.function("Shift", net.function("Softplus", net.conv(x, 11)), offset=1.0))
    x = net.function("GeluTanh", net.function("Shift", x, offset=-1.0))
    return net.done(net.gemm(net.flatten(net.average_pool(x)), 4))


def grouped(batch=2) -> Graph:
    """Depthwise convolutions with one output per channel and with two, groups smaller than a block, a residual."""
    net = Net((batch, 3, 9, 8))
    x = net.relu(net.conv(net.conv(net.x, 6, groups=3), 12, window=1, bias=True))
    a = net.function("Clip", net.batch_norm(net.conv(x, 12, groups=12)), low=0.0, high=6.0)
    x = net.add(x, net.conv(a, 12, window=1))
    x = net.relu(net.conv(x, 24, window=(3, 2), stride=2, pad=(1, 0, 1, 1), groups=12, bias=True))
    x = net.leaky(net.conv(x, 20, window=(1, 2), pad=0, groups=4))
    return net.done(net.gemm(net.flatten(net.global_pool(x)), 4))


def up_and_down(batch=2) -> Graph:
    """A small U-Net: pooling, a transposed convolution, a map resized linearly, and a join with the map from above,
    whose channels are shuffled and then gates."""
    net = Net((batch, 2, 10, 8))
    above = net.relu(net.conv(net.x, 9, bias=True))
    x = net.relu(net.conv(net.max_pool(above), 17))
    w = net.parameter("w", (17, 9, 3, 2), 0.15)
    x = net._op(
        "ConvInputGrad", x, w, strides=(2, 2), dilations=(1, 1), pads=(1, 0, 1, 0), input_shape=(batch, 9, 10, 8)
    )
    x = net.relu(net._op("Add", x, net.parameter("b", (9,), 0.1)))
    x = net.concat(net.conv(x, 5), above, net.resized(net.conv(net.max_pool(x), 6), 10, 8))
    x = net.softmax(net.shuffled(x, 4))
    return net.done(net.conv(x, 3, window=1))


NETWORKS = {
    "plain": plain,
    "normalized": normalized,
    "branches": branches,
    "gated": gated,
    "grouped": grouped,
    "up_and_down": up_and_down,
}


def feeds(graph: Graph, seed: int = 1) -> dict[str, np.ndarray]:
    """Random inputs and targets, step 3, learning rate 0.05."""
    rng = np.random.default_rng(seed)
    values: dict[str, np.ndarray] = {}
    for name in [*graph.inputs, *graph.targets]:
        tensor = graph.tensors[name]
        if tensor.dtype == "int32":
            classes = graph.tensors[graph.outputs[list(graph.targets).index(name)]].shape[1]
            values[name] = rng.integers(0, classes, tensor.shape, dtype=np.int32)
        else:
            values[name] = rng.standard_normal(tensor.shape).astype(np.float32)
    for name, role in graph.controls.items():
        values[name] = np.array([3], np.int32) if role == "step" else np.array([0.05], np.float32)
    return values
