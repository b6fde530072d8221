"""Several batches of a step: sums of gradients, where they lie, and what travels."""

from __future__ import annotations

import pytest

from fusetile.cluster import local_cluster
from fusetile.graph import Graph
from fusetile.passes.accumulate import accumulate, micro, place_sums
from fusetile.passes.assign import assign
from fusetile.passes.communicate import Communication, communicate, wire_dtype
from fusetile.passes.group import group
from fusetile.plan import Plan
from fusetile.reference import evaluate
from tests.graphs import NETWORKS, feeds
from tests.training import run_plan, training_graph, worst

BATCHES = 3


def placed_with_sums(graph: Graph, plan: str, nodes: int, *, apart: bool) -> tuple[Graph, Plan, Communication]:
    cluster = local_cluster(nodes)
    assigned = assign(graph, plan=plan, cluster=cluster, block=8)
    summed = accumulate(graph, BATCHES)
    placed = group(summed, place_sums(summed, assigned, apart=apart), cluster=cluster)
    return summed, placed, communicate(summed, placed, block=8)


def sent(graph: Graph, communication: Communication) -> set[str]:
    return {delivery.tensor for delivery in communication.deliveries if delivery.transfers()} & set(graph.tensors)


@pytest.mark.parametrize(
    ("nodes", "plan"),
    [(1, "single"), (2, "batch"), (3, "grid:3x1"), (3, "channel"), (4, "grid:2x2"), (4, "random:3")],
)
@pytest.mark.parametrize("name", ["normalized", "grouped"])
def test_sums_that_devices_make_apart_are_those_of_shards(name: str, nodes: int, plan: str) -> None:
    graph = training_graph(NETWORKS[name](4))
    for apart in (True, False):
        summed, placed, communication = placed_with_sums(graph, plan, nodes, apart=apart)
        fed = feeds(summed)
        error, where = worst(run_plan(summed, placed, communication, fed), evaluate(summed, fed))
        assert error < 2e-4, f"{where} is off by {error}"


def test_contributions_travel_once_per_step() -> None:
    graph = training_graph(NETWORKS["normalized"](4))
    gradients = set(graph.gradients.values())
    for apart in (True, False):
        summed, placed, communication = placed_with_sums(graph, "batch", 4, apart=apart)
        first = micro(summed)
        held = communicate(first, placed, block=8)
        assert bool(sent(first, held) & gradients) is not apart
        last = sent(summed, communication)
        assert bool(last & gradients) is not apart
        assert bool(last & set(summed.gradients.values())) is apart, "the sums instead"


def test_sums_of_gradients_are_as_narrow_as_gradients() -> None:
    link = local_cluster(2).with_wire("fp16").link
    graph = training_graph(NETWORKS["plain"](2))
    summed = accumulate(graph, BATCHES)
    for name, gradient in graph.gradients.items():
        assert wire_dtype(summed, summed.gradients[name], link) == wire_dtype(graph, gradient, link)
