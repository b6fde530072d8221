"""Every row of the op table: its results against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, TensorProto
from onnx.reference import ReferenceEvaluator

from fusetile.errors import UserError
from fusetile.graph import Graph
from fusetile.ops.functions import FUNCTIONS
from fusetile.reference import evaluate
from tests.onnx_tools import model, node, normal, run_ort
from tests.ops.cases import FIT, FUNCTION_ATTRS
from tests.ops.window_cases import CONVOLUTIONS, MAXIMA, POOLS, window


def ours(kind: str, values: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> list[np.ndarray]:
    """One op, undivided, in float32."""
    graph = Graph("one op")
    for name, value in values.items():
        graph.add_tensor(name, value.shape, str(value.dtype), "filter" if name == "w" else "map")
    outputs = graph.add(kind, list(values), attrs=attrs, outputs=None, stem="y")
    found = evaluate(graph, values)
    return [found[name] for name in outputs]


def theirs(proto_node: NodeProto, values: Mapping[str, np.ndarray], opset: int = 19) -> list[np.ndarray]:
    """The same by ONNX Runtime, without its optimizations."""
    x = {name: value for name, value in values.items() if name.startswith("x")}
    weights = {name: value for name, value in values.items() if name not in x}
    proto = model([proto_node], {name: v.shape for name, v in x.items()}, list(proto_node.output), weights, opset=opset)
    proto.ir_version = 9
    for output in proto.graph.output[1:] if proto_node.op_type == "MaxPool" else ():
        output.type.tensor_type.elem_type = TensorProto.INT64
    return list(run_ort(proto, x).values())


def onnx_window(attrs: Mapping[str, Any], kernel: tuple[int, ...]) -> dict[str, Any]:
    groups = {"group": attrs["groups"]} if "groups" in attrs else {}
    return {"kernel_shape": kernel, **{key: list(attrs[key]) for key in ("strides", "dilations", "pads")}, **groups}


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_conv(name: str, bias: bool) -> None:
    x, w, attrs = CONVOLUTIONS[name]
    values = {"x": normal(*x), "w": normal(*w)} | ({"b": normal(w[0])} if bias else {})
    (expected,) = theirs(node("Conv", " ".join(values), "y", **onnx_window(attrs, w[2:])), values)
    close(ours("Conv", values, attrs)[0], expected)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_activation_fused_into_conv_and_gemm(activation: str) -> None:
    x, w, attrs = CONVOLUTIONS["3x3"]
    attrs = {**attrs, "activation": activation, "alpha": 0.3}
    slope = {"relu": 0.0, "leaky_relu": 0.3}[activation]
    for kind, values in (
        ("Conv", {"x": normal(*x), "w": normal(*w), "b": normal(w[0])}),
        ("Gemm", {"x": normal(3, 7), "w": normal(4, 7), "b": normal(4)}),
    ):
        (plain,) = ours(kind, values, {**attrs, "activation": ""})
        assert (plain < 0).any()
        close(ours(kind, values, attrs)[0], np.where(plain > 0, plain, slope * plain))


@pytest.mark.parametrize("bias", [False, True])
def test_gemm(bias: bool) -> None:
    values = {"x": normal(3, 7), "w": normal(4, 7)} | ({"b": normal(4)} if bias else {})
    close(ours("Gemm", values, {})[0], theirs(node("Gemm", " ".join(values), "y", transB=1), values)[0])


def max_pool(x: np.ndarray, attrs: Mapping[str, Any]) -> None:
    """Values and, through ONNX's indices into the whole tensor, which element each came from."""
    attrs = {"ceil_mode": False, **attrs}
    pool = node("MaxPool", "x", "y i", ceil_mode=int(attrs["ceil_mode"]), **onnx_window(attrs, attrs["kernel"]))
    expected, indices = theirs(pool, {"x": x})
    y, argmax = ours("MaxPool", {"x": x}, attrs)
    np.testing.assert_array_equal(y, expected)
    n, c, h, w = np.indices(y.shape)
    rows = h * attrs["strides"][0] - attrs["pads"][0] + argmax // attrs["kernel"][1] * attrs["dilations"][0]
    columns = w * attrs["strides"][1] - attrs["pads"][1] + argmax % attrs["kernel"][1] * attrs["dilations"][1]
    np.testing.assert_array_equal(np.ravel_multi_index((n, c, rows, columns), x.shape), indices)


@pytest.mark.parametrize("name", MAXIMA)
@pytest.mark.parametrize("ties", [False, True])
def test_max_pool(name: str, ties: bool) -> None:
    """With ties, most windows have several maxima: the first in row-major order counts."""
    shape, attrs = MAXIMA[name]
    x = normal(*shape)
    max_pool(np.round(x) if ties else x, attrs)


