"""Every rule: the imported graph, evaluated in numpy, gives what ONNX Runtime gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fusetile.errors import UnsupportedOp
from fusetile.graph import Graph
from fusetile.onnx_import import import_onnx
from fusetile.onnx_import.untrained import buffers_of
from fusetile.reference import evaluate
from tests.graphs import feeds
from tests.onnx_tools import for_inference, model, node, normal, run_ort, save
from tests.training import in_float64, planned, run_plan, training_graph, worst

X = {"x": ("N", 3, 9, 11)}


def check(proto: onnx.ModelProto, folder: Path, *, batch: int = 2) -> Graph:
    """Import and compare all outputs with ONNX Runtime's; BatchNormalization is frozen, nothing is dropped."""
    graph = import_onnx(save(proto, folder), batch=batch, bn="frozen", dropout=0.0)
    fed = {name: normal(*graph.tensors[name].shape, seed=7) for name in graph.inputs}
    values, expected = evaluate(graph, fed), run_ort(for_inference(proto), fed)
    assert graph.outputs == list(expected)
    for name, y in expected.items():
        assert values[name].shape == y.shape
        np.testing.assert_allclose(values[name], y, rtol=1e-4, atol=1e-5, err_msg=name)
    return graph


def kinds(graph: Graph) -> list[str]:
    return [op.kind for op in graph.ops.values()]


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


def test_pointwise_and_joins(tmp_path: Path) -> None:
    nodes = [
        node("Relu", "x", "a"),
        node("LeakyRelu", "x", "b", alpha=0.3),
        node("LeakyRelu", "x", "c"),
        node("Add", "a b", "d"),
        node("Add", "c c", "e"),
        node("Concat", "d e x", "f", axis=-3),
        node("Concat", "f", "g", axis=1),
        node("GlobalAveragePool", "g", "y"),
    ]
    check(model(nodes, X, ["y", "f"]), tmp_path)


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", [(), (5,), (1, 5)])
@pytest.mark.parametrize("factors", [{}, {"alpha": 0.5, "beta": 3.0}])
def test_gemm(trans_b: int, bias: tuple[int, ...], factors: dict[str, float], tmp_path: Path) -> None:
    weights = {"w": normal(5, 7) if trans_b else normal(7, 5)} | ({"b": normal(*bias)} if bias else {})
    proto = model(
        [node("Gemm", " ".join(["x", *weights]), "y", transB=trans_b, **factors)], {"x": ("N", 7)}, ["y"], weights
    )
    graph = check(proto, tmp_path)
    assert graph.parameters["w"].value.shape == (5, 7)
    assert graph.parameters["w"].transposed == (not trans_b)


@pytest.mark.parametrize("order", ["z b", "b z"])
def test_mat_mul_and_its_bias_become_one_gemm(order: str, tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "z"), node("Add", order, "y")]
    graph = check(model(nodes, {"x": ("N", 7)}, ["y"], {"w": normal(7, 5), "b": normal(5)}), tmp_path)
    assert kinds(graph) == ["Gemm"] and graph.parameters["b"].trainable


def test_transposed_weights_are_seen_through(tmp_path: Path) -> None:
    nodes = [node("Transpose", "w", "wt"), node("MatMul", "x wt", "z"), node("Gemm", "z wt", "y")]
    graph = check(model(nodes, {"x": ("N", 7)}, ["y"], {"w": normal(7, 7)}), tmp_path)
    assert list(graph.parameters) == ["w"] and not graph.parameters["w"].transposed
    nodes[1] = node("MatMul", "x w", "z")
    with pytest.raises(UnsupportedOp, match="'w' is shared"):
        import_onnx(save(model(nodes, {"x": ("N", 7)}, ["y"], {"w": normal(7, 7)}), tmp_path))


def test_bias_behind_conv(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "z"), node("Add", "z b", "y")]
    graph = check(model(nodes, X, ["y"], {"w": normal(4, 3, 3, 3), "b": normal(1, 4, 1, 1)}), tmp_path)
    assert kinds(graph) == ["Conv"] and graph.parameters["b"].value.shape == (4,)


def test_added_vector_that_is_no_bias_is_an_operand(tmp_path: Path) -> None:
    weights = {"w": normal(7, 5), "b": normal(5)}
    used_twice = [node("MatMul", "x w", "z"), node("Add", "z b", "y"), node("Relu", "z", "y2")]
    graph = check(model(used_twice, {"x": ("N", 7)}, ["y", "y2"], weights), tmp_path)
    assert kinds(graph) == ["Gemm", "Add", "Relu"] and graph.parameters["b"].trainable
    after_relu = [node("MatMul", "x w", "z"), node("Relu", "z", "r"), node("Add", "r b", "y")]
    check(model(after_relu, {"x": ("N", 7)}, ["y"], weights), tmp_path)


