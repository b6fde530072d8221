"""Batch binding, shape arithmetic, and what is never folded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from fusetile.errors import UnsupportedOp, UserError
from fusetile.onnx_import import import_onnx
from fusetile.passes.differentiate import Criterion, differentiate
from tests.onnx_import.checks import check, kinds
from tests.onnx_tools import model, node, normal, save


@pytest.mark.parametrize("dynamic", ["N", None, -1, 0])
def test_dynamic_batch_is_bound(dynamic: int | str | None, tmp_path: Path) -> None:
    path = save(model([node("Relu", "x", "y")], {"x": (dynamic, 3)}), tmp_path)
    assert import_onnx(path, batch=5).tensors["y"].shape == (5, 3)
    assert import_onnx(path).tensors["y"].shape == (1, 3)


def test_static_batch_is_the_default_and_can_be_rebound(tmp_path: Path) -> None:
    path = save(model([node("Relu", "x", "y")], {"x": (4, 3)}), tmp_path)
    assert import_onnx(path).tensors["y"].shape == (4, 3)
    assert import_onnx(path, batch=2).tensors["y"].shape == (2, 3)


@pytest.mark.parametrize("target", [[4, -1], [4, 12], [-1, 12], [0, 12]])
def test_reshape_follows_a_rebound_batch(target: list[int], tmp_path: Path) -> None:
    proto = model([node("Reshape", "x t", "y")], {"x": (4, 3, 2, 2)}, weights={"t": np.array(target)})
    assert import_onnx(save(proto, tmp_path), batch=2).tensors["y"].shape == (2, 12)


@pytest.mark.parametrize("target", [[1, -1], [1, 12], [1, 3, 4], [3, 4]])
def test_batch_of_one_baked_into_a_reshape_of_a_dynamic_model(target: list[int], tmp_path: Path) -> None:
    proto = model([node("Reshape", "x t", "y", "view")], {"x": ("N", 3, 2, 2)}, weights={"t": np.array(target)})
    assert import_onnx(save(proto, tmp_path), batch=2).tensors["y"].shape[0] == 2 * target[0]


@pytest.mark.parametrize("target", [[1, -1, 2, 1], [-1, 6, 2, 1]])
def test_maps_of_weights_have_one_image_whatever_the_batch(target: list[int], tmp_path: Path) -> None:
    nodes = [node("Relu", "w", "r"), node("Reshape", "r t", "p"), node("Add", "x p", "y")]
    weights = {"w": normal(1, 3, 2, 2), "t": np.array(target)}
    graph = import_onnx(save(model(nodes, {"x": ("N", 6, 2, 3)}, weights=weights), tmp_path), batch=2)
    assert graph.tensors["y"].shape == (2, 6, 2, 3)


def test_reshapes_that_mix_the_batch_are_refused(tmp_path: Path) -> None:
    for target in ([5, -1], [-1, 8]):
        proto = model([node("Reshape", "x t", "y", "view")], {"x": ("N", 3, 2, 2)}, weights={"t": np.array(target)})
        with pytest.raises(UnsupportedOp, match=r"Reshape node 'view'.*\(2, 3, 2, 2\) into .*--batch"):
            import_onnx(save(proto, tmp_path), batch=2)


def test_batch_errors(tmp_path: Path) -> None:
    two = {"a": (4, 3), "b": (2, 3)}
    with pytest.raises(UserError, match=r"inputs differ in it: \{'a': 4, 'b': 2\}"):
        import_onnx(save(model([node("Concat", "a b", "y", axis=1)], two), tmp_path))
    with pytest.raises(UserError, match="at least 1, not 0"):
        import_onnx(save(model([node("Relu", "x", "y")], {"x": ("N", 3)}), tmp_path), batch=0)
    with pytest.raises(UserError, match=r"input 'x' has the dynamic dimensions 'height' \(dimension 2\), '\?' \(dim"):
        import_onnx(save(model([node("Relu", "x", "y")], {"x": ("N", 3, "height", None)}), tmp_path))


def test_shape_arithmetic_is_folded(tmp_path: Path) -> None:
    def scalar(value: int) -> onnx.TensorProto:
        return numpy_helper.from_array(np.array(value))

    nodes = [
        node("Shape", "x", "shape"),
        node("Constant", "", "zero", value=scalar(0)),
        node("Gather", "shape zero", "n"),
        node("Unsqueeze", "n", "n1", axes=[0]),
        node("Slice", "shape", "chw", starts=[1], ends=[4]),
        node("ReduceProd", "chw", "f", axes=[0]),
        node("ConstantOfShape", "one", "minus", value=helper.make_tensor("v", 7, [1], [-1])),
        node("Mul", "f minus", "negative"),
        node("Mul", "negative minus", "features"),
        node("Cast", "features", "features64", to=7),
        node("Concat", "n1 features64", "target", axis=0),
        node("Reshape", "x target", "y"),
    ]
    proto = model(nodes, {"x": ("N", 3, 2, 5)}, weights={"one": np.array([1])}, opset=9)
    graph = check(proto, tmp_path, batch=3)
    assert kinds(graph) == ["Reshape"] and graph.tensors["y"].shape == (3, 30)


def test_what_depends_on_weights_is_not_folded(tmp_path: Path) -> None:
    nodes = [node("Mul", "w w", "w2", "square"), node("Conv", "x w2", "y")]
    proto = model(nodes, {"x": ("N", 3, 2, 2)}, weights={"w": normal(4, 3, 1, 1)})
    graph = check(proto, tmp_path)
    assert kinds(graph) == ["Mul", "Rearrange", "FilterOf", "Conv"] and graph.parameters["w"].trainable
    graph = differentiate(graph, Criterion(loss="mse"))
    assert set(graph.gradients) == {"w"}


def test_random_constants_are_not_folded(tmp_path: Path) -> None:
    nodes = [node("RandomNormal", "", "r", shape=[1, 3]), node("Add", "x r", "y")]
    with pytest.raises(UnsupportedOp, match="RandomNormal"):
        import_onnx(save(model(nodes, {"x": (1, 3)}), tmp_path))