def test_max_pool_of_a_constant() -> None:
    max_pool(np.full((1, 2, 6, 7), -3, np.float32), {"kernel": (3, 3), **window(2, (1, 1, 1, 1))})


@pytest.mark.parametrize("name", [*POOLS, "ceil", "ceil, last window dropped"])
@pytest.mark.parametrize("include", [False, True])
def test_average_pool(name: str, include: bool) -> None:
    shape, attrs = MAXIMA[name]
    attrs = {"ceil_mode": False, **attrs, "count_include_pad": include}
    options = onnx_window(attrs, attrs["kernel"])
    pool = node("AveragePool", "x", "y", ceil_mode=int(attrs["ceil_mode"]), count_include_pad=int(include), **options)
    close(ours("AveragePool", {"x": normal(*shape)}, attrs)[0], theirs(pool, {"x": normal(*shape)})[0])


@pytest.mark.parametrize("seed", range(30))
def test_random_pools(seed: int) -> None:
    """Ceil mode, pads on one side only, windows wider than strides and the other way round."""
    rng = np.random.default_rng(seed)
    kernel = tuple(rng.integers(1, 4, 2).tolist())
    pads = tuple(int(rng.integers(0, k)) for k in (*kernel, *kernel))
    strides = tuple(rng.integers(1, 4, 2).tolist())
    attrs = {"kernel": kernel, "strides": strides, "dilations": (1, 1), "pads": pads, "ceil_mode": bool(seed % 2)}
    x = np.round(rng.standard_normal((1, 2, *rng.integers(4, 11, 2))) * 2).astype(np.float32)
    max_pool(x, attrs)
    average = {**attrs, "count_include_pad": bool(seed // 2 % 2)}
    options = onnx_window(attrs, kernel) | {"count_include_pad": seed // 2 % 2, "ceil_mode": seed % 2}
    close(ours("AveragePool", {"x": x}, average)[0], theirs(node("AveragePool", "x", "y", **options), {"x": x})[0])


ONNX_NAMES = {
    "Clip",
    "Gelu",
    "GeluTanh",
    "HardSwish",
    "Log",
    "Mish",
    "Power",
    "Silu",
    "Sqrt",
}  # by other attributes, opsets or data


@pytest.mark.parametrize(
    ("kind", "shapes", "attrs"),
    [
        ("GlobalAveragePool", [(2, 3, 5, 4)], {}),
        ("Relu", [(2, 3, 5, 4)], {}),
        ("LeakyRelu", [(2, 3, 5, 4)], {"alpha": 0.125}),
        *((kind, [(2, 3, 5, 4), other], {}) for kind in ("Add", "Sub", "Mul", "Div") for other in FIT),
        *((kind, [(3, 3, 5, 4)], FUNCTION_ATTRS.get(kind, {})) for kind in FUNCTIONS if kind not in ONNX_NAMES),
        ("Identity", [(3, 4)], {}),
        ("Concat", [(2, 3, 5, 4), (2, 1, 5, 4), (2, 6, 5, 4)], {"axis": 1}),
        ("Concat", [(2, 3, 5, 4), (2, 3, 2, 4)], {"axis": 2}),
    ],
)
def test_ops_that_are_onnx_ops(kind: str, shapes: list[tuple[int, ...]], attrs: dict[str, Any]) -> None:
    values = {f"x{i}": normal(*shape, seed=i) for i, shape in enumerate(shapes)}
    close(ours(kind, values, attrs)[0], theirs(node(kind, " ".join(values), "y", **attrs), values)[0])


def test_functions_that_onnx_writes_in_another_way() -> None:
    x = {"x": 4 * normal(2, 3, 5, 4)}
    bounds = {"low": np.array(-0.5, np.float32), "high": np.array(0.8, np.float32)}
    close(ours("Clip", x, {"low": -0.5, "high": 0.8})[0], theirs(node("Clip", "x low high", "y"), x | bounds)[0])
    close(ours("HardSwish", x, {})[0], theirs(node("HardSwish", "x", "y"), x)[0])
    close(ours("Mish", x, {})[0], theirs(node("Mish", "x", "y"), x)[0])
    close(ours("Gelu", x, {})[0], theirs(node("Gelu", "x", "y"), x, opset=20)[0])
    close(ours("GeluTanh", x, {})[0], theirs(node("Gelu", "x", "y", approximate="tanh"), x, opset=20)[0])
    positive = {"x": np.abs(normal(2, 3, 5, 4))}
    for kind in ("Sqrt", "Log"):
        close(ours(kind, positive, {})[0], theirs(node(kind, "x", "y"), positive)[0])
    power = theirs(node("Pow", "x p", "y"), positive | {"p": np.array(0.75, np.float32)})[0]
    close(ours("Power", positive, {"exponent": 0.75})[0], power)
    close(ours("Silu", x, {})[0], x["x"] * theirs(node("Sigmoid", "x", "y"), x)[0])


def test_slice_and_reshape() -> None:
    x = {"x": normal(2, 6, 3, 2)}
    ends = {key: np.array([value], np.int64) for key, value in (("start", 1), ("stop", 4), ("axis", 1))}
    close(
        ours("Slice", x, {"axis": 1, "start": 1, "stop": 4})[0],
        theirs(node("Slice", "x start stop axis", "y"), x | ends)[0],
    )
    shape = {"shape": np.array([2, 36], np.int64)}
    close(ours("Reshape", x, {"shape": (2, 36)})[0], theirs(node("Reshape", "x shape", "y"), x | shape)[0])


def batch_norm_values(x: tuple[int, ...]) -> dict[str, np.ndarray]:
    c = x[1]
    return {
        "x": normal(*x) * 3 + 10,
        "gamma": normal(c, seed=1),
        "beta": normal(c, seed=2),
        "mean": normal(c, seed=3),
        "var": np.abs(normal(c, seed=4)) + 0.5,
    }


def batch_norm(values: Mapping[str, np.ndarray], *, training: bool) -> list[np.ndarray]:
    """Through our chain of ops: y, and in training the new mean and variance."""
    graph, x = Graph("batch norm"), values["x"]
    for name, value in values.items():
        graph.add_tensor(name, value.shape)
    outputs: list[str] = []
    if training:
        count = {"count": x.size // x.shape[1]}
        (sums,) = graph.add("ChannelMoments", ["x"])
        (stats,) = graph.add("BatchStatistics", [sums], attrs={**count, "epsilon": 1e-3})
        running = graph.add("RunningStatistics", [sums, "mean", "var"], attrs={**count, "momentum": 0.8})
        outputs += running
    else:
        count = {"count": 0}
        (stats,) = graph.add("FrozenStatistics", ["mean", "var"], attrs={"epsilon": 1e-3})
    outputs = [*graph.add("Normalize", ["x", stats, "gamma", "beta"], attrs=count), *outputs]
    found = evaluate(graph, values)
    return [found[name] for name in outputs]


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (7, 3), (3, 2, 1, 1)])
@pytest.mark.parametrize("training", [False, True])
def test_batch_normalization(shape: tuple[int, ...], training: bool) -> None:
    values = batch_norm_values(shape)
    outputs = "y m v" if training else "y"
    norm = node(
        "BatchNormalization", " ".join(values), outputs, epsilon=1e-3, momentum=0.8, training_mode=int(training)
    )
    if training and len(shape) == 2:  # which ONNX Runtime refuses
        proto = model([norm], {"x": shape}, ["y", "m", "v"], {k: v for k, v in values.items() if k != "x"})
        expected = ReferenceEvaluator(proto).run(None, {"x": values["x"]})
    else:
        expected = theirs(norm, values)
    for mine, other in zip(batch_norm(values, training=training), expected, strict=True):
        close(mine, other)


def test_moments_do_not_cancel() -> None:
    """A large mean: in float32, E[x^2] - E[x]^2 would have no correct digit."""
    values = batch_norm_values((4, 2, 9, 9)) | {"x": (normal(4, 2, 9, 9) + 3000).astype(np.float32)}
    y, _, variance = batch_norm(values, training=True)
    x64 = values["x"].astype(np.float64)
    np.testing.assert_allclose(variance, 0.8 * values["var"] + 0.2 * x64.var((0, 2, 3)), rtol=1e-4)
    centred = (x64 - x64.mean((0, 2, 3), keepdims=True)) / np.sqrt(x64.var((0, 2, 3), keepdims=True) + 1e-3)
    expected = centred * values["gamma"].reshape(1, -1, 1, 1) + values["beta"].reshape(1, -1, 1, 1)
    np.testing.assert_allclose(y, expected, atol=2e-3)


@pytest.mark.parametrize("shape", [(5, 4), (2, 4, 3, 5)])
def test_cross_entropy(shape: tuple[int, ...]) -> None:
    logits = 5 * normal(*shape)
    target = np.random.default_rng(0).integers(0, 4, (shape[0], *shape[2:])).astype(np.int32)
    (loss,) = ours("CrossEntropy", {"x": logits, "t": target}, {"count": target.size})
    (expected,) = theirs(
        node("SoftmaxCrossEntropyLoss", "x t", "y", reduction="mean"), {"x": logits, "t": target.astype(np.int64)}
    )
    np.testing.assert_allclose(loss, expected.reshape(1), rtol=1e-5)


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    logits, target = np.array([[1e4, -1e4, 0]], np.float32), np.array([1], np.int32)
    assert ours("CrossEntropy", {"x": logits, "t": target}, {"count": 1})[0] == pytest.approx(2e4)
    gradient = ours("CrossEntropyGrad", {"x": logits, "t": target}, {"count": 1})[0]
    np.testing.assert_allclose(gradient, [[1, -1, 0]], atol=1e-6)


def test_mean_squared_error() -> None:
    y, t = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1)
    np.testing.assert_allclose(
        ours("MeanSquaredError", {"x": y, "t": t}, {"count": y.size})[0], [np.mean((y - t) ** 2)], rtol=1e-5
    )


def test_sgd_is_pytorchs() -> None:
    """torch.optim.SGD(lr=0.1, momentum=0.9, weight_decay=0.01), three steps, by its documented recurrence."""
    w, v = normal(3, 4), np.zeros((3, 4), np.float32)
    expected, velocity = w.astype(np.float64), None
    for step in range(3):
        g = normal(3, 4, seed=step + 1)
        decayed = g + 0.01 * expected
        velocity = decayed if velocity is None else 0.9 * velocity + decayed
        expected = expected - 0.1 * velocity
        rate = np.array([0.1], np.float32)
        w, v = ours("SGD", {"w": w, "g": g, "rate": rate, "v": v}, {"momentum": 0.9, "weight_decay": 0.01})
        np.testing.assert_allclose(w, expected, rtol=1e-5, atol=1e-6)
    plain = ours("SGD", {"w": w, "g": w, "rate": rate}, {"momentum": 0.0, "weight_decay": 0.5})
    np.testing.assert_allclose(plain[0], w - 0.1 * 1.5 * w, rtol=1e-5)


# -- dropout ---------------------------------------------------------------------------------------------------------


def dropped(x: np.ndarray, step: int = 1, **attrs: Any) -> np.ndarray:
    options = {"ratio": 0.4, "seed": 1, "site": 0} | attrs
    return ours("Dropout", {"x": x, "step": np.array([step], np.int32)}, options)[0]


def test_dropout_keeps_the_expectation_and_depends_on_seed_site_and_step() -> None:
    x = np.ones((20, 30, 10, 10), np.float32)
    y = dropped(x)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.6)}
    assert y.mean() == pytest.approx(1, abs=0.01)
    for other in (dropped(x, 2), dropped(x, seed=2), dropped(x, site=1)):
        assert 0.35 < np.mean((other > 0) & (y > 0)) < 0.37  # independent: 0.6 squared
    np.testing.assert_array_equal(dropped(x, ratio=0.0), x)


