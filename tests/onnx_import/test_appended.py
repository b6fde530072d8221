"""`--loss-model`: a loss that is a file of its own gives what the same loss inside the model gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fusetile.errors import UserError
from fusetile.graph import Graph
from fusetile.onnx_import import import_onnx
from fusetile.passes.differentiate import Criterion, differentiate
from fusetile.reference import evaluate
from tests.graphs import feeds
from tests.onnx_tools import model, node, normal
from tests.training import planned, run_plan, training_graph, worst

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Inputs = dict[str, tuple[int, Sequence[int | str]]]


def network(folder: Path, *outputs: str) -> Path:
    """x [2,3,5,4] -> a convolution to 4 channels per output."""
    nodes = [node("Conv", f"x {name}.w", name) for name in outputs]
    weights = {f"{name}.w": normal(4, 3, 2, 2, seed=i) for i, name in enumerate(outputs)}
    onnx.save(model(nodes, {"x": (2, 3, 5, 4)}, list(outputs), weights), folder / "network.onnx")
    return folder / "network.onnx"


def loss(folder: Path, nodes: Sequence[onnx.NodeProto], inputs: Inputs, **weights: np.ndarray) -> Path:
    """A file whose output is `loss`."""
    values = [helper.make_tensor_value_info(name, *what) for name, what in inputs.items()]
    output = helper.make_tensor_value_info("loss", FLOAT, None)
    output.type.tensor_type.shape.SetInParent()
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "loss", values, [output], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "loss.onnx")
    return folder / "loss.onnx"


MAP = (FLOAT, ("N", 4, 4, 3))
SQUARES = [node("Sub", "p t", "d"), node("Mul", "d d", "q"), node("ReduceMean", "q", "loss", keepdims=0)]
SMOOTH = [
    *(node("Sub", "p t", "d"), node("Abs", "d", "a"), node("Less", "a one", "near"), node("Mul", "d d", "dd")),
    *(node("Mul", "dd half", "q"), node("Sub", "a half", "l"), node("Where", "near q l", "h")),
    node("ReduceMean", "h", "loss", keepdims=0),
]
LABELS = [node("SoftmaxCrossEntropyLoss", "p t", "loss")]


def same_as(graph: Graph, folder: Path, kind: str, outputs: Sequence[str], scale: float = 1.0) -> None:
    """Loss and gradients are those of a loss of fusetile's."""
    other = differentiate(import_onnx(network(folder, *outputs)), Criterion(loss=kind))
    fed = feeds(other)
    expected = evaluate(other, fed)
    values = evaluate(graph, fed | {mine: fed[name] for mine, name in zip(graph.targets, other.targets, strict=True)})
    assert values[graph.loss].item() == pytest.approx(scale * expected[other.loss].item(), rel=1e-5)
    assert set(graph.gradients) == set(other.gradients)
    for name, gradient in graph.gradients.items():
        np.testing.assert_allclose(values[gradient], scale * expected[other.gradients[name]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("nodes", "target", "kind"),
    [(SQUARES, MAP, "mse"), (LABELS, (INT64, ("N", 4, 3)), "cross-entropy")],
)
@pytest.mark.parametrize("name", ["y", "p"])
def test_an_output_by_its_name_or_by_its_place(
    tmp_path: Path, name: str, nodes: list[onnx.NodeProto], target: tuple[int, Sequence[int | str]], kind: str
) -> None:
    """The names of the network's and of the loss's tensors have nothing to do with one another."""
    path = loss(tmp_path, nodes, {"t": target, "p": MAP} if name == "p" else {"p": MAP, "t": target})
    graph = differentiate(import_onnx(network(tmp_path, name), loss=path), Criterion(loss="model"))
    assert list(graph.targets.values()) == ["t"] and "comes 't'" in graph.notes[-1]
    same_as(graph, tmp_path, kind, [name])


def test_a_loss_that_chooses(tmp_path: Path) -> None:
    """As the newer exporter writes smooth L1."""
    path = loss(tmp_path, SMOOTH, {"p": MAP, "t": MAP}, one=np.float32(1), half=np.float32(0.5))
    same_as(
        differentiate(import_onnx(network(tmp_path, "y"), loss=path), Criterion(loss="model")),
        tmp_path,
        "smooth-l1",
        "y",
    )


def test_a_name_that_does_not_fit_is_no_name(tmp_path: Path) -> None:
    """The labels are called `y`, like the network's output."""
    nodes = [node("SoftmaxCrossEntropyLoss", "p y", "loss")]
    path = loss(tmp_path, nodes, {"p": MAP, "y": (INT64, ("N", 4, 3))})
    same_as(
        differentiate(import_onnx(network(tmp_path, "y"), loss=path), Criterion(loss="model")),
        tmp_path,
        "cross-entropy",
        "y",
    )


def test_several_outputs_and_weights_that_are_not_trained(tmp_path: Path) -> None:
    """0.5 times the sum of two losses, in every kind of plan; the network's own tensors have the same names."""
    nodes = [
        *(node("Sub", f"{p} {t}", f"{p}.d") for p, t in (("a", "t"), ("b", "u"))),
        *(node("Mul", f"{p}.d {p}.d", f"{p}.q") for p in "ab"),
        node("Add", "a.q b.q", "both"),
        node("Mul", "both half", "part"),
        node("ReduceMean", "part", "loss", keepdims=0),
    ]
    path = loss(tmp_path, nodes, {"a": MAP, "b": MAP, "t": MAP, "u": MAP}, half=np.full((1, 4, 1, 1), 0.5, np.float32))
    imported = import_onnx(network(tmp_path, "a.q", "half"), loss=path)
    same_as(differentiate(imported, Criterion(loss="model")), tmp_path, "mse", ["a.q", "half"], 0.5)
    graph = training_graph(imported, loss="model")
    fed = feeds(graph)
    expected = evaluate(graph, fed)
    for plan in ("batch", "grid:2x1", "channel", "random:1"):
        error, where = worst(run_plan(graph, *planned(graph, plan, 2), fed), expected)
        assert error < 1e-5, f"{plan}: {where} is off by {error}"


def test_numbers_of_any_layout_make_a_loss(tmp_path: Path) -> None:
    """A number is stored with as many dimensions as what it was made of."""
    nodes = [*SQUARES[:2], *(node("ReduceMean", x, f"{x}.mean", keepdims=0) for x in ("q", "a"))]
    nodes += [node("ReduceSum", "q", "sum", keepdims=0), node("Div", "sum q.mean", "ratio")]
    nodes += [node("Sub", "q.mean a.mean", "less"), node("Add", "less ratio", "loss")]
    path = loss(tmp_path, nodes, {"a": (FLOAT, ("N", 4)), "p": MAP, "t": MAP})
    pooled = [node("GlobalAveragePool", "p", "g"), node("Flatten", "g", "a")]
    proto = model([node("Conv", "x w", "p"), *pooled], {"x": (2, 3, 5, 4)}, ["a", "p"], {"w": normal(4, 3, 2, 2)})
    onnx.save(proto, tmp_path / "network.onnx")
    graph = training_graph(import_onnx(tmp_path / "network.onnx", loss=path), loss="model")
    fed = feeds(graph)
    values = evaluate(graph, fed)
    (target,) = graph.targets
    assert [name for name in graph.parameters if graph.tensors[name].kind == "filter"] == ["w", "w.velocity"]
    squares = (values["p"].astype(float) - fed[target]) ** 2
    assert values[graph.loss].item() == pytest.approx(squares.mean() - values["p"].mean() + squares.size, rel=1e-5)
    gradients = 2 * (values["p"] - fed[target]) / squares.size - 1 / squares.size
    expected = np.stack([np.einsum("nohw,nchw->oc", gradients, fed["x"][:, :, i : i + 4, j : j + 3])
                         for i in range(2) for j in range(2)], axis=-1).reshape(4, 3, 2, 2)  # fmt: skip
    np.testing.assert_allclose(values[graph.gradients["w"]], expected, rtol=1e-3, atol=1e-5)


def test_the_loss_sees_the_input(tmp_path: Path) -> None:
    """Of an autoencoder, there is nothing else in the data."""
    nodes = [node("Slice", "x start stop axes", "t"), *SQUARES]
    ends = {"start": [0, 0, 0], "stop": [3, 4, 3], "axes": [1, 2, 3]}
    constants = {key: np.array(value, np.int64) for key, value in ends.items()}
    path = loss(tmp_path, nodes, {"p": (FLOAT, ("N", 3, 4, 3)), "x": (FLOAT, ("N", 3, 5, 4))}, **constants)
    proto = model([node("Conv", "x w", "p")], {"x": (2, 3, 5, 4)}, ["p"], {"w": normal(3, 3, 2, 2)})
    onnx.save(proto, tmp_path / "network.onnx")
    graph = differentiate(import_onnx(tmp_path / "network.onnx", loss=path), Criterion(loss="model"))
    assert not graph.targets and list(graph.gradients) == ["w"]
    x = normal(2, 3, 5, 4)
    values = evaluate(graph, {"x": x})
    assert values[graph.loss].item() == pytest.approx(np.mean((values["p"] - x[:, :, :4, :3]) ** 2), rel=1e-5)


@pytest.mark.parametrize(
    ("nodes", "inputs", "outputs", "message"),
    [
        (SQUARES, {"p": (FLOAT, ("N", 5, 4, 3)), "t": MAP}, ["z"], r"'p' is to be 'z'.*\(2, 4, 4, 3\); it wants float"),
        (SQUARES, {"p": (INT64, ("N", 4, 4, 3)), "t": MAP}, ["z"], "it wants int64 of shape"),
        (
            [node("ReduceMean", "p", "loss", keepdims=0)],
            {"p": MAP},
            ["y", "z"],
            r"has 1 inputs, and the network 2.*\(y, z",
        ),
        ([*SQUARES[:2], node("Identity", "q", "loss")], {"p": MAP, "t": MAP}, ["y"], "must be one number, not"),
        (SQUARES, {"p": MAP, "t": (FLOAT, ("N", 4, "H", 3))}, ["y"], "'H'"),
        ([node("Hardmax", "p", "loss")], {"p": MAP}, ["y"], "can't train Hardmax"),
    ],
)
def test_losses_that_do_not_fit(
    tmp_path: Path, nodes: list[onnx.NodeProto], inputs: Inputs, outputs: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        import_onnx(network(tmp_path, *outputs), loss=loss(tmp_path, nodes, inputs))
