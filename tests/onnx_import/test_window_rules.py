"""Rules of convolutions, pooling, unpooling and resizing, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from fusetile.errors import UnsupportedOp
from fusetile.onnx_import import import_onnx
from fusetile.reference import evaluate
from tests.graphs import feeds
from tests.onnx_import.checks import X, check, kinds
from tests.onnx_tools import model, node, normal, save
from tests.training import in_float64, planned, run_plan, training_graph, worst


@pytest.mark.parametrize(
    "attrs",
    [
        {},
        {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [0, 1, 2, 0]},
        {"dilations": [2, 3], "pads": [2, 2, 2, 2]},
        *({"auto_pad": mode, "strides": [2, 3]} for mode in ("SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET")),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_conv(attrs: dict[str, Any], bias: bool, tmp_path: Path) -> None:
    weights = {"w": normal(4, 3, 3, 2)} | ({"b": normal(4)} if bias else {})
    check(model([node("Conv", " ".join(["x", *weights]), "y", **attrs)], X, weights=weights), tmp_path)


@pytest.mark.parametrize("channels", [3, 6])
def test_depthwise_conv(channels: int, tmp_path: Path) -> None:
    conv = node("Conv", "x w b", "y", group=3, pads=[1, 1, 1, 1], strides=[2, 2])
    graph = check(model([conv], X, weights={"w": normal(channels, 1, 3, 3), "b": normal(channels)}), tmp_path)
    assert graph.ops["y"].attrs["groups"] == 3


@pytest.mark.parametrize(
    "attrs",
    [
        {},
        {"strides": [2, 2], "kernel_shape": [3, 2]},
        {"strides": [2, 3], "pads": [1, 0, 0, 1], "output_padding": [1, 2], "dilations": [1, 2]},
        {"strides": [2, 2], "group": 3, "pads": [1, 1, 1, 0]},
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_conv_transpose(attrs: dict[str, Any], bias: bool, tmp_path: Path) -> None:
    weights = {"w": normal(3, 4, 3, 2)} | ({"b": normal(4 * attrs.get("group", 1))} if bias else {})
    check(model([node("ConvTranspose", " ".join(["x", *weights]), "y", **attrs)], X, weights=weights), tmp_path)


@pytest.mark.parametrize("form", [("asymmetric", "floor"), ("half_pixel", "round_prefer_floor")])
def test_resize_by_whole_factors(form: tuple[str, str], tmp_path: Path) -> None:
    attrs = {"mode": "nearest", "coordinate_transformation_mode": form[0], "nearest_mode": form[1]}
    for factors in ((2, 2), (3, 4), (1, 5)):
        weights = {"scales": np.array([1, 1, *factors], np.float32)}
        check(model([node("Resize", "x _ scales", "y", **attrs)], X, weights=weights), tmp_path)
    sizes = {"sizes": np.array([2, 3, 18, 33])}
    check(model([node("Resize", "x _ _ sizes", "y", **attrs)], {"x": (2, 3, 9, 11)}, weights=sizes), tmp_path)


def test_same_padding_counts_dilation(tmp_path: Path) -> None:  # which ONNX Runtime refuses
    conv = node("Conv", "x w", "y", auto_pad="SAME_UPPER", dilations=[2, 3])
    graph = import_onnx(save(model([conv], X, weights={"w": normal(4, 3, 3, 2)}), tmp_path))
    assert graph.ops["y"].attrs["pads"] == (2, 1, 2, 2) and graph.tensors["y"].shape == (1, 4, 9, 11)


POOLS: list[dict[str, Any]] = [
    {"kernel_shape": [2, 2], "strides": [2, 2]},
    {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 0, 2, 1]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1},
    {"kernel_shape": [2, 2], "strides": [3, 3], "ceil_mode": 1},
    *({"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": mode} for mode in ("SAME_UPPER", "SAME_LOWER", "VALID")),
    {"kernel_shape": [2, 2], "strides": [4, 4], "auto_pad": "VALID", "ceil_mode": 1},
    {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": "SAME_LOWER", "ceil_mode": 1},
]


@pytest.mark.parametrize("attrs", [*POOLS, {"kernel_shape": [2, 3], "dilations": [2, 2], "storage_order": 1}])
def test_max_pool(attrs: dict[str, Any], tmp_path: Path) -> None:
    check(model([node("MaxPool", "x", "y", **attrs)], X), tmp_path)


@pytest.mark.parametrize("sizes", [(8, 6), (9, 7)])
def test_max_unpool(sizes: tuple[int, int], tmp_path: Path) -> None:
    """Against ONNX Runtime; the gradient against finite differences; and in plans."""
    window = {"kernel_shape": [2, 2], "strides": [2, 2]}
    pool = node("MaxPool", "a", "p i", **window)
    nodes = [
        node("Conv", "x w", "a", pads=[1] * 4),
        pool,
        node("Tanh", "p", "t"),
        node("MaxUnpool", "t i s", "y", **window),
    ]
    weights = {"w": normal(4, 3, 3, 3), "s": np.array([2, 4, *sizes], np.int64)}
    if sizes == (8, 6):
        nodes[-1] = node("MaxUnpool", "t i", "y", **window)
        del weights["s"]
    graph = training_graph(check(model(nodes, {"x": (2, 3, *sizes)}, ["y"], weights), tmp_path), loss="mse")
    fed = feeds(graph)
    exact = in_float64(graph)
    values = evaluate(exact, fed, exact=True)
    direction = normal(4, 3, 3, 3, seed=1).astype(np.float64)
    plus, minus = (
        evaluate(exact, {**fed, "w": values["w"] + sign * 1e-6 * direction}, exact=True)[graph.loss] for sign in (1, -1)
    )
    assert (plus - minus).item() / 2e-6 == pytest.approx((values[graph.gradients["w"]] * direction).sum(), rel=1e-5)
    expected = evaluate(graph, fed)
    for plan in ("batch", "grid:2x1", "random:1"):
        error, where = worst(run_plan(graph, *planned(graph, plan, 2), fed), expected)
        assert error < 1e-5, f"{plan}: {where} is off by {error}"


def test_max_unpool_of_other_windows(tmp_path: Path) -> None:
    pool, small = (node("MaxPool", "x", "p i", kernel_shape=[k, k], strides=[2, 2]) for k in (2, 3))
    for first, strides, message in ((pool, [3, 3], "must be the windows"), (small, [2, 2], "windows overlap")):
        size = 2 if first is pool else 3
        nodes = [first, node("MaxUnpool", "p i", "y", kernel_shape=[size, size], strides=strides)]
        with pytest.raises(UnsupportedOp, match=message):
            import_onnx(save(model(nodes, {"x": (2, 3, 9, 9) if size == 3 else (2, 3, 8, 8)}, ["y"]), tmp_path))
    for other, message in (("Cast", "output 'y': it is the indices"), ("Neg", "Neg node 'n': it reads 'i', the ind")):
        nodes = [pool, node(other, "i", "y", "n", **({"to": 1} if other == "Cast" else {}))]
        with pytest.raises(UnsupportedOp, match=message):
            import_onnx(save(model(nodes, {"x": (2, 3, 8, 8)}, ["p", "y"]), tmp_path))


@pytest.mark.parametrize("wrong", ["", "begin", "order"])
def test_numbers_scattered_to_where_maxima_were(wrong: str, tmp_path: Path) -> None:
    """As newer exporters write unpooling, with PyTorch's indices in between."""
    nodes = [
        node("MaxPool", "x", "p i", kernel_shape=[2, 2], strides=[2, 2]),
        node("MaxPool", "x", "one j", kernel_shape=[1, 1]),
        node("Slice", "j zeros ones axes", "begin"),
        node("Sub", "i begin", "k"),
        node("Add", "k starts", "l"),
        node("Transpose", "l", "t", perm=[0, 1, 3, 2] if wrong == "order" else [0, 1, 2, 3]),
        node("Reshape", "t flat", "m"),
        node("Unsqueeze", "m last", "n"),
        node("Tanh", "p", "u"),
        node("Reshape", "u flat", "v"),
        node("ScatterND", "nothing n v", "s", "scatter"),
        node("Reshape", "s shape", "y"),
    ]
    starts = np.arange(6).reshape(2, 3, 1, 1) * 48 + (wrong == "begin")
    weights = {"starts": starts, "shape": np.array([2, 3, 8, 6]), "flat": np.array([-1]), "last": np.array([-1])}
    weights |= {"zeros": np.array([0, 0]), "ones": np.array([1, 1]), "axes": np.array([2, 3])}
    nothing = numpy_helper.from_array(np.zeros(288, np.float32))
    nodes.insert(0, helper.make_node("Constant", [], ["nothing"], value=nothing))
    proto = model(nodes, {"x": (2, 3, 8, 6)}, ["y"], weights)
    if wrong:
        with pytest.raises(UnsupportedOp, match="ScatterND node 'scatter': its numbers do not stand in the order"):
            import_onnx(save(proto, tmp_path))
    else:
        assert kinds(check(proto, tmp_path))[-2:] == ["MaxPoolGrad", "Identity"]


