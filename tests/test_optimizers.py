"""Optimizers, schedules, clipping, averages and frozen weights: against PyTorch, and in the plans of small networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fusetile.errors import UserError
from fusetile.graph import BACKWARD, Graph
from fusetile.options import Training
from fusetile.passes.add_optimizer import Optimizer
from fusetile.passes.freeze import freeze
from fusetile.rates import Rates
from fusetile.reference import evaluate
from tests.graphs import NETWORKS, Net, feeds
from tests.training import GRIDS, planned, run_plan, training_graph, worst

STEPS = 6
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "weight_decay": 0.01},
    "SGD nesterov": {"momentum": 0.8, "weight_decay": 0.01, "nesterov": True},
    "Adam": {"betas": (0.8, 0.99), "weight_decay": 0.1},
    "AdamW": {"weight_decay": 0.1},
    "RMSprop": {"alpha": 0.9, "weight_decay": 0.01},
    "RMSprop with momentum": {"alpha": 0.9, "momentum": 0.5},
}


def two_layers() -> Graph:
    net = Net((8, 7))
    return net.done(net.gemm(net.relu(net.gemm(net.x, 6)), 3))


def trained(graph: Graph, rates: Rates) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses, and parameters after STEPS steps, by the reference, in float64."""
    state: dict[str, np.ndarray] = {}
    losses = []
    for step in range(1, STEPS + 1):
        controls = rates.controls(step, STEPS)
        fed = feeds(graph, step) | {name: np.array([controls[role]]) for name, role in graph.controls.items()}
        values = evaluate(graph, fed | state, exact=True)
        losses.append(float(values[graph.loss][0]))
        state = {name: values[new] for name, new in graph.next_value.items()}
    return losses, state


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_pytorchs(name: str, clip: float) -> None:
    torch = pytest.importorskip("torch")
    kind, options = name.split()[0], OPTIMIZERS[name]
    rates = Rates(learning_rate=0.02, schedule="cosine", betas=options.get("betas", (0.9, 0.999)))
    graph = training_graph(two_layers(), optimizer=Optimizer(kind=kind.lower(), **options, clip_norm=clip, ema=0.7))
    losses, found = trained(graph, rates)
    weights = {
        n: torch.tensor(p.value, dtype=torch.float64, requires_grad=True)
        for n, p in graph.parameters.items()
        if p.trainable
    }
    average = {n: weight.detach().clone() for n, weight in weights.items()}
    optimizer = getattr(torch.optim, kind)(weights.values(), lr=0.02, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(1, STEPS + 1):
        fed = feeds(graph, step)
        x = torch.tensor(fed["x"], dtype=torch.float64)
        hidden = torch.relu(torch.nn.functional.linear(x, weights["w0"], weights["b0"]))
        y = torch.nn.functional.linear(hidden, weights["w2"], weights["b2"])
        loss = torch.nn.functional.cross_entropy(y, torch.tensor(fed["y"].astype(np.int64)))
        assert losses[step - 1] == pytest.approx(loss.item(), rel=1e-6)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            assert torch.nn.utils.clip_grad_norm_(weights.values(), clip) > clip
        optimizer.step()
        schedule.step()
        for n, weight in weights.items():
            average[n] = 0.7 * average[n] + 0.3 * weight.detach()
    for n, weight in weights.items():
        np.testing.assert_allclose(found[n], weight.detach().numpy(), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found[f"{n}.average"], average[n].numpy(), rtol=1e-6, atol=1e-9)


SCHEDULES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "step": ("StepLR", {"step_size": 7, "gamma": 0.5}, {"step_size": 7, "gamma": 0.5}),
    "multistep": ("MultiStepLR", {"milestones": (5, 9, 30), "gamma": 0.3}, {"milestones": [5, 9, 30], "gamma": 0.3}),
    "cosine": ("CosineAnnealingLR", {"minimum": 0.01}, {"T_max": 40, "eta_min": 0.01}),
    "one-cycle": ("OneCycleLR", {}, {"max_lr": 0.4, "total_steps": 40}),
    "polynomial": ("PolynomialLR", {"power": 2.0}, {"total_iters": 40, "power": 2.0}),
    "constant": ("ConstantLR", {}, {"factor": 1.0}),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_are_pytorchs(kind: Any) -> None:
    torch = pytest.importorskip("torch")
    name, ours, theirs = SCHEDULES[kind]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    schedule = getattr(torch.optim.lr_scheduler, name)(optimizer, **theirs)
    rates, warming = (Rates(learning_rate=0.4, schedule=kind, warmup=warmup, **ours) for warmup in (0, 5))
    for step in range(1, 41):
        expected = optimizer.param_groups[0]["lr"]
        assert rates.rate(step, 40) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert warming.rate(step, 40) == pytest.approx(expected * min(1, step / 5), rel=1e-9, abs=1e-12)
        optimizer.step()
        if step < 40:
            schedule.step()


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 6])
def test_clipping_and_averages_in_every_plan(nodes: int) -> None:
    """The norm is that of all gradients of all devices."""
    graph = training_graph(
        NETWORKS["plain"](3), optimizer=Optimizer(kind="adamw", weight_decay=0.1, clip_norm=0.1, ema=0.9)
    )
    fed = feeds(graph)
    expected = evaluate(graph, fed)
    assert expected["clip_scale"][0] < 0.9
    for plan in ("batch", "channel", *GRIDS[nodes], "random:1", *(["auto"] if nodes == 3 else [])):
        found = run_plan(graph, *planned(graph, plan, nodes), fed)
        error, where = worst(found, expected)
        assert error < 2e-4, f"{plan}: {where} is off by {error}"


