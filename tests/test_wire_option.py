"""`--wire fp16`: maps and gradients take half the bytes, all else travels as it is, and training hardly differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusetile.cluster import Cluster, Link, local_cluster
from fusetile.graph import Parameter
from fusetile.passes.assign import assign
from fusetile.passes.communicate import wire_dtype
from tests.graphs import NETWORKS, Net, feeds
from tests.local_cluster import LocalCluster
from tests.test_programs import build, by_key
from tests.training import training_graph

LOSS_error = 5e-4
"""Relative, after a few steps of the small networks. Rounding is to 2^-11."""


def trained(folder: Path, name: str, plan: str, nodes: int, wire: str) -> tuple[list[float], dict[str, Any]]:
    """Losses of a few steps, and plan.json."""
    graph = NETWORKS[name](4)
    made = build(graph, folder / wire, plan, nodes, wire=wire)
    cluster, graph = LocalCluster(made), training_graph(graph)
    losses = [cluster.step(by_key(graph, feeds(graph, seed=step))) for step in range(1, 5)]
    return losses, json.loads((made / "plan.json").read_text())


@pytest.mark.parametrize(("plan", "nodes"), [("batch", 2), ("grid:2x1", 2), ("channel", 2), ("random:3", 3)])
def test_losses_and_bytes(plan: str, nodes: int, tmp_path: Path) -> None:
    wide, before = trained(tmp_path, "normalized", plan, nodes, "fp32")
    losses, after = trained(tmp_path, "normalized", plan, nodes, "fp16")
    assert losses == pytest.approx(wide, rel=LOSS_error) and losses != wide

    first, second = moved(before), moved(after)
    assert {key for key, _ in first} == {key for key, _ in second}
    narrow = {key for key, dtype in second if dtype == "float16"}
    assert narrow and second == {(key, "float16" if key in narrow else dtype) for key, dtype in first}
    assert all(dtype == "float32" for key, dtype in first if key in narrow), "exactly half"
    graph = training_graph(NETWORKS["normalized"](4))
    lasting = {*graph.parameters, *graph.next_value.values()}
    for (name, _), dtype in second:
        tensor = graph.tensors[name]
        pixels = len(tensor.shape) == 4 and tensor.shape[2] > 1  # not statistics, sums, the loss
        large = tensor.dtype == "float32" and (tensor.kind == "filter" or pixels)
        assert (dtype == "float16") == (name not in lasting and large), name


def moved(document: dict[str, Any]) -> set[tuple[tuple[str, str], str]]:
    """Tensor, ends and box, and dtype of everything that moves."""
    return {
        ((part["tensor"], json.dumps([transfer["source"], transfer["target"], part["box"]])), part["dtype"])
        for transfer in document["transfers"]
        for part in transfer["parts"]
    }


def test_weights_travel_as_they_are() -> None:
    """Also those that a layer computes from others, and, at batch 1, those that are maps of one image."""
    net = Net((1, 4, 6, 6))
    kernel = np.random.default_rng(3).standard_normal((8, 4, 3, 3)).astype(np.float32)
    stored = net.graph.add_parameter("w", Parameter(kernel, True, "w"), kind="map")
    place = net.graph.add_parameter("place", Parameter(np.ones((1, 4, 6, 6), np.float32), True, "place"), kind="map")
    (weights,) = net.graph.add("FilterOf", net.graph.add("Tanh", [stored]))
    (x,) = net.graph.add("Add", ["x", place])
    window = {"strides": (1, 1), "dilations": (1, 1), "pads": (1, 1, 1, 1)}
    net.graph.outputs = [*net.graph.add("Conv", [x, weights], attrs=window)]
    graph = training_graph(net.graph)
    narrow = {name for name in graph.tensors if wire_dtype(graph, name, Link(1e6, 1e-4, "fp16")) == "float16"}
    again = {op.outputs[0] for op in graph.ops.values() if op.kind == "FilterOf"}
    assert not narrow & ({*graph.parameters, *graph.next_value.values()} | again)
    assert {x, *graph.outputs} <= narrow and any(graph.tensors[name].kind == "filter" for name in narrow)


def test_the_planner_counts_half() -> None:
    """On slow links a plan takes less time by simulation, its model says so too, and it may be another plan."""
    graph = training_graph(NETWORKS["plain"](4))
    slow = Cluster(local_cluster(2, target="pi3").nodes, Link(1e4, 1e-4))
    wide, narrow = (
        assign(graph, plan="auto", cluster=slow.with_wire(wire), block=8).estimate for wire in ("fp32", "fp16")
    )
    assert wide is not None and narrow is not None
    assert narrow.others["grid"] < 0.9 * wide.others["grid"]
    assert narrow.bound_seconds <= wide.bound_seconds
