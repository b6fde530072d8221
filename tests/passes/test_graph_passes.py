"""Passes from graph to graph: what they make of a small network, and that no result changes."""

from __future__ import annotations

import numpy as np
import pytest

from fusetile.errors import UserError
from fusetile.graph import BACKWARD, FORWARD, UPDATE, Graph, Parameter
from fusetile.ops.functions import FUSED_NAMES, compute, fused_gradient
from fusetile.passes.add_optimizer import Optimizer, add_optimizer
from fusetile.passes.differentiate import Criterion, differentiate
from fusetile.passes.fuse import fuse
from fusetile.passes.prune import prune
from fusetile.passes.rematerialize import cheap, rematerialize
from fusetile.reference import evaluate
from fusetile.trace import as_text
from tests.graphs import Net, feeds
from tests.passes.golden import assert_golden, small
from tests.random_graphs import random_graph
from tests.training import loss_of, training_graph

SEEDS = range(50)


def snapshot(graph: Graph) -> tuple[str, tuple[object, ...]]:
    """Everything that a pass could change in a graph that it was given."""
    loose = (graph.inputs, graph.outputs, graph.targets, graph.controls, graph.next_value, graph.gradients, graph.loss)
    layers = [(op.name, op.layer, op.origin) for op in graph.ops.values()]
    return as_text(graph), (repr(loose), sorted(graph.tensors), sorted(graph.parameters), layers)


