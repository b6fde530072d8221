"""The planner on networks: its bound holds, its plans are legal, and no rule's plan is simulated to be faster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest

from fusetile.cluster import Cluster, Link, local_cluster
from fusetile.graph import FORWARD, Graph
from fusetile.onnx_import import import_onnx
from fusetile.passes.assign import assign
from fusetile.passes.communicate import communicate
from fusetile.passes.fit import INTERPRETER_bytes
from fusetile.passes.group import group
from fusetile.passes.rules import rule_splits
from fusetile.passes.schedule import schedule
from fusetile.plan import Plan
from fusetile.planner.candidates import candidates_of
from fusetile.planner.choose import best_plan
from fusetile.planner.model import model_of
from fusetile.planner.play import Player
from fusetile.planner.search import minimise
from fusetile.planner.simulate import simulate
from fusetile.planner.units import units_of
from models import lenet, resnet18, vgg_small, yolov2
from tests.graphs import NETWORKS
from tests.onnx_tools import save
from tests.training import mixed_cluster, training_graph

PI3 = {nodes: local_cluster(nodes, target="pi3") for nodes in (1, 2, 3, 4, 6, 8)}
MIXED = mixed_cluster("pi4", "pi3", "pi4", "pi3")
REDUCED = {
    "lenet": lambda: lenet.build(),
    "vgg_small": lambda: vgg_small.build(width=0.5),
    "resnet18": lambda: resnet18.build(size=64, width=0.25),
    "yolov2": lambda: yolov2.build(size=96, width=0.5),
}


def imported(proto: onnx.ModelProto, batch: int, folder: Path) -> Graph:
    return training_graph(import_onnx(save(proto, folder), batch=batch))


def simulated(graph: Graph, plan: Plan, cluster: Cluster) -> float:
    grown = group(graph, plan, cluster=cluster)
    communication = communicate(graph, grown, block=8)
    return simulate(communication, schedule(graph, grown, communication, cluster=cluster), cluster).seconds


def check_not_worse(graph: Graph, cluster: Cluster) -> None:
    nodes = len(cluster.nodes)
    plan = assign(graph, plan="auto", cluster=cluster, block=8)
    seconds = simulated(graph, plan, cluster)
    assert plan.estimate is not None and seconds == pytest.approx(plan.estimate.step_seconds)
    assert 0 <= plan.estimate.bound_seconds <= plan.estimate.model_seconds * (1 + 1e-9)
    grids = [f"grid:{rows}x{nodes // rows}" for rows in range(1, nodes + 1) if nodes % rows == 0]
    for rule in ("single", "batch", "channel", "mixed", *grids):
        other = simulated(graph, assign(graph, plan=rule, cluster=cluster, block=8), cluster)
        assert seconds <= other * (1 + 1e-9), f"{rule}: {other}, auto: {seconds}"


@pytest.mark.parametrize(
    ("name", "nodes", "batch"), [*((name, 2, 1) for name in REDUCED), ("lenet", 4, 4), ("vgg_small", 4, 4)]
)
def test_no_rule_is_better(name: str, nodes: int, batch: int, tmp_path: Path) -> None:
    check_not_worse(imported(REDUCED[name](), batch, tmp_path), PI3[nodes])


@pytest.mark.parametrize("name", REDUCED)
def test_no_rule_is_better_on_unequal_devices(name: str, tmp_path: Path) -> None:
    check_not_worse(imported(REDUCED[name](), 2, tmp_path), MIXED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "nodes", "speedup", "best"),
    [(yolov2.build, 4, 3.0, 0.95), (lambda: resnet18.build(size=64, width=0.5), 4, 1.35, 0.7)],
    ids=["yolov2", "resnet18"],
)
def test_speedup_and_gap(
    build: Callable[[], onnx.ModelProto], nodes: int, speedup: float, best: float, tmp_path: Path
) -> None:
    """Predicted speedup at batch 1 over one device, step time of that of the best rule, and the gap."""
    plan = best_plan(imported(build(), 1, tmp_path), cluster=PI3[nodes], block=8)
    assert plan.estimate is not None
    assert plan.estimate.gap <= 0.05
    assert plan.estimate.others["single"] / plan.estimate.step_seconds >= speedup
    assert plan.estimate.step_seconds <= best * min(plan.estimate.others[rule] for rule in ("batch", "grid", "mixed"))


@pytest.mark.parametrize("name", ["plain", "branches", "normalized"])
def test_the_bound_holds_for_every_plan_of_the_model(name: str) -> None:
    """Against all choices among a few candidates per unit, of max(A, N) itself."""
    graph = training_graph(NETWORKS[name](2))
    cluster = Cluster(local_cluster(2, target="pi3").nodes, Link(1e6, 1e-4))
    units = units_of(graph)
    per_unit = 3 if len(units) <= 8 else 2
    candidates = [candidates_of(graph, unit, speeds=cluster.speeds, block=8)[:per_unit] for unit in units]
    model = model_of(graph, units, candidates, cluster=cluster, block=8)
    choices = list(product(*(range(len(found)) for found in candidates)))
    if len(choices) > 3000:
        rng = np.random.default_rng(0)
        choices = [choices[i] for i in rng.choice(len(choices), 3000, replace=False)]
    best = min(model.seconds(choice) for choice in choices)
    for weight in np.linspace(0, 1, 11):
        sums = model.weighed(weight)
        found = minimise(sums.nodes, sums.edges)
        assert found.bound <= best * (1 + 1e-9)
        assert found.cost <= min(sums.of(choice) for choice in choices) * (1 + 1e-9)


def test_every_layer_is_in_one_unit_and_normalization_follows_its_convolution() -> None:
    graph = training_graph(NETWORKS["normalized"](2))
    units = units_of(graph)
    layers = [op.name for unit in units for op in unit.layers]
    assert sorted(layers) == sorted(op.name for op in graph.ops.values() if op.phase == FORWARD)
    convolutions = [unit for unit in units if unit.head.kind == "Conv"]
    assert any("Normalize" in [op.kind for op in unit.followers] for unit in convolutions)


def test_a_plan_that_fits_is_preferred_to_a_faster_one(tmp_path: Path) -> None:
    """With links so slow that one device alone is fastest, but with too little memory for that."""
    graph = imported(REDUCED["vgg_small"](), 16, tmp_path)
    slow = Cluster(PI3[2].nodes, Link(2e5, 1e-3))
    alone = best_plan(graph, cluster=slow, block=8)
    assert alone.estimate is not None and alone.estimate.rule == "single"
    small = tuple(replace(node, device=replace(node.device, memory_bytes=50_000_000)) for node in slow.nodes)
    spread = best_plan(graph, cluster=Cluster(small, slow.link), block=8)
    assert spread.estimate is not None and spread.estimate.rule != "single"


def test_a_fast_plan_that_fits_with_maps_computed_again_is_kept(tmp_path: Path) -> None:
    graph = imported(REDUCED["vgg_small"](), 16, tmp_path)
    splits = rule_splits(graph, "batch", PI3[2])

    def player(memory_bytes: int) -> Player:
        nodes = (replace(n, device=replace(n.device, memory_bytes=memory_bytes)) for n in PI3[2].nodes)
        return Player(graph, cluster=replace(PI3[2], nodes=tuple(nodes)), block=8, halo="auto")

    empty = player(0)
    needed = max(empty.lacking_bytes(empty.play("batch", splits)))
    tight = player(INTERPRETER_bytes + int(0.9 * (needed - INTERPRETER_bytes)))
    result = tight.play("batch", splits)
    assert any(tight.lacking_bytes(result))
    assert result.seconds < tight.seconds_within(result) < 1.5 * result.seconds
    assert tight.best() is result
    assert empty.seconds_within(empty.play("batch", splits)) == float("inf")
