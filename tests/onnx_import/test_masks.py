"""Dropout written out as random numbers below a constant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from fusetile.errors import UnsupportedOp
from fusetile.onnx_import import import_onnx
from fusetile.reference import evaluate
from tests.onnx_import.test_rules import X, kinds
from tests.onnx_tools import model, node, normal, save

STEP = {"step": np.array([3], np.int32)}


def test_a_written_out_dropout_is_one(tmp_path: Path) -> None:
    nodes = [
        node("RandomUniformLike", "x", "u"),
        node("Greater", "u p", "m"),
        node("Cast", "m", "f", to=1),
        node("Mul", "f x", "d"),
        node("Mul", "d s", "y"),
    ]
    numbers = {"p": np.float32(0.25), "s": np.float32(1 / 0.75)}
    graph = import_onnx(save(model(nodes, X, weights=numbers), tmp_path), batch=2)
    (drop,) = (op for op in graph.ops.values() if op.kind == "Dropout")
    assert drop.attrs["ratio"] == pytest.approx(0.25) and "Clip" not in kinds(graph)
    x = normal(2, 3, 9, 11)
    y = evaluate(graph, {"x": x} | STEP)["y"]
    assert 0.1 < (y == 0).mean() < 0.4
    np.testing.assert_allclose(y[y != 0], (x / 0.75)[y != 0], rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 1, 1, 1)])
def test_whole_channels_or_images_are_dropped(shape: tuple[int, ...], tmp_path: Path) -> None:
    nodes = [
        node("RandomUniform", "", "u", shape=shape),
        node("Less", "u p", "m"),
        node("Cast", "m", "f", to=1),
        node("Div", "f p", "g"),
        node("Mul", "x g", "y"),
    ]
    graph = import_onnx(save(model(nodes, X, weights={"p": np.float32(0.5)}), tmp_path), batch=2)
    x = np.abs(normal(2, 3, 9, 11)) + 1
    dropped = set()
    for step in range(8):
        factor = evaluate(graph, {"x": x, "step": np.array([step], np.int32)})["y"] / x
        np.testing.assert_allclose(factor, np.broadcast_to(factor[:, : shape[1], :1, :1], x.shape), rtol=1e-6)
        dropped |= set(np.round(factor, 5).reshape(-1).tolist())
    assert dropped == {0.0, 2.0}
    whole = import_onnx(save(model(nodes, X, weights={"p": np.float32(0.5)}), tmp_path), batch=2, dropout=0.0)
    np.testing.assert_allclose(evaluate(whole, {"x": x})["y"], x, rtol=1e-6)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("RandomUniformLike", "x", "u"), node("Add", "x u", "y", "n")], "its input 'u' is random"),
        ([node("RandomUniformLike", "x", "u"), node("Mul", "x u", "y", "n")], "only the mask of a dropout"),
        ([node("Less", "x p", "m", "n"), node("Cast", "m", "y", to=1)], "only random numbers"),
        ([node("RandomUniformLike", "x", "y", "n", high=2.0)], "from 0.0 to 2.0"),
    ],
)
def test_other_random_numbers_are_refused(nodes: list[onnx.NodeProto], message: str, tmp_path: Path) -> None:
    path = save(model(nodes, X, weights={"p": np.float32(0.5)}), tmp_path)
    with pytest.raises(UnsupportedOp, match=f"node 'n': .*{message}"):
        import_onnx(path)