def results(graph: Graph, fed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Loss, outputs, gradients by parameter and next values by parameter, in float64."""
    values = evaluate(graph, fed, exact=True)
    found = {"loss": values[graph.loss]}
    found |= {f"output {i}": values[name] for i, name in enumerate(graph.outputs)}
    found |= {f"gradient of {name}": values[gradient] for name, gradient in graph.gradients.items()}
    return found | {f"next {name}": values[new] for name, new in graph.next_value.items()}


def test_ties_of_the_order_are_broken_by_age() -> None:
    net = Net((1, 2, 4, 4))
    first, second = net.relu(net.x), net.conv(net.x, 2)
    graph = net.done(net.add(net.relu(second), first))
    expected = list(graph.ops)
    assert [op.name for op in graph.topological()] == expected
    last = expected[-1]
    graph.ops = {name: graph.ops[name] for name in (last, *expected[:-1])}
    assert list(graph.sorted().ops) == expected, "a producer comes before its readers, else the older op first"


def assert_same(before: Graph, after: Graph) -> None:
    fed = feeds(before)
    one, other = results(before, fed), results(after, {n: v for n, v in fed.items() if n in after.tensors})
    assert set(one) == set(other)
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-9, atol=1e-11, err_msg=name)


def assert_in_order(graph: Graph) -> None:
    """Every op behind what it reads, and every layer an op of the graph."""
    known = {*graph.fed(), *graph.parameters}
    forward = {op.name for op in graph.ops.values() if op.phase == FORWARD}
    for op in graph.ops.values():
        assert set(op.inputs) <= known, op.name
        known |= set(op.outputs)
        assert op.layer in forward if op.phase == BACKWARD else op.layer == op.name or op.phase == UPDATE
    assert known == set(graph.tensors)
    assert graph.kept() <= known


def differentiated(graph: Graph) -> Graph:
    return add_optimizer(
        differentiate(graph, Criterion(loss=loss_of(graph))), Optimizer(momentum=0.9, weight_decay=1e-3)
    )


# -- differentiate ---------------------------------------------------------------------------------------------------


def test_differentiate_golden() -> None:
    assert_golden("differentiate", as_text(differentiate(small(), Criterion(loss="cross-entropy"))))


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_are_those_of_finite_differences(seed: int) -> None:
    """Of all parameters together, along one random direction; twice where a kink may lie between."""
    graph = random_graph(seed)
    graph = differentiate(graph, Criterion(loss=loss_of(graph)))
    fed = feeds(graph)
    values = evaluate(graph, fed, exact=True)
    rng = np.random.default_rng(seed)
    errors = []
    for step in (1e-6, 1e-8):
        directions = {name: rng.standard_normal(values[name].shape) for name in graph.gradients}
        moved = [
            {name: values[name] + sign * step * direction for name, direction in directions.items()} for sign in (1, -1)
        ]
        plus, minus = (evaluate(graph, fed | some, exact=True)[graph.loss][0] for some in moved)
        expected = sum((values[graph.gradients[name]] * d).sum() for name, d in directions.items())
        errors.append(abs((plus - minus) / (2 * step) - expected) / max(1, abs(expected)))
    assert min(errors) < 1e-5


def test_differentiate_leaves_the_forward_graph_alone() -> None:
    graph = small()
    before = snapshot(graph)
    after = differentiate(graph, Criterion(loss="cross-entropy"))
    assert snapshot(graph) == before
    assert [op for op in after.ops.values() if op.phase == FORWARD][: len(graph.ops)] == list(graph.ops.values())
    assert set(after.gradients) == {name for name, p in graph.parameters.items() if p.trainable}


def test_frozen_parameters_get_no_gradient_and_nothing_below_them_is_differentiated() -> None:
    net = Net((1, 2, 5, 5))
    frozen = net.conv(net.x, 3)
    graph = net.done(net.conv(net.relu(frozen), 2))
    graph.parameters["w0"] = Parameter(graph.parameters["w0"].value, trainable=False)
    after = differentiate(graph, Criterion(loss="mse"))
    assert list(after.gradients) == ["w2"]
    assert [op.kind for op in after.ops.values() if op.phase == BACKWARD].count("ConvWeightGrad") == 1


def test_a_parameter_that_does_not_reach_the_loss_gets_no_gradient() -> None:
    net = Net((1, 2, 5, 5))
    net.conv(net.x, 3)
    graph = net.done(net.conv(net.x, 2))
    assert list(differentiate(graph, Criterion(loss="mse")).gradients) == ["w1"]


def test_errors_of_differentiate() -> None:
    with pytest.raises(UserError, match=r"unknown loss 'hinge'.*cross-entropy.*mse"):
        differentiate(small(), Criterion(loss="hinge"))
    net = Net((1, 2, 5, 5))
    with pytest.raises(UserError, match="nothing to train"):
        differentiate(net.done(net.relu(net.x)), Criterion(loss="mse"))
    vector = Net((2, 3))
    w = vector.gemm(vector.x, 2)
    vector.graph.tensors[w] = type(vector.graph.tensors[w])(w, (2,))
    with pytest.raises(UserError, match=r"needs an output \[N,C\]"):
        differentiate(vector.done(w), Criterion(loss="cross-entropy"))


# -- add_optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_add_optimizer_golden(momentum: float) -> None:
    graph = add_optimizer(
        differentiate(small(), Criterion(loss="cross-entropy")), Optimizer(momentum=momentum, weight_decay=0.01)
    )
    updates = [line for line in as_text(graph).splitlines() if line.startswith(UPDATE)]
    names = ("add_optimizer", "add_optimizer_momentum")
    assert_golden(names[momentum > 0], "\n".join(updates) + "\n")


def test_momentum_has_state_that_starts_at_zero() -> None:
    graph = add_optimizer(
        differentiate(small(), Criterion(loss="cross-entropy")), Optimizer(momentum=0.5, weight_decay=0.0)
    )
    state = {name: p for name, p in graph.parameters.items() if name.endswith(".velocity")}
    assert len(state) == len(graph.gradients) == 3
    assert all(not p.value.any() and not p.trainable and p.onnx_name == "" for p in state.values())
    assert set(graph.next_value) == {*graph.gradients, *state}


# -- prune -----------------------------------------------------------------------------------------------------------


def with_waste() -> Graph:
    """Identities (one of them an output), a branch that nobody reads, a weight that nobody needs."""
    net = Net((2, 3, 6, 6))
    x = net._op("Identity", net.conv(net.x, 4))
    net.relu(net.conv(x, 5))
    return net.done(net._op("Identity", net.conv(net._op("Identity", x), 2)))


def test_prune_golden() -> None:
    assert_golden("prune", as_text(prune(differentiated(with_waste()))))


def test_prune_removes_what_nobody_needs() -> None:
    graph = prune(differentiated(with_waste()))
    kinds = [op.kind for op in graph.ops.values()]
    assert kinds.count("Conv") == 2 and kinds.count("ConvInputGrad") == 1 and kinds.count("Identity") == 1
    assert "w2" not in graph.parameters and "w2" not in graph.tensors


@pytest.mark.parametrize("seed", SEEDS)
def test_prune_changes_no_result(seed: int) -> None:
    graph = differentiated(random_graph(seed))
    before = snapshot(graph)
    after = prune(graph)
    assert snapshot(graph) == before
    assert_same(graph, after)
    assert_in_order(after)
    assert snapshot(prune(after)) == snapshot(after)


# -- fuse ------------------------------------------------------------------------------------------------------------


def test_fuse_golden() -> None:
    net = Net((2, 3, 6, 6))
    x = net.relu(net.batch_norm(net.conv(net.x, 4)))
    x = net.leaky(net.conv(x, 5, bias=True), alpha=0.2)
    graph = prune(differentiated(net.done(net.relu(net.gemm(net.flatten(x), 3)))))
    assert_golden("fuse", as_text(fuse(graph)))


def test_an_activation_stays_where_its_input_is_read_elsewhere() -> None:
    net = Net((2, 3, 6, 6))
    z = net.conv(net.x, 4)
    after = fuse(prune(differentiated(net.done(net.add(net.relu(z), z)))))
    assert [op.kind for op in after.ops.values() if op.phase == FORWARD][:2] == ["Conv", "Relu"]
    kept = Net((2, 3, 6, 6))
    z = kept.conv(kept.x, 4)
    kept.relu(z)
    after = fuse(prune(differentiated(kept.done(z))))
    assert "Relu" not in [op.kind for op in after.ops.values()] and after.outputs == [z]
    both = Net((2, 3, 6, 6))
    z = both.conv(both.x, 4)
    after = fuse(prune(differentiated(both.done(z, both.relu(z)))))
    assert "Relu" in [op.kind for op in after.ops.values()]


FUNCTIONS = {kind: {} for kind in FUSED_NAMES} | {
    "Celu": {"alpha": 0.7},
    "Clip": {"low": -0.2, "high": 0.9},
    "Elu": {"alpha": 0.7},
    "HardSigmoid": {"alpha": 0.3, "beta": 0.4},
    "LeakyRelu": {"alpha": -0.3},
    "Selu": {"alpha": 1.67, "gamma": 1.05},
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_normalization_takes_any_function_and_its_gradient(kind: str) -> None:
    net = Net((3, 3, 4, 4))
    x = net.function(kind, net.batch_norm(net.conv(net.x, 5)), **FUNCTIONS[kind])
    graph = prune(differentiated(net.done(net.conv(x, 2))))
    after = fuse(graph)
    assert_same(graph, after)
    assert {kind, f"{kind}Grad"} <= {op.kind for op in graph.ops.values()}
    assert not {kind, f"{kind}Grad"} & {op.kind for op in after.ops.values()}
    if kind in FUSED_NAMES:  # lanes that fill up a block have zeros everywhere, and stay zero
        zero = np.zeros(1)
        assert compute(fused_gradient(FUSED_NAMES[kind]), FUNCTIONS[kind], [zero, zero])[0] == 0


def test_a_function_that_nothing_can_compute_again_stays_if_its_gradient_reads_its_input() -> None:
    for kind, stays in (("HardSwish", True), ("Sigmoid", False)):
        net = Net((3, 3, 4, 4))
        x = net.function(kind, net.batch_norm(net.conv(net.x, 5), frozen=True))
        graph = prune(differentiated(net.done(net.conv(x, 2))))
        after = fuse(graph)
        assert_same(graph, after)
        assert (kind in {op.kind for op in after.ops.values()}) == stays


@pytest.mark.parametrize("seed", SEEDS)
def test_fuse_changes_no_result(seed: int) -> None:
    graph = prune(differentiated(random_graph(seed)))
    before = snapshot(graph)
    after = fuse(graph)
    assert snapshot(graph) == before
    assert_same(graph, after)
    assert_in_order(after)
    assert len(after.ops) <= len(graph.ops)


# -- rematerialize ---------------------------------------------------------------------------------------------------


def test_rematerialize_golden() -> None:
    net = Net((2, 3, 6, 6))
    x = net.relu(net.batch_norm(net.conv(net.x, 4)))
    graph = fuse(prune(differentiated(net.done(net.conv(x, 2)))))
    assert_golden("rematerialize", as_text(rematerialize(graph, cheap(graph))))


@pytest.mark.parametrize("seed", SEEDS)
def test_rematerialize_changes_no_result(seed: int) -> None:
    graph = fuse(prune(differentiated(random_graph(seed))))
    before = snapshot(graph)
    after = rematerialize(graph, cheap(graph))
    assert snapshot(graph) == before
    assert_same(graph, after)
    assert_in_order(after)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_forward_tensors_can_be_computed_again(seed: int) -> None:
    graph = fuse(prune(differentiated(random_graph(seed))))
    forward = [name for op in graph.ops.values() if op.phase == FORWARD for name in op.outputs]
    rng = np.random.default_rng(seed)
    again = {name for name in forward if rng.random() < 0.6}
    after = rematerialize(graph, again)
    assert_same(graph, after)
    assert_in_order(after)
    for op in after.ops.values():
        assert op.phase != BACKWARD or not again & set(op.inputs), op.name
    assert all(after.ops[copy].kind == graph.ops[op].kind for copy, op in after.repeats.items())


def test_no_normalized_map_is_kept_for_the_backward_pass() -> None:
    for seed in SEEDS:
        graph = training_graph(random_graph(seed))
        trained = {op.outputs[0] for op in graph.ops.values() if op.kind == "Normalize" and op.attrs["count"]}
        forward = {name for op in graph.ops.values() if op.phase == FORWARD for name in op.outputs}
        for op in graph.ops.values():
            assert op.phase != BACKWARD or not trained & forward & set(op.inputs), op.name


def test_random_graphs_reach_what_passes_treat_differently() -> None:
    """Else the tests above would say less than they seem to."""
    seen = {op.kind for seed in SEEDS for op in differentiated(random_graph(seed)).ops.values()}
    layers = {"Conv", "Gemm", "MaxPool", "AveragePool", "GlobalAveragePool", "Add", "Concat", "Dropout", "Identity"}
    norms = {"Normalize", "BatchStatistics", "FrozenStatistics", "RunningStatistics"}
    assert seen >= layers | norms | {"Relu", "LeakyRelu", "Reshape", "Slice", "CrossEntropy", "MeanSquaredError", "SGD"}
    ops = [op for seed in SEEDS for op in training_graph(random_graph(seed)).ops.values()]
    fused = {op.kind for op in ops if op.attrs.get("activation")}
    assert fused >= {"Conv", "Normalize", "NormalizeMoments", "NormalizeInputGrad"}
    assert any(op.kind == "Normalize" and op.phase == BACKWARD for op in ops)


def test_a_pass_that_loses_a_term_is_seen() -> None:
    graph = prune(differentiated(random_graph(3)))
    wrong = graph.copy()
    decayed = next(op for op in wrong.ops.values() if op.kind == "SGD")
    wrong.replace_op(decayed, attrs={**decayed.attrs, "weight_decay": 0.0})
    with pytest.raises(AssertionError):
        assert_same(graph, wrong)


def test_state_is_stored_as_its_weight_is() -> None:
    """Also a weight that is no filter, but a map: one number per row and column."""
    net = Net((2, 3, 5, 4))
    place = net.graph.add_parameter("place", Parameter(np.ones((1, 1, 5, 4), np.float32), True, "place"), kind="map")
    graph = net.done(net._op("Add", net.conv(net.x, 3), place))
    graph = add_optimizer(differentiate(graph, Criterion(loss="mse")), Optimizer(momentum=0.9, weight_decay=0.0))
    for weight, new in graph.next_value.items():
        assert graph.tensors[new].kind == graph.tensors[weight].kind
    assert graph.tensors["place.velocity"].kind == "map"
