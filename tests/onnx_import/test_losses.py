"""Losses inside a model: `--loss model` gives what the same loss gives from outside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fusetile.errors import UserError
from fusetile.graph import Graph
from fusetile.onnx_import import import_onnx
from fusetile.passes.differentiate import ClassOptions, Criterion, differentiate
from fusetile.reference import evaluate
from tests.graphs import feeds
from tests.training import planned, run_plan, training_graph, worst

N, C = 4, 5
WEIGHTS = np.array([0.5, 2, 1, 0, 1.5], np.float32)


def build(*tail: onnx.NodeProto, target: onnx.ValueInfoProto | None = None, output: str = "loss") -> onnx.ModelProto:
    """x [N,3,6,6] -> Conv -> GlobalAveragePool -> Flatten -> z [N,C], and what follows."""
    random = np.random.default_rng(0)
    w = numpy_helper.from_array(random.standard_normal((C, 3, 3, 3)).astype(np.float32), "w")
    head = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["z"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [N, 3, 6, 6]), *([target] if target else [])]
    shape = [] if output == "loss" else [N, C]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)]
    constants = [w, numpy_helper.from_array(WEIGHTS, "weights")] if any("weights" in n.input for n in tail) else [w]
    graph = helper.make_graph([*head, *tail], "m", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def imported(folder: Path, model: onnx.ModelProto) -> Graph:
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "m.onnx")
    return import_onnx(folder / "m.onnx")


def labels(*shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("t", TensorProto.INT64, shape)


CROSS = helper.make_node("SoftmaxCrossEntropyLoss", ["z", "t"], ["loss"])
IGNORING = helper.make_node("SoftmaxCrossEntropyLoss", ["z", "t", "weights"], ["loss"], ignore_index=-100)
NLL = (
    helper.make_node("LogSoftmax", ["z"], ["l"], axis=1),
    helper.make_node("NegativeLogLikelihoodLoss", ["l", "t"], ["loss"], ignore_index=2),
)
MSE = (
    helper.make_node("Sub", ["z", "t"], ["d"]),
    helper.make_node("Mul", ["d", "d"], ["q"]),
    helper.make_node("ReduceMean", ["q"], ["loss"], keepdims=0),
)
SHAPED = (  # newer exporters read the batch from the labels
    helper.make_node("Shape", ["t"], ["n"]),
    helper.make_node("Constant", [], ["c"], value_ints=[C]),
    helper.make_node("Concat", ["n", "c"], ["nc"], axis=0),
    helper.make_node("Reshape", ["z", "nc"], ["v"]),
    helper.make_node("SoftmaxCrossEntropyLoss", ["v", "t"], ["loss"]),
)
OUTSIDE = {
    "cross-entropy": ((CROSS,), "cross-entropy", ClassOptions()),
    "shaped like the labels": (SHAPED, "cross-entropy", ClassOptions()),
    "weighted": ((IGNORING,), "cross-entropy", ClassOptions(weights=tuple(WEIGHTS.tolist()), ignore=-100)),
    "nll": (NLL, "cross-entropy", ClassOptions(ignore=2)),
    "mse": (MSE, "mse", ClassOptions()),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_loss_of_the_model_is_that_from_outside(tmp_path: Path, name: str) -> None:
    tail, loss, options = OUTSIDE[name]
    plain = differentiate(imported(tmp_path, build(output="z")), Criterion(loss=loss, classes=options))
    fed = feeds(plain)
    if options.ignore is not None:
        fed["y"][0] = options.ignore
    expected = evaluate(plain, fed)
    target = helper.make_tensor_value_info("t", TensorProto.FLOAT, [N, C]) if loss == "mse" else labels(N)
    graph = training_graph(imported(tmp_path, build(*tail, target=target)), loss="model")
    fed = {"x": fed["x"], "t": fed["y"], **{control: np.float32([0.1]) for control in graph.controls}}
    values = evaluate(graph, fed)
    assert values[graph.loss].item() == pytest.approx(expected[plain.loss].item(), rel=1e-5)
    np.testing.assert_allclose(values[graph.gradients["w"]], expected[plain.gradients["w"]], rtol=1e-4, atol=1e-6)
    for plan, nodes in (("batch", 3), ("grid:2x1", 2), ("random:1", 3)):
        error, where = worst(run_plan(graph, *planned(graph, plan, nodes), fed), values)
        assert error < 1e-5, f"{plan}: {where} is off by {error}"


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("SoftmaxCrossEntropyLoss", ["z", "t"], ["loss"], reduction="none"), "reduction 'none'"),
        (helper.make_node("SoftmaxCrossEntropyLoss", ["z", "t"], ["loss", "p"]), "its output 'p' is used"),
    ],
)
def test_forms_that_are_not_supported(tmp_path: Path, node: onnx.NodeProto, message: str) -> None:
    model = build(node, target=labels(N))
    if "none" in message:
        del model.graph.output[0].type.tensor_type.shape.dim[:]
        model.graph.output[0].type.tensor_type.shape.dim.add().dim_value = N
    else:
        model.graph.output.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, [N, C]))
    with pytest.raises(UserError, match=message):
        imported(tmp_path, model)
