"""Losses: against PyTorch, and in the plans of a small network."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from fusetile.errors import UserError
from fusetile.graph import Graph, Parameter
from fusetile.ops.loss import LOSSES
from fusetile.passes.differentiate import ClassOptions, Criterion, differentiate
from fusetile.reference import evaluate
from tests.graphs import Net, feeds
from tests.training import GRIDS, planned, run_plan, training_graph, worst

WEIGHTS = (0.5, 2.0, 1.0, 0.0, 1.5)
OPTIONS = {
    "plain": ClassOptions(),
    "ignored": ClassOptions(ignore=1),
    "weighted": ClassOptions(weights=WEIGHTS),
    "all": ClassOptions(weights=WEIGHTS, ignore=-100, smoothing=0.1),
}


def loss_and_gradient(loss: str, y: np.ndarray, target: np.ndarray, options: ClassOptions) -> tuple[float, np.ndarray]:
    """What the graph of the loss alone computes."""
    graph = Graph()
    graph.add_tensor("y", y.shape)
    graph.parameters["y"] = Parameter(y, trainable=True)
    graph.outputs = [graph.add("Identity", ["y"], outputs=["out"])[0]]
    graph = differentiate(graph, Criterion(loss=loss, classes=options))
    values = evaluate(graph, {next(iter(graph.targets)): target})
    return float(values[graph.loss][0]), values[graph.gradients["y"]]


def torch_loss(loss: str, y: np.ndarray, target: np.ndarray, options: ClassOptions) -> tuple[float, np.ndarray]:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x = torch.tensor(y, dtype=torch.float64, requires_grad=True)
    names = {"mse": "mse_loss", "l1": "l1_loss", "smooth-l1": "smooth_l1_loss"}
    names |= {"bce-with-logits": "binary_cross_entropy_with_logits"}
    if loss == "dice":
        p, t = torch.sigmoid(x), torch.tensor(target, dtype=torch.float64)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        value = 1 - ((2 * (p * t).sum(axes) + 1) / (p.sum(axes) + t.sum(axes) + 1)).mean()
    elif loss in names:
        value = getattr(functional, names[loss])(x, torch.tensor(target, dtype=torch.float64))
    else:
        more: dict[str, Any] = {"ignore_index": -1 if options.ignore is None else options.ignore}
        if options.weights:
            more["weight"] = torch.tensor(options.weights, dtype=torch.float64)
        if loss == "cross-entropy":
            more["label_smoothing"] = options.smoothing
        kind = {"cross-entropy": "cross_entropy", "nll": "nll_loss"}[loss]
        value = getattr(functional, kind)(x, torch.tensor(target, dtype=torch.int64), **more)
    value.backward()
    return value.item(), x.grad.numpy()


@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 4, 3)])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        *((loss, "plain") for loss in ("mse", "l1", "smooth-l1", "bce-with-logits", "dice")),
        *itertools.product(("cross-entropy",), OPTIONS),
        *itertools.product(("nll",), ("plain", "ignored", "weighted")),
    ],
)
def test_losses_are_pytorchs(loss: str, options: str, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(1)
    y = (2 * random.standard_normal(shape)).astype(np.float32)
    target = random.random(shape, np.float32)
    if loss in ("cross-entropy", "nll"):
        target = random.integers(0, shape[1], (shape[0], *shape[2:])).astype(np.int32)
        target[0] = 1 if OPTIONS[options].ignore is None else OPTIONS[options].ignore
    value, gradient = loss_and_gradient(loss, y, target, OPTIONS[options])
    expected, theirs = torch_loss(loss, y, target, OPTIONS[options])
    assert value == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(gradient, theirs, rtol=1e-5, atol=1e-8)


def network(outputs: int) -> Graph:
    net = Net((4, 3, 9, 8))
    x = net.relu(net.conv(net.x, 10, bias=True))
    return net.done(net.conv(x, 5, stride=2), *([net.conv(x, 3, window=1)] if outputs == 2 else []))


def loss_in_the_model() -> Graph:
    """The mean of squares, as a model says it: the loss is its first output."""
    net = Net((1, 3, 9, 8))
    x = net.conv(net.relu(net.conv(net.x, 10, bias=True)), 1)
    return net.done(net.global_pool(net.mul(x, x)), x)


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("loss", ["l1", "smooth-l1", "bce-with-logits", "dice", "nll", "cross-entropy"])
def test_losses_in_every_plan(loss: str, nodes: int) -> None:
    """Two outputs, whose losses add up; or one, with weights and labels that do not count."""
    options = OPTIONS["all"] if loss == "cross-entropy" else ClassOptions()
    graph = training_graph(network(1 if options.weights else 2), loss=loss, classes=options)
    fed = feeds(graph)
    if options.weights:
        fed["y"][:2] = -100
    expected = evaluate(graph, fed)
    for plan in ("batch", "channel", *GRIDS[nodes], "random:1", *(["auto"] if nodes == 3 else [])):
        error, where = worst(run_plan(graph, *planned(graph, plan, nodes), fed), expected)
        assert error < 1e-5, f"{plan}: {where} is off by {error}"


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 6])
def test_a_loss_in_the_model(nodes: int) -> None:
    """It equals mse with a target of zero."""
    graph = training_graph(loss_in_the_model(), loss="model")
    other = loss_in_the_model()
    other.outputs = other.outputs[1:]
    other = training_graph(other, loss="mse")
    fed = feeds(graph)
    expected = evaluate(graph, fed)
    same = evaluate(other, fed | {"y": np.zeros((1, 1, 9, 8), np.float32)})
    assert expected[graph.loss].item() == pytest.approx(same[other.loss].item(), rel=1e-5)
    for name, gradient in graph.gradients.items():
        np.testing.assert_allclose(expected[gradient], same[other.gradients[name]], rtol=1e-4, atol=1e-6)
    for plan in ("batch", *GRIDS[nodes], "random:1", *(["auto"] if nodes == 3 else [])):
        error, where = worst(run_plan(graph, *planned(graph, plan, nodes), fed), expected)
        assert error < 1e-5, f"{plan}: {where} is off by {error}"


@pytest.mark.parametrize("loss", [*LOSSES, "dice"])
def test_losses_of_two_outputs_have_weights(loss: str) -> None:
    """The gradient of each output is its own loss's, times the weight."""
    graph = differentiate(network(2), Criterion(loss=loss, weights=(0.5, 3.0)))
    fed = feeds(graph)
    values = evaluate(graph, fed, exact=True)
    alone = {}
    for i, weight in enumerate((0.5, 3.0)):
        one = network(2)
        output = one.outputs = one.outputs[i : i + 1]
        one = differentiate(one, Criterion(loss=loss))
        found = evaluate(one, {"x": fed["x"], "y": fed[f"y{i}"]}, exact=True)
        alone[output[0]] = weight * found[one.loss][0]
        weights = one.producers()[output[0]].inputs[1]
        np.testing.assert_allclose(
            values[graph.gradients[weights]], weight * found[one.gradients[weights]], rtol=1e-6, atol=1e-12
        )
    assert values[graph.loss][0] == pytest.approx(sum(alone.values()))


