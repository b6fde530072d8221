"""A cap on a device's memory: less is kept, more computed again, and the numbers stay the same to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fusetile.cluster import Cluster, local_cluster
from fusetile.errors import DoesNotFit
from fusetile.explain import read_plan, recomputed_text
from fusetile.graph import Graph
from fusetile.passes.fit import INTERPRETER_bytes
from tests.graphs import Net, feeds
from tests.local_cluster import LocalCluster
from tests.test_programs import build, by_key
from tests.training import training_graph


def deep(batch: int = 2) -> Graph:
    """Many maps of one size, with BatchNorm, dropout, a function whose input is kept; a pool, a concatenation."""
    net = Net((batch, 3, 16, 14))
    x = net.relu(net.batch_norm(net.conv(net.x, 8)))
    x = net.dropout(net.relu(net.conv(x, 8)))
    x = net.leaky(net.batch_norm(net.conv(x, 8)))
    x = net.function("Softplus", net.conv(x, 8))
    x = net.relu(net.conv(net.add(x, net.relu(net.conv(x, 8))), 8))
    x = net.concat(net.relu(net.conv(x, 8)), net.conv(x, 8, bias=True))
    x = net.max_pool(x, kernel=3, stride=2, pads=(1, 1, 1, 1))
    x = net.relu(net.batch_norm(net.conv(x, 8)))
    return net.done(net.gemm(net.flatten(net.global_pool(x)), 4))


def capped(nodes: int, arena_bytes: list[float]) -> Cluster:
    cluster = local_cluster(nodes)
    members = [
        replace(node, device=replace(node.device, memory_bytes=int(INTERPRETER_bytes + arena)))
        for node, arena in zip(cluster.nodes, arena_bytes, strict=True)
    ]
    return replace(cluster, nodes=tuple(members))


def two_steps(folder: Path, graph: Graph) -> list[bytes]:
    cluster, bits = LocalCluster(folder), []
    for step in (1, 2):
        values = by_key(graph, feeds(graph, seed=step) | {"step": np.array([step], np.int32)})
        bits.append(np.float32(cluster.step(values)).tobytes())
        bits += [value.tobytes() for _, value in sorted(cluster.gradients.items())]
    return bits + [value.tobytes() for _, value in sorted(cluster.parameters().items())]


@pytest.mark.parametrize(
    ("nodes", "plan"), [(1, "single"), (2, "grid:2x1"), (2, "batch"), (2, "channel"), (3, "grid:3x1"), (4, "grid:2x2")]
)
def test_less_memory_and_the_same_bits(nodes: int, plan: str, tmp_path: Path) -> None:
    free = build(deep(4), tmp_path / "free", plan, nodes)
    arenas = [node["arena_bytes"] for node in read_plan(free)["nodes"]]
    goal = [0.85 * max(arenas)] * nodes
    tight = build(deep(4), tmp_path / "tight", plan, capped(nodes, goal))
    described = read_plan(tight)
    assert all(node["arena_bytes"] <= most for node, most in zip(described["nodes"], goal, strict=True))
    assert described["recomputed"]["seconds"] > read_plan(free)["recomputed"]["seconds"]
    assert "saves" in recomputed_text(described)
    graph = training_graph(deep(4))
    assert two_steps(tight, graph) == two_steps(free, graph)


def test_the_smallest_memory_that_is_told_does(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit) as caught:
        build(deep(), tmp_path / "small", "single", capped(1, [1.0]))
    message = str(caught.value)
    assert "node 'node0' has 48 MB" in message and "too much, at layer" in message and "node (" in message
    smallest = message.split('memory = "')[1].split("MB")[0]
    room = int(smallest) * 1e6 - INTERPRETER_bytes
    assert build(deep(), tmp_path / "fits", "single", capped(1, [room])).is_dir()
    assert not (tmp_path / "small" / "build").exists()


def test_a_device_that_lacks_memory_is_the_one_that_is_named(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="node 'node1' has 48 MB"):
        build(deep(), tmp_path, "grid:2x1", capped(2, [1e9, 1.0]))
