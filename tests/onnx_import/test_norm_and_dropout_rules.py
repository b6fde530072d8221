"""Rules of BatchNormalization and Dropout, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fusetile.errors import UnsupportedOp
from fusetile.onnx_import import import_onnx
from fusetile.reference import evaluate
from tests.onnx_import.checks import X, check, kinds
from tests.onnx_tools import model, node, normal, run_ort, save


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
