"""Ops in pieces: borders first, what is here first; transfers leave and are awaited between the right pieces."""

from __future__ import annotations

from math import inf

import pytest

from fusetile.box import Box, contains, hull, intersect, subtract, volume
from fusetile.cluster import Cluster, Link, local_cluster
from fusetile.graph import Graph
from fusetile.ops import Domain, domain_of
from fusetile.passes import pieces as pieces_module
from fusetile.passes.communicate import Communication
from fusetile.passes.pieces import border_first, here_first
from fusetile.passes.schedule import Await, Compute, Place, Schedule, Ship, schedule
from fusetile.plan import Plan
from tests.graphs import NETWORKS, Net
from tests.training import planned, training_graph

PLANS = [(2, "grid:2x1"), (4, "grid:2x2"), (6, "grid:3x2"), (3, "channel"), (3, "random:1"), (4, "random:4")]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut wherever it can be done, whatever it gains."""
    monkeypatch.setattr(pieces_module, "LEAST_HIDDEN_seconds", -inf)
    monkeypatch.setattr(pieces_module, "STRIP", 1)


def convolution() -> Domain:
    """3x3, 16 rows, 20 columns."""
    net = Net((1, 8, 16, 20))
    graph = net.done(net.conv(net.x, 8))
    return domain_of(graph, next(op for op in graph.ops.values() if op.kind == "Conv"))


def box_of(domain: Domain, rows: tuple[int, int], columns: tuple[int, int]) -> Box:
    parts = {"h": rows, "w": columns}
    return tuple(parts.get(axis.name, (0, axis.size)) for axis in domain.axes)


def test_strips_hold_what_is_sent_and_come_first() -> None:
    domain = convolution()
    tile = box_of(domain, (0, 16), (0, 10))
    below, beside = ((0, 1), (0, 8), (15, 16), (0, 10)), ((0, 1), (0, 8), (0, 16), (9, 10))
    expected = [box_of(domain, (12, 16), (0, 10)), box_of(domain, (0, 12), (6, 10)), box_of(domain, (0, 12), (0, 6))]
    assert list(border_first(domain, tile, [below, beside])) == expected
    assert border_first(domain, tile, [below]) == (expected[0], box_of(domain, (0, 12), (0, 10)))


@pytest.mark.parametrize("rows", [(0, 16), (6, 9), (0, 9)])
def test_what_is_no_border_is_not_cut_off(rows: tuple[int, int]) -> None:
    domain = convolution()
    assert border_first(domain, box_of(domain, (0, 16), (0, 20)), [((0, 1), (0, 8), rows, (0, 20))]) == ()


def test_first_what_needs_nothing_that_comes() -> None:
    domain = convolution()
    tile, here = box_of(domain, (0, 16), (0, 20)), ((0, 1), (0, 8), (5, 11), (0, 20))
    first, *rest = here_first(domain, tile, [0], here)
    assert first == box_of(domain, (6, 10), (0, 20))
    assert sorted(rest) == [box_of(domain, (0, 6), (0, 20)), box_of(domain, (10, 16), (0, 20))]
    assert here_first(domain, tile, [0], ((0, 1), (0, 4), (5, 11), (0, 20))) == ()


def assert_ordered(graph: Graph, plan: Plan, communication: Communication, found: Schedule) -> int:
    """On every device: pieces make up what it is to compute, read what has come, and are sent when written. The
    number of ops in pieces."""
    producers, several = graph.producers(), 0
    for device, actions in enumerate(found.actions):
        done: dict[str, list[Box]] = {}
        placed, awaited = set(), set()
        for action in actions:
            match action:
                case Compute(name, box):
                    done.setdefault(name, []).append(box)
                    domain = domain_of(graph, graph.ops[name])
                    for i, tensor in enumerate(graph.ops[name].inputs):
                        index, need = communication.reads[name, tensor], domain.need(box, i)
                        delivery = communication.deliveries[index]
                        coming = any(move.target == device for move in delivery.moves)
                        here = delivery.in_place[device] and communication.layouts[delivery.tensor].have[device]
                        assert not coming or index in placed or (here and contains(here, need)), (name, tensor)
                case Ship(tag):
                    for part in found.transfers[tag].parts:
                        producer = producers.get(communication.deliveries[part.delivery].tensor)
                        if producer:
                            domain, rest = domain_of(graph, producer), [part.move.box]
                            at = producer.outputs.index(communication.deliveries[part.delivery].tensor)
                            for box in done[producer.name]:
                                rest = [left for one in rest for left in subtract(one, domain.output(box, at))]
                            assert not rest, f"{producer.name} is sent before it is written"
                case Await(tags):
                    awaited |= set(tags)
                case Place(index):
                    parts = [(t.tag, p) for t in found.transfers if t.target == device for p in t.parts]
                    assert {tag for tag, part in parts if part.delivery == index} <= awaited
                    placed.add(index)
        for name, boxes in done.items():
            whole = plan.placements[name].compute[device]
            assert hull(boxes) == whole and sum(map(volume, boxes)) == volume(whole)
            assert not any(volume(intersect(a, b)) for i, a in enumerate(boxes) for b in boxes[:i])
            several += len(boxes) > 1
    return several


@pytest.mark.parametrize("name", ["plain", "normalized", "up_and_down"])
def test_pieces_are_whole_and_in_order(name: str, always: None) -> None:
    graph, several = training_graph(NETWORKS[name](2)), 0
    for nodes, rule in PLANS:
        plan, communication = planned(graph, rule, nodes, halo="exchange")
        found = schedule(graph, plan, communication, cluster=local_cluster(nodes))
        several += assert_ordered(graph, plan, communication, found)
    assert several > 10


def slow_cluster(rate: float) -> Cluster:
    return Cluster(local_cluster(2, target="pi3").nodes, Link(rate, 0.3e-3))


@pytest.mark.parametrize(("rate", "cut"), [(1e6, True), (1e12, False)])
def test_ops_are_cut_where_a_transfer_takes_time(rate: float, cut: bool) -> None:
    net = Net((1, 16, 64, 64))
    graph = training_graph(net.done(net.conv(net.conv(net.x, 32), 32)))
    plan, communication = planned(graph, "grid:2x1", 2, halo="exchange")
    found = schedule(graph, plan, communication, cluster=slow_cluster(rate))
    assert (assert_ordered(graph, plan, communication, found) > 0) == cut