# -- shapes that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shapes", "attrs", "message"),
    [
        ("Conv", [(1, 3, 5, 5), (4, 2, 3, 3)], window(), "does not fit the input"),
        ("Conv", [(1, 3, 2, 5), (4, 3, 3, 3)], window(), "smaller than the window"),
        ("Gemm", [(2, 3), (4, 5)], {}, "does not fit the input"),
        ("Add", [(2, 3), (2, 2)], {}, "do not fit each other"),
        ("Mul", [(2, 3, 4, 4), (4,)], {}, "do not fit each other"),
        ("MaxPool", [(2, 3)], {"kernel": (2, 2), **window(), "ceil_mode": False}, r"\[N,C,H,W\]"),
        ("MaxPool", [(1, 1, 1, 9)], {"kernel": (2, 2), **window(), "ceil_mode": False}, "smaller than the pooling"),
        ("MaxPool", [(1, 1, 40, 40)], {"kernel": (17, 16), **window(), "ceil_mode": False}, "256"),
        ("Concat", [(2, 3, 4, 4), (2, 3, 5, 4)], {"axis": 1}, "differ"),
        ("Reshape", [(2, 6)], {"shape": (3, 4)}, "batch dimension"),
        ("Dropout", [(2, 6), (2,)], {"ratio": 0.5}, "step counter"),
        ("CrossEntropy", [(2, 6), (3,)], {"count": 2}, "does not fit"),
        ("MeanSquaredError", [(2, 6), (2, 5)], {"count": 2}, "must be shaped like"),
        ("CrossEntropy", [(2, 6), (2,), (5,), (1,)], {"count": 2}, "5 class weights"),
        ("Normalize", [(2, 6), (2, 6), (5,), (6,)], {"count": 2}, "has 6 channels"),
    ],
)
def test_shapes_that_do_not_fit(kind: str, shapes: list[tuple[int, ...]], attrs: dict[str, Any], message: str) -> None:
    graph = Graph("bad")
    names = [graph.add_tensor(f"x{i}", shape) for i, shape in enumerate(shapes)]
    with pytest.raises(UserError, match=message):
        graph.add(kind, names, attrs=attrs)
