"""The order of ops: messages hide behind weight gradients; and what was sent once is kept rather than sent again."""

from __future__ import annotations

from fusetile.cluster import Cluster, Link, local_cluster
from fusetile.graph import Graph
from fusetile.passes.communicate import Communication, communicate
from fusetile.passes.group import group
from fusetile.passes.keep import is_left_out, originals
from fusetile.passes.place import place
from fusetile.passes.rules import rule_splits
from fusetile.passes.schedule import Compute, Schedule, Ship, schedule
from fusetile.reference import evaluate
from tests.graphs import Net, feeds
from tests.training import run_plan, training_graph, worst


def deep() -> Graph:
    """Four convolutions with BatchNorm, on maps large enough to take their time."""
    net = Net((4, 8, 16, 16))
    x = net.x
    for _ in range(4):
        x = net.relu(net.batch_norm(net.conv(x, 16)))
    return training_graph(net.done(net.conv(x, 16)))


def scheduled(graph: Graph, rule: str, link: Link, nodes: int = 2) -> Schedule:
    return communicated(graph, rule, link, nodes)[1]


def communicated(graph: Graph, rule: str, link: Link, nodes: int = 2) -> tuple[Communication, Schedule]:
    cluster = Cluster(local_cluster(nodes, target="pi3").nodes, link)
    plan = place(graph, rule_splits(graph, rule, cluster), speeds=cluster.speeds, block=8)
    plan = group(graph, plan, cluster=cluster)
    communication = communicate(graph, plan, block=8)
    return communication, schedule(graph, plan, communication, cluster=cluster)


def test_a_weight_gradient_is_computed_while_the_sums_of_the_layer_below_travel() -> None:
    graph = deep()
    order = scheduled(graph, "batch", Link(1e7, 1e-3)).order
    hidden = 0
    for op in graph.ops.values():
        if op.kind == "NormalizeInputGrad":
            moments = next(name for name in op.inputs if name.endswith("moments"))
            between = order[order.index(moments) + 1 : order.index(op.name)]
            hidden += any(graph.ops[name].kind == "ConvWeightGrad" for name in between)
    assert hidden >= 3


def test_the_sums_of_tiles_do_not_wait_for_halos() -> None:
    """The sums of a gradient are taken of what a device owns: they are on their way before the weight gradient that
    hides the halo."""
    graph = deep()
    order = scheduled(graph, "grid:2x1", Link(1e7, 1e-3)).order
    producers, checked = graph.producers(), 0
    for op in graph.ops.values():
        if op.kind == "NormalizeMoments" and producers[op.inputs[0]].kind == "ConvInputGrad":
            between = order[order.index(producers[op.inputs[0]].name) + 1 : order.index(op.name)]
            assert not any(graph.ops[name].kind == "ConvWeightGrad" for name in between)
            checked += 1
    assert checked >= 3


def test_weights_travel_one_after_the_other_unless_the_link_has_no_time_to_lose() -> None:
    graph = deep()

    def beginnings(rate: float) -> int:
        """With how many different ops the first device begins to send parameters."""
        communication, found = communicated(graph, "batch", Link(rate, 1e-3))
        begins, ops = set(), 0
        for action in found.actions[0]:
            ops += isinstance(action, Compute)
            if isinstance(action, Ship):
                first = found.transfers[action.tag].parts[0]
                if communication.deliveries[first.delivery].tensor in graph.parameters:
                    begins.add(ops)
        return len(begins)

    assert beginnings(1e8) > 1 == beginnings(1e4)


def test_a_device_alone_keeps_the_order_of_the_graph() -> None:
    """Nothing is kept back where nothing is waited for: what a weight gradient reads takes memory."""
    graph = deep()
    order = [name for name in scheduled(graph, "single", Link(1e7, 1e-3)).order if graph.ops[name].phase != "update"]
    assert order == [op.name for op in graph.ops.values() if op.phase != "update"]


def test_an_update_runs_when_its_gradient_is_expected_later_on_a_slow_link() -> None:
    graph = deep()
    update = graph.next_value["w15"]
    late = [scheduled(graph, "batch", Link(rate, 1e-3)).order.index(update) for rate in (1e9, 1e6)]
    assert late[0] < late[1]


def test_a_map_that_was_sent_is_kept() -> None:
    graph = deep()
    cluster = local_cluster(2, target="pi3")
    plan = place(graph, rule_splits(graph, "channel", cluster), speeds=cluster.speeds, block=8)
    again = originals(graph)
    assert len(again) == 4
    moved = {}
    for keep_maps in (True, False):
        placed = group(graph, plan, cluster=cluster, keep_maps=keep_maps)
        assert all(is_left_out(placed.placements[name]) == keep_maps for name in again)
        communication = communicate(graph, placed, block=8)
        moved[keep_maps] = sum(len(delivery.transfers()) for delivery in communication.deliveries)
        fed = feeds(graph)
        error, where = worst(run_plan(graph, placed, communication, fed), evaluate(graph, fed))
        assert error < 2e-4, where
    assert moved[False] == moved[True] + 2 * len(again)  # from each device to the other
