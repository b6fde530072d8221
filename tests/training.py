"""What tests of plans and programs share: training graphs, plans through the planning passes, comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from fusetile.cluster import Cluster, Node, local_cluster
from fusetile.device import PROFILES
from fusetile.graph import Graph
from fusetile.passes.add_optimizer import Optimizer, add_optimizer
from fusetile.passes.assign import assign
from fusetile.passes.communicate import Communication, communicate
from fusetile.passes.differentiate import Criterion, differentiate
from fusetile.passes.fuse import fuse
from fusetile.passes.group import Halo, group
from fusetile.passes.prune import prune
from fusetile.passes.rematerialize import cheap, rematerialize
from fusetile.plan import Plan
from fusetile.plan_executor import execute

GRIDS = {1: [], 2: ["grid:2x1", "grid:1x2"], 3: ["grid:3x1", "grid:1x3"], 4: ["grid:2x2"], 6: ["grid:2x3", "grid:3x2"]}
OPTIMIZER = Optimizer(momentum=0.9, weight_decay=1e-3)
PLAIN = Optimizer(weight_decay=1e-3)


def loss_of(graph: Graph) -> str:
    """Classes where the output is a vector of logits, a regression where it is a map."""
    return "cross-entropy" if len(graph.tensors[graph.outputs[0]].shape) == 2 else "mse"


def training_graph(
    graph: Graph,
    *,
    loss: str = "",
    optimizer: Optimizer = OPTIMIZER,
    **criterion: Any,
) -> Graph:
    """The graph that is planned: forward, loss, backward, update; pruned, fused, cheap maps recomputed."""
    graph = differentiate(graph, Criterion(loss=loss or loss_of(graph), **criterion))
    graph = fuse(prune(add_optimizer(graph, optimizer)))
    return rematerialize(graph, cheap(graph))


def in_float64(graph: Graph) -> Graph:
    """The same graph with every float32 tensor and parameter in float64."""
    graph = graph.copy()
    for name, tensor in graph.tensors.items():
        if tensor.dtype == "float32":
            graph.tensors[name] = replace(tensor, dtype="float64")
    for name, parameter in graph.parameters.items():
        if parameter.value.dtype == np.float32:
            graph.parameters[name] = replace(parameter, value=parameter.value.astype(np.float64))
    return graph


def mixed_cluster(*kinds: str) -> Cluster:
    """Unequal devices, by the names of their profiles."""
    return Cluster(tuple(Node(f"node{i}", f"127.0.0.1:{7300 + i}", PROFILES[kind]) for i, kind in enumerate(kinds)))


def planned(
    graph: Graph,
    plan: str,
    cluster: Cluster | int,
    *,
    halo: Halo = "auto",
    seed: int | None = None,
    block: int = 8,
) -> tuple[Plan, Communication]:
    """Through assign, group and communicate; `seed` lets a lot decide which halos are computed."""
    cluster = local_cluster(cluster) if isinstance(cluster, int) else cluster
    placed = group(graph, _assigned(graph, plan, cluster, block), cluster=cluster, halo=halo, seed=seed)
    return placed, communicate(graph, placed, block=block)


@lru_cache(8)
def _assigned(graph: Graph, plan: str, cluster: Cluster, block: int) -> Plan:
    return assign(graph, plan=plan, cluster=cluster, block=block)


def worst(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The largest error relative to its tensor's largest value (a NaN is infinite), and where."""
    errors = []
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        error = np.abs(value.astype(np.float64) - expected[name]).max() / max(1e-3, np.abs(expected[name]).max())
        errors.append((float(error) if np.isfinite(error) else np.inf, name))
    return max(errors)


def run_plan(graph: Graph, plan: Plan, communication: Communication, fed: Mapping[str, np.ndarray]) -> dict:
    """On the plan executor; everything that a step produces must be there."""
    found = execute(graph, plan, communication, fed)
    assert set(found) == {graph.loss, *graph.gradients.values(), *graph.next_value.values()}
    return found