@pytest.mark.parametrize("shape", [(11,), (9, 1), (3, 9, 11), (1, 1, 9, 11), (2, 1, 1, 1), (2, 3, 1, 1)])
@pytest.mark.parametrize("order", ["x b", "b x"])
def test_weights_of_any_shape_that_fits(shape: tuple[int, ...], order: str, tmp_path: Path) -> None:
    graph = check(model([node("Sub", order, "y")], X, ["y"], {"b": normal(*shape)}), tmp_path)
    assert graph.parameters["b"].trainable


def test_operands_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOp, match="do not fit"):
        import_onnx(save(model([node("Mul", "x b", "y")], X, ["y"], {"b": normal(2, 1, 1)}), tmp_path))


FUNCTIONS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in ("Abs", "Celu", "Cosh", "Elu", "Erf", "Exp", "HardSigmoid", "HardSwish", "Mish", "Neg")),
    *((kind, {}) for kind in ("Reciprocal", "Selu", "Sigmoid", "Sinh", "Softplus", "Softsign", "Tanh", "Gelu")),
    ("Gelu", {"approximate": "tanh"}),
    ("Elu", {"alpha": 0.5}),
    ("Celu", {"alpha": 0.5}),
    ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}),
    ("Selu", {"alpha": 1.5, "gamma": 1.1}),
]


@pytest.mark.parametrize(("kind", "attrs"), FUNCTIONS)
def test_functions(kind: str, attrs: dict[str, Any], tmp_path: Path) -> None:
    proto = model([node(kind, "x", "y", **attrs)], X, opset=20)
    proto.ir_version = 9
    check(proto, tmp_path)


def test_clip_in_both_forms(tmp_path: Path) -> None:
    check(model([node("Clip", "x", "y", min=-0.5, max=0.25)], X, opset=9), tmp_path)
    bounds = {"low": np.array(-0.5, np.float32), "high": np.array(0.25, np.float32)}
    for inputs in ("x low high", "x low", "x _ high"):
        used = {name: value for name, value in bounds.items() if name in inputs}
        check(model([node("Clip", inputs, "y")], X, weights=used), tmp_path)


@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1), (3, 1, 1), (1, 3, 1, 1)])
@pytest.mark.parametrize("order", ["x c", "c x"])
def test_arithmetic_with_a_number_or_a_weight(kind: str, shape: tuple[int, ...], order: str, tmp_path: Path) -> None:
    value = np.full(shape, 1.5, np.float32) + np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    graph = check(
        model(
            [node("Add", "x two", "x2"), node(kind, order.replace("x", "x2"), "y")],
            X,
            weights={"c": value, "two": np.array(20, np.float32)},
        ),
        tmp_path,
    )
    assert [p.trainable for p in graph.parameters.values()] == [True] * bool(shape)


def test_arithmetic_of_maps_and_gates(tmp_path: Path) -> None:
    """A squeeze-and-excitation gate, swish, and powers."""
    nodes = [
        node("GlobalAveragePool", "x", "p"),
        node("Sigmoid", "p", "gate"),
        node("Mul", "x gate", "a"),
        node("Sigmoid", "a", "s"),
        node("Mul", "a s", "b"),
        node("Sub", "b x", "c"),
        node("Pow", "c two", "d"),
        node("Add", "d one", "e"),
        node("Pow", "e half", "f"),
        node("Div", "c f", "y"),
    ]
    weights = {"two": np.array(2, np.float32), "half": np.array([0.5], np.float32), "one": np.array(1, np.float32)}
    proto = model(nodes, X, weights=weights)
    weights_as_constants(proto, "half")
    check(proto, tmp_path)


def weights_as_constants(proto: onnx.ModelProto, name: str) -> None:
    """Turn an initializer into the output of a Constant node."""
    (tensor,) = (t for t in proto.graph.initializer if t.name == name)
    proto.graph.initializer.remove(tensor)
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], [name], value=tensor))


@pytest.mark.parametrize(
    ("kind", "attrs", "target"),
    [
        ("Flatten", {}, None),
        ("Flatten", {"axis": -3}, None),
        ("Reshape", {}, [0, -1]),
        ("Reshape", {}, [-1, 297]),
        ("Reshape", {"allowzero": 1}, [2, 297]),
        ("Reshape", {}, [0, 0, 9, 11]),
    ],
)
def test_flatten_and_reshape(kind: str, attrs: dict[str, int], target: list[int] | None, tmp_path: Path) -> None:
    weights = {"target": np.array(target)} if target else {}
    check(model([node(kind, " ".join(["x", *weights]), "y", **attrs)], X, weights=weights), tmp_path)


