"""Hundreds of plans in numpy, all devices in one process: loss, gradients and updates equal the undivided reference."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest

from fusetile.box import Box, Interval, volume
from fusetile.cluster import Cluster, local_cluster
from fusetile.errors import UserError
from fusetile.graph import Graph
from fusetile.passes import communicate as communicate_pass
from fusetile.passes.assign import assign
from fusetile.passes.group import Halo
from fusetile.plan import Layout, Move, redistribute
from fusetile.reference import evaluate
from tests.graphs import NETWORKS, Net, feeds
from tests.random_graphs import random_graph
from tests.training import GRIDS, mixed_cluster, planned, run_plan, training_graph, worst

TOLERANCE = 2e-4  # float32 sums in another order, relative to the largest element of a tensor


@cache
def reference(name: str, batch: int) -> tuple[Graph, dict[str, np.ndarray], dict[str, np.ndarray]]:
    graph = training_graph(NETWORKS[name](batch))
    fed = feeds(graph)
    return graph, fed, evaluate(graph, fed)


def check(name: str, batch: int, plan: str, cluster: int | Cluster, **options: Any) -> None:
    graph, fed, expected = reference(name, batch)
    placed, communication = planned(graph, plan, cluster, **options)
    error, where = worst(run_plan(graph, placed, communication, fed), expected)
    assert error < TOLERANCE, f"{plan} {options}: {where} is off by {error}"


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_plan(name: str, batch: int, nodes: int) -> None:
    """A search takes as long as all other plans together: on any number of devices, but not for every batch."""
    searched = "auto" if batch == 2 or nodes == 4 else "mixed"
    for plan in ("single", "batch", "channel", searched, *GRIDS[nodes]):
        for halo in ("exchange", "recompute", "auto") if "grid" in plan or plan == searched else ("auto",):
            check(name, batch, plan, nodes, halo=halo)


@pytest.mark.parametrize("nodes", [2, 3, 4, 6])
@pytest.mark.parametrize("name", NETWORKS)
def test_random_plans(name: str, nodes: int) -> None:
    for seed in range(9):
        check(name, (3, 1, 2)[seed % 3], f"random:{seed}", nodes, halo="auto", seed=seed, block=(8, 16)[seed % 2])


@pytest.mark.parametrize("name", NETWORKS)
def test_unequal_devices(name: str) -> None:
    """Uneven tiles, and parts that become empty where a device is very slow. A search for four takes seconds: for one
    network."""
    for kinds in (("pi3", "pi4"), ("pi4", "pi3", "pi5"), ("pi3", "host", "pi3", "pi4")):
        cluster = mixed_cluster(*kinds)
        searched = "auto" if len(kinds) < 4 or name == "branches" else "mixed"
        for plan in ("batch", "channel", searched, *GRIDS[len(kinds)][:1], "random:5"):
            check(name, 3, plan, cluster, seed=2 if "random" in plan else None)


@pytest.mark.parametrize("name", NETWORKS)
def test_more_devices_than_samples_rows_or_channels(name: str) -> None:
    """Empty boxes, and grids larger than the last maps. A search for so many devices takes seconds: for one network."""
    searched = "auto" if name == "branches" else "mixed"
    for plan in ("batch", "channel", "grid:4x4", "grid:16x1", "grid:1x7", searched, "random:0"):
        check(name, 2, plan, 16)


@pytest.mark.parametrize("name", NETWORKS)
def test_devices_left_out(name: str) -> None:
    check(name, 2, "grid:2x1", 3)
    check(name, 2, "single", 4)


def test_the_tests_above_would_see_uneven_empty_and_idle_parts() -> None:
    graph, _, _ = reference("plain", 2)
    uneven = assign(graph, plan="grid:2x1", cluster=mixed_cluster("pi3", "pi4"), block=8)
    assert len({volume(box) for placement in uneven.placements.values() for box in placement.own}) > 2
    many = assign(graph, plan="batch", cluster=local_cluster(16), block=8)
    first = next(iter(many.placements.values()))
    assert [volume(box) > 0 for box in first.own].count(True) == 2


SHARED = {
    "one tensor read twice": lambda net: net.add(net.x, net.x),
    "one tensor concatenated twice": lambda net: net.concat(net.x, net.x),
    "rows concatenated": lambda net: net.concat(net.conv(net.x, 3), net.x, axis=2),
}


@pytest.mark.parametrize("case", SHARED)
def test_a_tensor_used_twice(case: str) -> None:
    net = Net((2, 3, 9, 8))
    x = SHARED[case](net)
    a = net.relu(net.conv(x, 10))
    graph = training_graph(net.done(net.conv(net.add(net.conv(a, 10), a), 4)))
    fed = feeds(graph)
    expected = evaluate(graph, fed)
    for nodes, plan in ((2, "grid:2x1"), (3, "channel"), (2, "batch"), (4, "random:1"), (4, "random:2"), (3, "auto")):
        error, where = worst(run_plan(graph, *planned(graph, plan, nodes, halo="recompute"), fed), expected)
        assert error < TOLERANCE, (plan, where, error)


@pytest.mark.parametrize("identity", [False, True])
def test_a_weight_that_two_layers_share(identity: bool) -> None:
    """Its gradients are added, with or without an Identity between the parameter and its readers."""
    net = Net((2, 9, 8, 7))
    a = net.relu(net.conv(net.x, 9))
    w = net._op("Identity", "w0") if identity else "w0"
    for _ in range(2):
        a = net._op("Conv", a, w, strides=(1, 1), dilations=(1, 1), pads=(1, 1, 1, 1))
    graph = training_graph(net.done(net.conv(a, 3)))
    fed = feeds(graph)
    for nodes, plan in ((1, "single"), (2, "batch"), (2, "grid:2x1"), (3, "channel"), (3, "auto"), (4, "random:3")):
        error, where = worst(run_plan(graph, *planned(graph, plan, nodes), fed), evaluate(graph, fed))
        assert error < TOLERANCE, (plan, where, error)


@pytest.mark.parametrize("seed", range(40))
def test_random_networks(seed: int) -> None:
    graph = training_graph(random_graph(seed))
    fed = feeds(graph)
    expected = evaluate(graph, fed)
    exact = evaluate(graph, fed, exact=True)  # a bias before BatchNorm has no gradient but rounding errors
    rounding = worst({name: expected[name] for name in (graph.loss, *graph.gradients.values())}, exact)[0]
    halo: Halo = ("exchange", "recompute", "auto")[seed % 3]
    plans = ("grid:2x2", "batch", "channel", f"random:{seed}", f"random:{seed + 100}")
    for nodes, plan in zip((4, 3, 2, 3, 5), plans, strict=True):
        placed, communication = planned(graph, plan, nodes, halo=halo, seed=seed if "random" in plan else None)
        error, where = worst(run_plan(graph, placed, communication, fed), expected)
        assert error < max(TOLERANCE, 3 * rounding), f"{plan}: {where} is off by {error}"


def test_two_outputs_have_two_losses() -> None:
    net = Net((3, 2, 7, 7))
    a = net.relu(net.conv(net.x, 9))
    graph = training_graph(net.done(net.conv(a, 3), net.conv(a, 5, stride=2)))
    assert len(graph.targets) == 2
    fed = feeds(graph)
    for nodes, plan in ((2, "grid:2x1"), (3, "batch"), (4, "channel"), (4, "random:3")):
        error, where = worst(run_plan(graph, *planned(graph, plan, nodes), fed), evaluate(graph, fed))
        assert error < TOLERANCE, (plan, where, error)


def test_cross_entropy_per_pixel() -> None:
    net = Net((2, 2, 7, 6))
    graph = training_graph(net.done(net.conv(net.leaky(net.conv(net.x, 9)), 4)), loss="cross-entropy")
    fed = feeds(graph)
    for nodes, plan in ((2, "grid:2x1"), (4, "grid:2x2"), (4, "channel"), (4, "random:3")):
        error, where = worst(run_plan(graph, *planned(graph, plan, nodes), fed), evaluate(graph, fed))
        assert error < TOLERANCE, (plan, where, error)


@pytest.mark.parametrize("plan", ["fastest", "grid:2", "grid:0x2", "grid:3x2", "random:x", "grid:-1x2", ""])
def test_plans_that_are_none(plan: str) -> None:
    graph, _, _ = reference("plain", 2)
    with pytest.raises(UserError, match="--plan"):
        assign(graph, plan=plan, cluster=local_cluster(4), block=8)


# -- the executor sees mistakes --------------------------------------------------------------------------------------


def test_a_missing_move_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not delivered is NaN, or missing in the sum."""

    def loses(layout: Layout, need: tuple[Box, ...]) -> list[Move]:
        moves = redistribute(layout, need)
        crossing = [move for move in moves if move.source != move.target]
        return [move for move in moves if move != crossing[0]] if crossing else moves

    monkeypatch.setattr(communicate_pass, "redistribute", loses)
    for plan in ("grid:2x1", "channel"):
        with pytest.raises(AssertionError, match="off by"):
            check("plain", 2, plan, 2)


def test_a_halo_that_is_too_small_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusetile.ops.base import Window

    def narrow(self: Window, iterations: Mapping[str, Interval]) -> Interval:
        start, stop = iterations[self.axis]
        return (start * self.stride - self.pad, (stop - 1) * self.stride - self.pad + self.dilation * (self.taps - 1))

    graph, fed, expected = reference("plain", 2)
    placed, communication = planned(graph, "grid:2x1", 2, halo="exchange")
    exact = {index: d.need for index, d in enumerate(communication.deliveries)}
    monkeypatch.setattr(Window, "interval", narrow)
    monkeypatch.setattr(graph, "domains", {})  # which remember what boxes touch
    _, narrower = planned(graph, "grid:2x1", 2, halo="exchange")
    assert {index: d.need for index, d in enumerate(narrower.deliveries)} != exact
    with pytest.raises((AssertionError, ValueError)):
        error, _ = worst(run_plan(graph, placed, narrower, fed), expected)
        assert error < TOLERANCE
