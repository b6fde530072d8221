"""A small network of what the models of `models` lack: Resize, attention, LayerNormalization, functions of floats."""

from __future__ import annotations

from math import sqrt

import numpy as np
import onnx

from tests.onnx_tools import model, node, normal

HEADS = 2


def build(*, size: int, channels: int, classes: int, width: int) -> onnx.ModelProto:
    """Input `x` [batch, channels, size, size]; tokens of `width` numbers."""

    def weight(*shape: int) -> np.ndarray:
        return normal(*shape) / np.float32(sqrt(shape[0]))

    def heads(name: str, *order: int) -> list[onnx.NodeProto]:
        return [
            node("MatMul", f"a w{name}", f"{name}0"),
            node("Reshape", f"{name}0 split", f"{name}1"),
            node("Transpose", f"{name}1", name, perm=order),
        ]

    nodes = [
        node("Conv", "x stem", "c", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Sigmoid", "c", "gate"),
        node("Mul", "c gate", "silu"),
        node("Resize", "silu _ scales", "r", mode="linear"),
        node("Reshape", "r flat", "f"),
        node("Transpose", "f", "t", perm=[0, 2, 1]),
        node("Add", "t place", "p"),
        node("LayerNormalization", "p g1 b1", "a", axis=-1),
        *heads("q", 0, 2, 1, 3),
        *heads("k", 0, 2, 3, 1),
        *heads("v", 0, 2, 1, 3),
        node("MatMul", "q k", "s"),
        node("Softmax", "s", "m", axis=-1),
        node("MatMul", "m v", "o"),
        node("Transpose", "o", "o1", perm=[0, 2, 1, 3]),
        node("Reshape", "o1 join", "o2"),
        node("Add", "p o2", "e"),
        node("LayerNormalization", "e g2 b2", "n", axis=-1),
        node("MatMul", "n up", "h"),
        node("Div", "h root", "h1"),
        node("Erf", "h1", "h2"),
        node("Add", "h2 one", "h3"),
        node("Mul", "h h3", "gelu"),
        node("MatMul", "gelu down", "d"),
        node("Add", "e d", "l"),
        node("ReduceMean", "l", "z", axes=[1], keepdims=0),
        node("Tanh", "z", "z1"),
        node("Gemm", "z1 head bias", "y", transB=1),
    ]
    ones, zeros = np.ones(width, np.float32), np.zeros(width, np.float32)
    weights = {
        "stem": normal(width, channels, 3, 3) / 3,
        "place": normal(1, (size * 3 // 8) ** 2, width) / 5,
        **{f"w{name}": weight(width, width) for name in "qkv"},
        **{"g1": ones, "b1": zeros, "g2": ones, "b2": zeros},
        "up": weight(width, 2 * width),
        "down": weight(2 * width, width),
        "head": normal(classes, width) / 3,
        "bias": np.zeros(classes, np.float32),
        "root": np.array(sqrt(2), np.float32),
        "one": np.array(1, np.float32),
        "scales": np.array([1, 1, 0.75, 0.75], np.float32),
    }
    shapes = {"flat": [0, width, -1], "split": [0, -1, HEADS, width // HEADS], "join": [0, -1, width]}
    weights |= {name: np.array(shape, np.int64) for name, shape in shapes.items()}
    return model(nodes, {"x": ("batch", channels, size, size)}, weights=weights)