@pytest.mark.parametrize("opset", [11, 13])
def test_squeeze(opset: int, tmp_path: Path) -> None:
    squeeze = node("Squeeze", "p", "y", axes=[2, 3]) if opset < 13 else node("Squeeze", "p axes", "y")
    weights = {"axes": np.array([-1, -2])} if opset >= 13 else {}
    check(model([node("GlobalAveragePool", "x", "p"), squeeze], X, weights=weights, opset=opset), tmp_path)


def norm_model(form: str, opset: int) -> onnx.ModelProto:
    vectors = {
        "gamma": normal(3),
        "beta": normal(3, seed=1),
        "mean": normal(3, seed=2),
        "var": np.abs(normal(3, seed=3)),
    }
    attrs: dict[str, Any] = {"epsilon": 1e-3, "momentum": 0.8}
    if form == "training":
        attrs["training_mode"] = 1
    outputs = "y new_mean new_var" if form == "training" else "y"
    return model(
        [node("BatchNormalization", "x gamma beta mean var", outputs, **attrs)], X, ["y"], vectors, opset=opset
    )


@pytest.mark.parametrize(("form", "opset"), [("inference", 9), ("inference", 15), ("training", 14), ("training", 15)])
def test_batch_normalization_frozen(form: str, opset: int, tmp_path: Path) -> None:
    graph = check(norm_model(form, opset), tmp_path)
    assert kinds(graph) == ["FrozenStatistics", "Normalize"] and not graph.next_value


@pytest.mark.parametrize("form", ["inference", "training"])
def test_batch_normalization_of_the_batch(form: str, tmp_path: Path) -> None:
    graph = import_onnx(save(norm_model(form, 15), tmp_path), batch=2)
    assert [p.trainable for p in graph.parameters.values()] == [True, True, False, False]
    x = normal(2, 3, 9, 11, seed=5)
    values = evaluate(graph, {"x": x})
    training = norm_model("training", 15)
    training.graph.output.extend(onnx.helper.make_tensor_value_info(f"new_{v}", 1, None) for v in ("mean", "var"))
    expected = run_ort(training, {"x": x})
    np.testing.assert_allclose(values["y"], expected["y"], rtol=1e-4, atol=1e-5)
    for name in ("mean", "var"):
        np.testing.assert_allclose(values[graph.next_value[name]], expected[f"new_{name}"], rtol=1e-5)


def test_batch_normalization_needs_two_values_and_its_own_statistics(tmp_path: Path) -> None:
    vectors = {name: np.ones(3, np.float32) for name in ("gamma", "beta")} | {
        "mean": normal(3),
        "var": np.ones(3, np.float32),
    }
    once = node("BatchNormalization", "x gamma beta mean var", "y")
    with pytest.raises(UnsupportedOp, match=r"one value per channel.*--bn frozen"):
        import_onnx(save(model([once], {"x": ("N", 3)}, ["y"], vectors), tmp_path), batch=1)
    twice = [
        node("BatchNormalization", "x gamma beta mean var", "z"),
        node("BatchNormalization", "z gamma beta mean var", "y"),
    ]
    twice[1].attribute.append(onnx.helper.make_attribute("momentum", 0.5))
    path = save(model(twice, {"x": ("N", 3)}, ["y"], vectors), tmp_path)
    with pytest.raises(UnsupportedOp, match="running statistics 'mean', 'var' belong to another node"):
        import_onnx(path, batch=4)
    assert len(import_onnx(path, batch=4, bn="frozen").parameters) == 4


@pytest.mark.parametrize(("opset", "as_input"), [(7, False), (11, False), (13, True)])
def test_dropout(opset: int, as_input: bool, tmp_path: Path) -> None:
    weights = {"ratio": np.float32(0.25)} if as_input else {}
    drop = node("Dropout", "x ratio", "d") if as_input else node("Dropout", "x", "d", ratio=0.25)
    kept = node("Dropout", "d", "e", ratio=0.0) if not as_input else node("Identity", "d", "e")
    last = node("Dropout", "e", "y")
    path = save(model([drop, kept, last], X, ["y"], weights, opset=opset), tmp_path)
    graph = import_onnx(path, seed=5)
    first, second = graph.ops.values()
    assert (first.attrs["ratio"], first.attrs["seed"], first.attrs["site"]) == (0.25, 5, 0)
    assert (second.attrs["ratio"], second.attrs["site"]) == (0.5, 1 if as_input else 2)
    assert graph.controls == {"step": "step"} and second.inputs == ("d", "step")
    assert [op.attrs["ratio"] for op in import_onnx(path, dropout=0.1).ops.values()][:2] == [0.1, 0.1]
    assert kinds(import_onnx(path, dropout=0.0)) == ["Identity"]