@pytest.mark.parametrize("attrs", POOLS)
@pytest.mark.parametrize("include_pad", [0, 1])
def test_average_pool(attrs: dict[str, Any], include_pad: int, tmp_path: Path) -> None:
    check(model([node("AveragePool", "x", "y", count_include_pad=include_pad, **attrs)], X, opset=19), tmp_path)


@pytest.mark.parametrize("opset", [9, 13, 18])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reduce_mean_over_the_image_is_global_average_pooling(opset: int, keepdims: int, tmp_path: Path) -> None:
    if opset < 18:
        mean, weights = node("ReduceMean", "x", "y", axes=[-1, -2], keepdims=keepdims), {}
    else:
        mean, weights = node("ReduceMean", "x axes", "y", keepdims=keepdims), {"axes": np.array([2, 3])}
    graph = check(model([mean], X, weights=weights, opset=opset), tmp_path)
    assert kinds(graph) == ["GlobalAveragePool"] + ["Reshape"] * (1 - keepdims)


def test_argmax_does_not_take_the_name_of_a_later_tensor(tmp_path: Path) -> None:
    nodes = [
        node("MaxPool", "x", "p", kernel_shape=[2, 2]),
        node("Relu", "p", "p.argmax"),
        node("Relu", "p.argmax", "y"),
    ]
    check(model(nodes, X), tmp_path)
