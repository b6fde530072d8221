"""A small builder of ONNX models, and the command line that all models share. Weights are seeded random (He et al.,
arXiv 1502.01852); names are PyTorch's, as is the form of BatchNormalization (mean 0 and variance 1 to begin with)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from math import prod, sqrt
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 17, 8  # read by every ONNX Runtime since 2022


class Builder:
    """Layers append nodes and weights and return the name of their output; `shapes` has them without the batch."""

    def __init__(self, name: str, *, channels: int, size: int, batch: int | None, seed: int) -> None:
        """One input `x` [batch, channels, size, size]; `batch` None is dynamic."""
        self.name, self.batch = name, "batch" if batch is None else batch
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {"x": (channels, size, size)}
        self.random = np.random.default_rng(seed)

    # -- layers -----------------------------------------------------------------------------------------------------

    def conv(
        self,
        name: str,
        x: str,
        channels: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        pad: int | None = None,
        bias: bool = True,
        groups: int = 1,
        gain: float = 1.0,
    ) -> str:
        """Square convolution; by default padded so that stride 1 keeps the size. `gain`: a factor of the weights."""
        in_channels, *sizes = self.shapes[x]
        pad = kernel // 2 if pad is None else pad
        inputs = [x, *self._filter(name, (channels, in_channels // groups, kernel, kernel), bias, gain=gain)]
        shape = (channels, *((size + 2 * pad - kernel) // stride + 1 for size in sizes))
        return self._node("Conv", name, inputs, shape, **_window(kernel, stride, pad), dilations=[1, 1], group=groups)

    def conv_transpose(self, name: str, x: str, channels: int, *, kernel: int = 2) -> str:
        """Transposed convolution whose windows lie side by side: `kernel` times as many rows and columns."""
        in_channels, *sizes = self.shapes[x]
        inputs = [x, *self._filter(name, (in_channels, channels, kernel, kernel), True, output=1)]
        shape = (channels, *(size * kernel for size in sizes))
        return self._node("ConvTranspose", name, inputs, shape, **_window(kernel, kernel, 0))

    def upsample(self, name: str, x: str, *, factor: int = 2) -> str:
        """Every pixel `factor` x `factor` times."""
        channels, *sizes = self.shapes[x]
        scales = self._weight(f"{name}.scales", np.array([1, 1, factor, factor]))
        options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        shape = (channels, *(size * factor for size in sizes))
        return self._node("Resize", name, [x, "", scales], shape, **options)

    def batch_norm(self, name: str, x: str) -> str:
        """BatchNormalization in its inference form, which most exports have."""
        channels = self.shapes[x][0]
        start = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}
        vectors = [self._weight(f"{name}.{key}", np.full(channels, value)) for key, value in start.items()]
        return self._node("BatchNormalization", name, [x, *vectors], self.shapes[x], epsilon=1e-5, momentum=0.9)

    def relu(self, name: str, x: str) -> str:
        return self._node("Relu", name, [x], self.shapes[x])

    def relu6(self, name: str, x: str) -> str:
        """Clip to 0 .. 6, as PyTorch exports ReLU6."""
        bounds = [self._weight(f"{name}.{key}", np.array(value)) for key, value in (("min", 0), ("max", 6))]
        return self._node("Clip", name, [x, *bounds], self.shapes[x])

    def leaky_relu(self, name: str, x: str, *, alpha: float) -> str:
        return self._node("LeakyRelu", name, [x], self.shapes[x], alpha=alpha)

    def max_pool(self, name: str, x: str, *, kernel: int = 2, stride: int = 2, pad: int = 0) -> str:
        channels, *sizes = self.shapes[x]
        shape = (channels, *((size + 2 * pad - kernel) // stride + 1 for size in sizes))
        return self._node("MaxPool", name, [x], shape, **_window(kernel, stride, pad))

    def average_pool(self, name: str, x: str, *, kernel: int = 2, stride: int = 2) -> str:
        channels, *sizes = self.shapes[x]
        shape = (channels, *((size - kernel) // stride + 1 for size in sizes))
        return self._node("AveragePool", name, [x], shape, **_window(kernel, stride, 0))

    def global_average_pool(self, name: str, x: str) -> str:
        return self._node("GlobalAveragePool", name, [x], (self.shapes[x][0], 1, 1))

    def add(self, name: str, a: str, b: str) -> str:
        return self._node("Add", name, [a, b], self.shapes[a])

    def concat(self, name: str, *parts: str) -> str:
        """Along the channels."""
        channels = sum(self.shapes[part][0] for part in parts)
        return self._node("Concat", name, parts, (channels, *self.shapes[parts[0]][1:]), axis=1)

    def space_to_depth(self, name: str, x: str, *, block: int = 2) -> str:
        """Blocks of pixels become channels."""
        channels, *sizes = self.shapes[x]
        shape = (channels * block**2, *(size // block for size in sizes))
        return self._node("SpaceToDepth", name, [x], shape, blocksize=block)

    def dropout(self, name: str, x: str, *, ratio: float) -> str:
        """Nothing at all for ratio 0."""
        if not ratio:
            return x
        return self._node("Dropout", name, [x, self._weight(f"{name}.ratio", np.array(ratio))], self.shapes[x])

    def flatten(self, name: str, x: str) -> str:
        return self._node("Flatten", name, [x], (prod(self.shapes[x]),), axis=1)

    def linear(self, name: str, x: str, features: int) -> str:
        inputs = [x, *self._filter(name, (features, self.shapes[x][0]), True)]
        return self._node("Gemm", name, inputs, (features,), transB=1)

    # -- the result -------------------------------------------------------------------------------------------------

    def model(self, output: str) -> onnx.ModelProto:
        """The finished model, checked; its one output is called `y`."""
        (last,) = (node for node in self.nodes if output in node.output)
        last.output[0] = "y"
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [self.batch, *shape])
            for name, shape in (("x", self.shapes["x"]), ("y", self.shapes[output]))
        ]
        graph = helper.make_graph(self.nodes, self.name, ends[:1], ends[1:], self.weights)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="fusetile.models"
        )
        model.ir_version = IR_VERSION
        onnx.checker.check_model(model, full_check=True)
        return model

    # -- inside -----------------------------------------------------------------------------------------------------

    def _node(self, kind: str, name: str, inputs: Sequence[str], shape: Sequence[int], **attrs: object) -> str:
        if min(shape) < 1:
            raise ValueError(
                f"the image is too small for {name}: its output would be {tuple(shape)}; use a larger --size"
            )
        output = f"{name}.out"
        self.nodes.append(helper.make_node(kind, inputs, [output], name, **attrs))
        self.shapes[output] = tuple(shape)
        return output

    def _filter(self, name: str, shape: Sequence[int], bias: bool, *, output: int = 0, gain: float = 1.0) -> list[str]:
        """Weights and perhaps biases; dimension `output` of the shape counts the output's channels."""
        fan_in = prod(shape) // shape[output]
        deviation = gain * sqrt(2 / fan_in)
        names = [self._weight(f"{name}.weight", self.random.standard_normal(shape, np.float32) * deviation)]
        if bias:
            bound = 1 / sqrt(fan_in)
            names.append(self._weight(f"{name}.bias", self.random.uniform(-bound, bound, shape[output])))
        return names

    def _weight(self, name: str, value: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(value.astype(np.float32, copy=False), name))
        return name


