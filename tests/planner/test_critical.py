"""The critical path: from the start of a step to its end without a gap, of things that did happen."""

from __future__ import annotations

import pytest

from fusetile.cluster import local_cluster
from fusetile.passes.schedule import schedule
from fusetile.planner.clock import TICK_seconds
from fusetile.planner.critical import critical_path
from fusetile.planner.simulate import simulate
from tests.random_graphs import random_graph
from tests.training import planned, training_graph


@pytest.mark.parametrize("plan", ["single", "batch", "grid:1x3", "channel", "random:1", "random:2"])
@pytest.mark.parametrize("seed", range(4))
def test_it_leads_from_the_start_to_the_end(seed: int, plan: str) -> None:
    graph, cluster = training_graph(random_graph(seed)), local_cluster(3, target="pi3")
    placed, communication = planned(graph, plan, cluster)
    order = schedule(graph, placed, communication, cluster=cluster)
    timeline = simulate(communication, order, cluster)
    path = critical_path(order, timeline)
    now = 0.0
    for stretch in path:
        assert stretch.start == pytest.approx(now, abs=2 * TICK_seconds)
        now = stretch.stop
        if stretch.tag is None:
            assert (stretch.start, stretch.stop, stretch.action) in timeline.works[stretch.device]
        else:
            assert order.transfers[stretch.tag].target == stretch.device
            assert timeline.messages[stretch.tag][1] == stretch.stop
    assert now == pytest.approx(timeline.seconds)