def test_a_loss_op_within_a_larger_loss() -> None:
    """Half of a mean squared error, plus another: gradients are those of the parts, scaled."""
    graph = Graph()
    random = np.random.default_rng(0)
    y, t = (random.standard_normal((4, 3)).astype(np.float32) for _ in range(2))
    graph.add_parameter("y", Parameter(y, trainable=True))
    graph.inputs = [graph.add_tensor("t", t.shape)]
    (mse,) = graph.add("MeanSquaredError", ["y", "t"], attrs={"count": y.size})
    (half,) = graph.add("Scale", [mse], attrs={"factor": 0.5})
    (l1,) = graph.add("MeanAbsoluteError", ["y", "t"], attrs={"count": y.size})
    graph.outputs = [*graph.add("Add", [half, l1])]
    graph = differentiate(graph, Criterion(loss="model"))
    values = evaluate(graph, {"t": t})
    np.testing.assert_allclose(values[graph.gradients["y"]], ((y - t) + np.sign(y - t)) / y.size, rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("mse", OPTIONS["ignored"], "has no classes"),
        ("nll", OPTIONS["all"], "needs --loss cross-entropy"),
        ("cross-entropy", ClassOptions(weights=(1.0, 2.0)), "2 numbers for the 5 classes"),
        ("model", ClassOptions(), "must be one number"),
        ("hinge", ClassOptions(), "choose one of"),
    ],
)
def test_losses_that_do_not_fit(loss: str, options: ClassOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        differentiate(network(1), Criterion(loss=loss, classes=options))


def test_weights_that_do_not_fit() -> None:
    for loss, message in (("mse", "1 numbers for the losses of 2"), ("model", "a loss that is in the model")):
        with pytest.raises(UserError, match=message):
            differentiate(network(2), Criterion(loss=loss, weights=(1.0,)))