def test_a_frozen_trunk_has_no_backward_pass() -> None:
    graph = NETWORKS["plain"](2)
    names = [name for name, parameter in graph.parameters.items() if parameter.trainable]
    after = training_graph(freeze(graph, frozen=",".join(names[:4]), trained="w*"))
    assert list(after.gradients) == [name for name in names[4:] if name.startswith("w")]
    back = [op.kind for op in after.ops.values() if op.phase == BACKWARD]
    assert not any("Conv" in kind or "Pool" in kind for kind in back), back
    full = training_graph(graph)
    fed = feeds(full)
    here, there = evaluate(after, fed), evaluate(full, fed)
    for name, gradient in after.gradients.items():
        np.testing.assert_array_equal(here[gradient], there[full.gradients[name]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen": "x*"}, "matches none of the"),
        ({"trained": "w0", "frozen": "w*"}, "nothing is left to train"),
    ],
)
def test_patterns_that_make_no_sense(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        freeze(NETWORKS["plain"](2), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam", "nesterov": True}, "--nesterov needs"),
        ({"optimizer": "adam", "momentum": 0.9}, "see --betas"),
        ({"betas": "0.9"}, "two numbers"),
        ({"optimizer": "adam", "betas": "0.9,1"}, "two numbers"),
        ({"schedule": "multistep"}, "needs --milestones"),
        ({"schedule": "multistep", "milestones": "2.5"}, "whole numbers"),
        ({"schedule": "multistep", "milestones": "-3"}, "whole numbers"),
        ({"betas": "0.8,0.9"}, "--betas 0.8,0.9 has no effect with --optimizer sgd: it is for adam, adamw"),
        ({"optimizer": "adam", "alpha": 0.5}, "--alpha 0.5 has no effect with --optimizer adam"),
        ({"milestones": "3"}, "--milestones 3 has no effect with --schedule constant: it is for multistep"),
        ({"anchors": "1,2"}, "--anchors 1,2 has no effect with --loss cross-entropy"),
        ({"ema": 1.0}, "below 1"),
        ({"learning_rate": -1.0}, "--lr"),
        ({"class_weights": "1,x"}, "separated by commas"),
        ({"class_weights": "1,-2"}, "at least 0"),
        ({"class_weights": "0,0"}, "one of them above"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Training(**options)


def test_defaults_are_pytorchs() -> None:
    assert (Training(optimizer="adam").rates.learning_rate, Training().rates.learning_rate) == (0.001, 0.01)
    assert (Training(optimizer="adamw").update.weight_decay, Training().update.weight_decay) == (0.01, 0.0)
    assert (Training(optimizer="rmsprop").update.momentum, Training().update.momentum) == (0.0, 0.9)