def test_an_input_called_step_keeps_its_name(tmp_path: Path) -> None:
    graph = import_onnx(save(model([node("Dropout", "step", "y", ratio=0.5)], {"step": (2, 4)}, opset=7), tmp_path))
    (control,) = graph.controls
    assert graph.inputs == ["step"] and control != "step" and graph.tensors[control].shape == (1,)


def test_argmax_does_not_take_the_name_of_a_later_tensor(tmp_path: Path) -> None:
    nodes = [
        node("MaxPool", "x", "p", kernel_shape=[2, 2]),
        node("Relu", "p", "p.argmax"),
        node("Relu", "p.argmax", "y"),
    ]
    check(model(nodes, X), tmp_path)


def test_several_inputs_and_outputs_in_order_and_identities(tmp_path: Path) -> None:
    nodes = [node("Identity", "b", "b2"), node("Add", "a b2", "s"), node("Identity", "s", "z"), node("Relu", "z", "r")]
    graph = check(model(nodes, {"b": ("N", 4), "a": ("N", 4)}, ["z", "r", "s"]), tmp_path)
    assert graph.inputs == ["b", "a"] and graph.outputs == ["z", "r", "s"]


def test_shared_weights_are_one_parameter(tmp_path: Path) -> None:
    nodes = [node("Identity", "w", "w2"), node("Gemm", "x w", "z", transB=1), node("Gemm", "z w2", "y", transB=1)]
    graph = check(model(nodes, {"x": ("N", 4)}, ["y"], {"w": normal(4, 4)}), tmp_path)
    assert list(graph.parameters) == ["w"]
    nodes[2] = node("Gemm", "z w2", "y", transB=0)
    with pytest.raises(UnsupportedOp, match="'w' is shared with a node that uses it in another way"):
        import_onnx(save(model(nodes, {"x": ("N", 4)}, ["y"], {"w": normal(4, 4)}), tmp_path))


def test_weights_in_constant_nodes_are_not_trained(tmp_path: Path) -> None:
    constant = node("Constant", "", "w", value=onnx.numpy_helper.from_array(normal(4, 3, 1, 1)))
    graph = check(model([constant, node("Conv", "x w", "y")], X), tmp_path)
    assert not graph.parameters["w"].trainable and graph.parameters["w"].onnx_name == ""


def test_buffers_of_common_layers_are_not_trained() -> None:
    """Spectral norm's vectors only beside the weight that they belong to."""
    buffers = {
        "c.weight_u",
        "c.weight_v",
        "d.parametrizations.weight.0._u",
        "a.relative_coords_table",
        "layer1.aa.filt",
    }
    weights = {"c.weight_orig", "d.parametrizations.weight.original", "e.weight_u", "e.filter", "filt.weight"}
    assert buffers_of(buffers | weights) == buffers


def test_initializers_that_are_inputs_too_are_no_data(tmp_path: Path) -> None:
    proto = model([node("Conv", "x w", "y")], {"w": (4, 3, 1, 1), **X}, ["y"], {"w": normal(4, 3, 1, 1)})
    assert import_onnx(save(proto, tmp_path)).inputs == ["x"]


def test_dead_nodes_do_not_matter(tmp_path: Path) -> None:
    graph = check(model([node("Sinh", "x", "dead"), node("Relu", "x", "y")], X), tmp_path)
    assert kinds(graph) == ["Relu"]


@pytest.mark.parametrize(
    ("kind", "operands", "attrs"),
    [
        ("Attention", "x x x", {}),
        ("Attention", "x x x", {"is_causal": 1, "scale": 0.3}),
        ("RMSNormalization", "x s", {"axis": -1}),
        ("Swish", "x", {"alpha": 1.5}),
    ],
)
def test_ops_that_newer_opsets_define_by_others(
    kind: str, operands: str, attrs: dict[str, Any], tmp_path: Path
) -> None:
    weights = {"s": normal(4)} if kind == "RMSNormalization" else {}
    nodes = [node("Relu", "a", "x"), node(kind, operands, "y", **attrs)]
    proto = model(nodes, {"a": (2, 2, 3, 4)}, ["y"], weights, opset=24)
    graph, a = import_onnx(save(proto, tmp_path)), normal(2, 2, 3, 4)
    (expected,) = ReferenceEvaluator(proto).run(None, {"a": a})
    np.testing.assert_allclose(evaluate(graph, {"a": a})["y"], expected, rtol=1e-5, atol=1e-6)
    assert {p.onnx_name for p in graph.parameters.values() if p.trainable} == set(weights)
