"""Chains of ops that move elements, as exporters write them, for an input x [2,6,4,5]."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from tests.onnx_tools import node, normal

X = {"x": (2, 6, 4, 5)}
Nodes = list[onnx.NodeProto]
Weights = dict[str, np.ndarray]


def ints(**values: list[int]) -> Weights:
    return {name: np.array(value, np.int64) for name, value in values.items()}


def number(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def chain(*steps: tuple[str, dict[str, Any]], **weights: list[int]) -> tuple[Nodes, Weights]:
    """Ops one after the other: `Kind` or `Kind operands`, each with its attributes."""
    nodes, x = [], "x"
    for i, (what, attrs) in enumerate(steps):
        kind, *more = what.split()
        y = "y" if i == len(steps) - 1 else f"t{i}"
        nodes.append(node(kind, " ".join([x, *more]), y, **attrs))
        x = y
    return nodes, ints(**weights)


CASES: dict[str, tuple[Nodes, Weights]] = {
    "channel shuffle": chain(
        ("Reshape five", {}),
        ("Transpose", {"perm": [0, 2, 1, 3, 4]}),
        ("Reshape four", {}),
        five=[0, 2, 3, 4, 5],
        four=[0, 6, 4, 5],
    ),
    "baked batch": chain(
        ("Reshape a", {}), ("Transpose", {"perm": [0, 2, 1]}), ("Reshape b", {}), a=[2, 6, 20], b=[2, -1]
    ),
    "a reshape across digits": chain(
        ("Transpose", {"perm": [0, 2, 3, 1]}), ("Reshape a", {}), ("Reshape b", {}), a=[2, 8, 15], b=[2, 10, 12]
    ),
    "depth to space": chain(
        ("Concat x x x x x", {"axis": 1}), ("Reshape a", {}), ("DepthToSpace", {"blocksize": 3}), a=[2, 36, 4, 5]
    ),
    "depth to space CRD": chain(("Concat x x x x x", {"axis": 1}), ("DepthToSpace", {"blocksize": 3, "mode": "CRD"})),
    "space to depth": chain(("Slice s e a", {}), ("SpaceToDepth", {"blocksize": 2}), s=[0], e=[4], a=[3]),
    "flatten behind": chain(
        ("Flatten", {"axis": 2}),
    ),
    "unsqueeze and squeeze": chain(("Unsqueeze a", {}), ("Relu", {}), ("Squeeze a", {}), a=[1, -1]),
    "slices with steps": chain(("Slice s e a st", {}), s=[1, 4, -1], e=[6, 0, -6], a=[1, 2, 3], st=[2, -2, -2]),
    "slice of a view": chain(
        ("Reshape five", {}),
        ("Slice s e a", {}),
        ("Transpose", {"perm": [0, 2, 3, 4, 1]}),
        ("Squeeze b", {}),
        five=[0, 2, 3, 4, 5],
        s=[1],
        e=[2],
        a=[1],
        b=[4],
    ),
    "gather": chain(("Gather i", {"axis": 1}), ("Gather j", {"axis": 3}), i=[2, 0, 1], j=[1, 1, 4]),
    "gather of a grid": chain(
        ("Gather i", {"axis": 1}),
        ("Gather j", {"axis": -1}),
        ("Reshape four", {}),
        i=[[2, 0], [1, 0]],
        j=[0, 3, 3],
        four=[2, 4, 4, 3],
    ),
    "gather of many": chain(("Gather i", {"axis": 1}), i=[0, 2, 4, 1, 3, 5, 0, 0, 2, 2, 4]),
    "expand among five": chain(
        ("Unsqueeze two", {}),
        ("Expand five", {}),
        ("Reshape four", {}),
        two=[2],
        five=[2, 6, 3, 4, 5],
        four=[2, 6, 3, 20],
    ),
    "products with vectors": (
        [
            node("MatMul", "w v", "a"),
            node("MatMul", "u w", "b"),
            node("MatMul", "u a", "sigma"),
            node("Div", "x sigma", "s"),
            node("MatMul", "s b", "y"),
        ],
        {"w": normal(3, 5), "v": normal(5), "u": normal(3)},
    ),
    "a token and a table": (
        [
            node("Reshape", "x three", "a"),
            node("Transpose", "a", "b", perm=[0, 2, 1]),
            node("Expand", "token one", "t"),
            node("Concat", "t b", "c", axis=1),
            node("Gather", "table grid", "g", axis=0),
            node("Transpose", "g", "h", perm=[2, 0, 1]),
            node("Slice", "c s0 s0 one1", "none"),
            node("Concat", "none c", "d", axis=1),
            node("Add", "d h", "y"),
        ],
        ints(three=[0, 6, 20], one=[2, 1, 1], s0=[0], one1=[1])
        | {"token": normal(1, 1, 6), "table": normal(9, 1), "grid": np.arange(126).reshape(21, 6) % 9},
    ),
    "strides of what lies in order": (
        [node("Reshape", "x flat", "f"), node("Gather", "f i", "y")],
        ints(flat=[-1]) | {"i": np.arange(240).reshape(2, 12, 10)},
    ),
    "tile": chain(("Tile r", {}), r=[1, 2, 1, 3]),
    "concat of views": (
        [
            node("Transpose", "x", "a", perm=[0, 2, 3, 1]),
            node("Reshape", "a r", "b"),
            node("Concat", "b b", "c", axis=2),
            node("Concat", "c c", "y", axis=1),
        ],
        ints(r=[0, -1, 6]),
    ),
    "instance norm": (
        [node("InstanceNormalization", "x g b", "y", epsilon=1e-3)],
        {"g": normal(6), "b": normal(6, seed=1)},
    ),
    "group norm of older exports": (
        [
            node("Reshape", "x three", "a"),
            node("InstanceNormalization", "a g b", "n"),
            node("Shape", "x", "shape"),
            node("Reshape", "n shape", "m"),
            node("Mul", "m w", "s"),
            node("Add", "s v", "y"),
        ],
        {"g": np.ones(2, np.float32), "b": np.zeros(2, np.float32), "w": normal(6, 1, 1), "v": normal(6, 1, 1, seed=1)}
        | ints(three=[0, 2, -1]),
    ),
    "weights in another shape": (
        [
            node("Reshape", "w wide", "w4"),
            node("Mul", "x w4", "a"),
            node("Unsqueeze", "v one", "v3"),
            node("Sub", "v3 a", "b"),
            node("Squeeze", "u", "u1"),
            node("Add", "b u1", "y"),
        ],
        {"w": normal(6), "v": normal(4), "u": normal(1, 5, 1)} | ints(wide=[1, -1, 1, 1], one=[1]),
    ),
    "layer norm of channels last": (
        [
            node("Transpose", "x", "a", perm=[0, 2, 3, 1]),
            node("LayerNormalization", "a g b", "n", axis=-1),
            node("MatMul", "n w", "m"),
            node("Add", "m c", "p"),
            node("Mul", "p s", "q"),
            node("Transpose", "q", "y", perm=[0, 3, 1, 2]),
        ],
        {"g": normal(6), "b": normal(6, seed=1), "w": normal(6, 7), "c": normal(7), "s": normal(7, seed=1)},
    ),
    "layer norm of all": (
        [node("LayerNormalization", "x g b", "y", axis=1)],
        {"g": normal(6, 4, 5), "b": normal(6, 4, 5, seed=1)},
    ),
    "local response": ([node("LRN", "x", "y", size=3, alpha=0.3, beta=0.6, bias=1.5)], {}),
    "unit length": chain(
        ("LpNormalization", {"axis": 1}),
    ),
    "maxima and minima": (
        [
            node("Min", "x two", "a"),
            node("Max", "a b", "c"),
            node("Sum", "c x b", "d"),
            node("Mean", "d x", "y"),
        ],
        {"two": number(0.5), "b": normal(1, 6, 1, 1)},
    ),
    "prelu": ([node("PRelu", "x s", "y")], {"s": normal(6, 1, 1)}),
    "prelu with one slope": ([node("PRelu", "x s", "y")], {"s": normal(1)}),
    "a choice that leaves nothing": (
        [node("Where", "all zero x", "z"), node("Add", "x z", "y")],
        {"all": np.ones((1, 6, 1, 1), bool), "zero": np.zeros((), np.float32)},
    ),
    "a constant mask": (
        [node("Where", "m x c", "a"), node("Where", "m a x", "y")],
        {"m": normal(1, 1, 4, 5) > 0, "c": number(-3)},
    ),
    "powers": (
        [
            node("Abs", "x", "a"),
            *(node("Pow", f"a p{i}", f"b{i}") for i in range(4)),
            node("Concat", "b0 b1 b2 b3", "y", axis=1),
        ],
        {f"p{i}": number(p) for i, p in enumerate((3.0, 4.0, 0.7, 1.0))},
    ),
    "attention": (
        [
            node("Reshape", "x three", "q"),
            node("Transpose", "q", "k", perm=[0, 2, 1]),
            node("MatMul", "k q", "s"),
            node("Softmax", "s", "p", axis=-1),
            node("MatMul", "q p", "o"),
            node("Shape", "x", "shape"),
            node("Reshape", "o shape", "y"),
        ],
        ints(three=[0, 6, -1]),
    ),
    "attention with heads": (
        [
            node("Reshape", "x four", "q"),
            node("Transpose", "q", "k", perm=[0, 1, 3, 2]),
            node("MatMul", "k q", "s"),
            node("Softmax", "s", "p", axis=3),
            node("Transpose", "p", "pt", perm=[0, 1, 3, 2]),
            node("MatMul", "q pt", "o"),
            node("Reshape", "o three", "y"),
        ],
        ints(four=[0, 2, 3, 20], three=[0, 6, -1]),
    ),
    "a pool of what has one dimension": (
        [
            node("Reshape", "x three", "t"),
            node("GlobalAveragePool", "t", "a"),
            node("GlobalMaxPool", "t", "b"),
            node("Mul", "a b", "y"),
        ],
        ints(three=[2, 6, 20]),
    ),
    "products of many images": (
        [
            node("Reshape", "x five", "q"),
            node("Transpose", "q", "k", perm=[0, 1, 2, 4, 3]),
            node("MatMul", "q k", "s"),
            node("MatMul", "u s", "m"),
            node("Transpose", "m", "t", perm=[0, 3, 1, 2, 4]),
            node("Reshape", "t three", "y"),
        ],
        {"u": normal(1, 1, 3, 2, 4)} | ints(five=[2, 2, 3, 4, 5], three=[2, 4, 12]),
    ),
    "tokens": (
        [
            node("Reshape", "x three", "t"),
            node("Transpose", "t", "k", perm=[0, 2, 1]),
            node("Add", "k e", "p"),
            node("MatMul", "p w", "m"),
            node("ReduceMean", "m", "y", axes=[1], keepdims=0),
        ],
        {"e": normal(1, 20, 6), "w": normal(6, 5)} | ints(three=[0, 6, -1]),
    ),
    "one dimension of pixels": (
        [
            node("ReduceMean", "x", "r", axes=[2], keepdims=0),
            node("Conv", "r w b", "c", pads=[1, 1]),
            node("MaxPool", "c", "m", kernel_shape=[2]),
            node("AveragePool", "m", "y", kernel_shape=[2]),
        ],
        {"w": normal(3, 6, 3), "b": normal(3)},
    ),
    "split attention": (
        [
            node("Reshape", "x five", "r"),
            node("ReduceSum", "r a", "s", keepdims=0),
            node("GlobalAveragePool", "s", "g"),
            node("Conv", "g w", "c"),
            node("Reshape", "c gates", "l"),
            node("Softmax", "l", "p", axis=1),
            node("Mul", "r p", "m"),
            node("ReduceSum", "m a", "y", keepdims=0),
        ],
        {"w": normal(6, 3, 1, 1)} | ints(five=[0, 2, 3, 4, 5], a=[1], gates=[0, 2, 3, 1, 1]),
    ),
    "biases of a network of coordinates": (
        [
            node("Transpose", "w", "v", perm=[1, 0]),
            node("MatMul", "relative_coords_table v", "m"),
            node("Transpose", "m", "p", perm=[0, 3, 1, 2]),
            node("Add", "x p", "y"),
        ],
        {"relative_coords_table": normal(1, 4, 5, 2), "w": normal(6, 2)},
    ),
    "zeros written over a part": (
        [
            node("Expand", "zero two", "z"),
            node("ScatterND", "b places z", "c"),
            node("Reshape", "c column", "d"),
            node("Mul", "x d", "y"),
        ],
        {"b": normal(6), "zero": number(0.0)} | ints(two=[2], places=[[2], [3]], column=[6, 1, 1]),
    ),
}
