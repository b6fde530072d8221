"""Dropout written out as random numbers below a constant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from fusetile.errors import UnsupportedOp
from fusetile.onnx_import import import_onnx
from fusetile.reference import evaluate
from tests.graphs import feeds
from tests.onnx_import.checks import X, check, kinds
from tests.onnx_tools import model, node, normal, save
from tests.training import in_float64, planned, run_plan, training_graph, worst

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


def test_a_rounded_mask_is_a_dropout(tmp_path: Path) -> None:
    """Floor(0.75 + random): so older packages drop the branches of residual blocks."""
    nodes = [
        node("RandomUniform", "", "u", shape=(2, 1, 1, 1)),
        node("Add", "p u", "sum"),
        node("Floor", "sum", "m"),
        node("Div", "x p", "d"),
        node("Mul", "d m", "y"),
    ]
    graph = import_onnx(save(model(nodes, X, weights={"p": np.float32(0.75)}), tmp_path), batch=2)
    (drop,) = (op for op in graph.ops.values() if op.kind == "Dropout")
    assert drop.attrs["ratio"] == pytest.approx(0.25)
    x = normal(2, 3, 9, 11)
    factors = [evaluate(graph, {"x": x, "step": np.array([step], np.int32)})["y"] / x for step in range(8)]
    assert {round(float(value), 4) for factor in factors for value in factor.reshape(-1)} == {0.0, 1.3333}
    nodes[2] = node("Floor", "x", "m")
    with pytest.raises(UnsupportedOp, match="Floor node"):
        import_onnx(save(model(nodes, X, weights={"p": np.float32(0.75)}), tmp_path), batch=2)


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


def test_windows_are_dropped_by_image(tmp_path: Path) -> None:
    """Where the map is stored window by window, as between the blocks of Swin."""
    nodes = [
        node("Reshape", "x windows", "v"),
        node("Conv", "v w", "c"),
        node("Reshape", "c images", "i"),
        node("RandomUniform", "", "u", shape=(2, 1, 1)),
        node("Less", "u p", "m"),
        node("Cast", "m", "f", to=1),
        node("Mul", "i f", "y"),
    ]
    numbers = {"p": np.float32(0.5), "w": np.ones((1, 3, 1, 1), np.float32)}
    shapes = {"windows": np.int64([8, 3, 4, 4]), "images": np.int64([2, -1, 16])}
    path = save(model(nodes, {"x": (2, 12, 4, 4)}, weights=numbers | shapes), tmp_path)
    graph, x = import_onnx(path), np.abs(normal(2, 12, 4, 4)) + 1
    kept = set()
    for step in range(8):
        factors = evaluate(graph, {"x": x, "step": np.array([step], np.int32)})["y"]
        factors = factors / x.reshape(2, 4, 3, 16).sum(2)
        kept |= {tuple(np.unique(factor.round(5)).tolist()) for factor in factors}
    assert kept == {(0.0,), (1.0,)}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("RandomUniformLike", "x", "u"), node("Add", "x u", "y", "n")], "added to a constant number only"),
        ([node("RandomUniformLike", "x", "u"), node("Mul", "x u", "y", "n")], "only the mask of a dropout"),
        (
            [node("RandomUniformLike", "x", "u"), node("Less", "u x", "m", "n"), node("Cast", "m", "y", to=1)],
            "with a constant only",
        ),
        ([node("RandomUniformLike", "x", "y", "n", high=2.0)], "from 0.0 to 2.0"),
    ],
)
def test_other_random_numbers_are_refused(nodes: list[onnx.NodeProto], message: str, tmp_path: Path) -> None:
    path = save(model(nodes, X, weights={"p": np.float32(0.5)}), tmp_path)
    with pytest.raises(UnsupportedOp, match=f"node 'n': .*{message}"):
        import_onnx(path)


def test_choices(tmp_path: Path) -> None:
    """Between maps, a number and a weight, by comparisons of maps: against ONNX Runtime; gradients against finite
    differences; in plans."""
    nodes = [
        node("Conv", "x w", "a"),
        node("Greater", "a low", "m0"),
        node("Less", "a per_channel", "m1"),
        node("And", "m0 m1", "inside"),
        node("Mul", "a a", "square"),
        node("Where", "inside square bias", "b"),
        node("Floor", "high", "f"),
        node("GreaterOrEqual", "b f", "m2"),
        node("LessOrEqual", "b low", "m3"),
        node("Or", "m2 m3", "outside"),
        node("Not", "outside", "m4"),
        node("Where", "m4 b low", "c"),
        node("Relu", "c", "r"),
        node("Equal", "r zero", "dark"),
        node("Where", "dark a c", "d"),
        node("Log", "d", "l"),  # of what is below zero
        node("IsNaN", "l", "bad"),
        node("Where", "bad low d", "y"),
    ]
    weights = {
        "w": normal(4, 3, 2, 2),
        "bias": normal(4, 1, 1, seed=2),
        "per_channel": np.float32([0.5, 1, 2, 3]).reshape(4, 1, 1),
        **{name: np.float32(value) for name, value in (("low", -0.5), ("high", 1.9), ("zero", 0))},
    }
    graph = training_graph(check(model(nodes, {"x": (2, 3, 6, 5)}, ["y"], weights), tmp_path), loss="mse")
    fed, exact, rng = feeds(graph), in_float64(graph), np.random.default_rng(3)
    values = evaluate(exact, fed, exact=True)
    assert set(graph.gradients) == {"w", "bias"}  # numbers are no weights
    for name, gradient in graph.gradients.items():
        direction, step = rng.standard_normal(values[name].shape), 1e-7
        plus, minus = (
            evaluate(exact, {**fed, name: values[name] + sign * step * direction}, exact=True)[graph.loss].item()
            for sign in (1, -1)
        )
        assert (plus - minus) / (2 * step) == pytest.approx((values[gradient] * direction).sum(), rel=1e-4)
    expected = evaluate(graph, fed)
    for plan in ("batch", "channel", "grid:2x1", "random:1"):
        error, where = worst(run_plan(graph, *planned(graph, plan, 2), fed), expected)
        assert error < 1e-5, f"{plan}: {where} is off by {error}"
