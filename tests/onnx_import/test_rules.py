"""Rules of arithmetic, functions, matrices, shapes and weights: the imported graph, evaluated in numpy, gives what ONNX
Runtime gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from fusetile.errors import UnsupportedOp
from fusetile.onnx_import import import_onnx
from fusetile.onnx_import.untrained import buffers_of
from fusetile.reference import evaluate
from tests.onnx_import.checks import X, check, kinds
from tests.onnx_tools import model, node, normal, save


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


def test_constants_may_be_used_in_several_ways(tmp_path: Path) -> None:
    """As an LSTM's first state is."""
    start = node("Constant", "", "c", value=onnx.numpy_helper.from_array(normal(2, 5)))
    nodes = [start, node("MatMul", "c w", "m"), node("Mul", "x c", "p"), node("Add", "p m", "y")]
    check(model(nodes, {"x": (2, 5)}, weights={"w": normal(5, 5)}), tmp_path)


def test_buffers_of_common_layers_are_not_trained() -> None:
    """Spectral norm's vectors only beside the weight that they belong to; masks whatever they are called."""
    buffers = {
        "c.weight_u",
        "c.weight_v",
        "d.parametrizations.weight.0._u",
        "a.relative_coords_table",
        "layer1.aa.filt",
        "mean",
        *(f"f.{part}" for part in ("weight", "bias", "running_mean", "running_var")),
    }
    weights = {"c.weight_orig", "d.parametrizations.weight.original", "e.weight_u", "e.filter", "filt.weight"}
    norm = [f"n.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    nodes = [node("BatchNormalization", " ".join(["x", *norm]), "y")]
    names = {*buffers, *weights, *norm}
    assert buffers_of({name: normal(4, 4) for name in names}, nodes) == buffers
    mask = np.where(np.arange(12).reshape(3, 4) % 3, np.float32(-100), np.float32(0))
    masks = {"low": mask, "lowest": np.where(mask, np.float32(-np.inf), mask)}
    others = {"shift": mask / 2, "row": mask[0], "even": np.full_like(mask, -100), "more": mask + mask[:, :1]}
    assert buffers_of(masks | others, nodes) == masks.keys()


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