def _window(kernel: int, stride: int, pad: int) -> dict[str, list[int]]:
    return {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4}


def scaled(channels: int, width: float) -> int:
    """A layer's channels times the width multiplier, at least one."""
    return max(1, round(channels * width))


def parser(description: str, *, size: int, channels: int = 3, classes: int | None = 10) -> argparse.ArgumentParser:
    """The options that all models have, with a model's own defaults."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    positive = _at_least(1)
    options.add_argument("--size", type=positive, default=size, help="height and width of the images")
    options.add_argument("--channels", type=positive, default=channels, help="channels of the images")
    if classes is not None:
        options.add_argument("--classes", type=positive, default=classes, help="number of classes")
    options.add_argument("--width", type=float, default=1.0, help="multiplies the channels of every layer")
    options.add_argument("--batch", type=_batch, default="dynamic", help="a number, or dynamic")
    options.add_argument("--seed", type=_at_least(0), default=0, help="of the random weights")
    options.add_argument("-o", "--output", type=Path, required=True, default=argparse.SUPPRESS, help="the .onnx file")
    return options


def write(options: argparse.ArgumentParser, build: Callable[..., onnx.ModelProto]) -> None:
    """Parse the command line, build the model from its options, and write it."""
    arguments = vars(options.parse_args())
    path = arguments.pop("output")
    try:
        model = build(**arguments)
        onnx.save(model, path)
    except (ValueError, OSError) as error:
        options.error(str(error))
    weights = sum(prod(tensor.dims) for tensor in model.graph.initializer if ".running_" not in tensor.name)
    print(f"{path}: {model.graph.name}, {len(model.graph.node)} nodes, {weights:,} weights")


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= {least}")
        return int(text)

    return number


def _batch(text: str) -> int | None:
    return None if text == "dynamic" else _at_least(1)(text)
