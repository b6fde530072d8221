"""The analytic cost of every candidate of every unit, and of every pair of candidates of two units that meet.

    A = compute of the busiest device + transfers that somebody waits for        N = time that the busiest link is busy

Both are sums of node tables [candidates] and edge tables [candidates of u, candidates of v]; a step takes about
max(A, N). Everything is derived from the graph's own tensors and their layouts: a halo, a change of layout, the sums of
BatchNorm, a gradient's reduce-scatter and the all-gather of updated weights are all one box arithmetic, as in
`redistribute`. Halos count as exchanged, and an input gradient travels while its layer's weight gradient is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusetile.cluster import Cluster, MESSAGE_seconds
from fusetile.cost import kind_of
from fusetile.graph import FORWARD, UPDATE, Graph
from fusetile.passes.communicate import wire_dtype
from fusetile.passes.keep import originals
from fusetile.planner.candidates import Candidate
from fusetile.planner.geometry import Geometry, Home, Placed, placed_units, volumes
from fusetile.planner.units import Unit

Array = np.ndarray
Pair = tuple[int, int]

_LATE = ("ConvWeightGrad", "GemmWeightGrad", "ChannelSum", "NormalizeParameterGrad")
"""Nothing but an update waits for them."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Node and edge tables of a quantity, in seconds."""

    nodes: list[Array]
    edges: dict[Pair, Array]

    def of(self, choice: Sequence[int]) -> float:
        """The quantity of a plan: a candidate per unit."""
        return float(self.of_each(np.array([choice]))[0])

    def of_each(self, choices: Array) -> Array:
        """Of plans [plans, units]: [plans]."""
        nodes = sum(table[choices[:, u]] for u, table in enumerate(self.nodes))
        return nodes + sum(table[choices[:, u], choices[:, v]] for (u, v), table in self.edges.items())


@dataclass(frozen=True, slots=True)
class Model:
    """`compute` + `waiting` = A, `busy` = N. `held_bytes[u][candidate, device]`: what a unit keeps from its forward to
    its backward pass, and its parameters with gradient and velocity."""

    compute: list[Array]
    waiting: Sums
    busy: Sums
    held_bytes: list[Array]

    def mixed(self, waiting: float, busy: float, held: Array | None = None) -> Sums:
        """compute + `waiting` * waiting + `busy` * busy (+ the worst of `held` per byte on each device)."""
        nodes = [
            c + waiting * w + busy * b
            for c, w, b in zip(self.compute, self.waiting.nodes, self.busy.nodes, strict=True)
        ]
        if held is not None:
            nodes = [table + (m * held).max(1) for table, m in zip(nodes, self.held_bytes, strict=True)]
        edges = {pair: waiting * w + busy * self.busy.edges[pair] for pair, w in self.waiting.edges.items()}
        return Sums(nodes, edges)

    def weighed(self, weight: float) -> Sums:
        """(1 - weight) A + weight N."""
        nodes = [
            (1 - weight) * (c + w) + weight * b
            for c, w, b in zip(self.compute, self.waiting.nodes, self.busy.nodes, strict=True)
        ]
        edges = {pair: (1 - weight) * w + weight * self.busy.edges[pair] for pair, w in self.waiting.edges.items()}
        return Sums(nodes, edges)

    @property
    def critical(self) -> Sums:
        """A."""
        return self.mixed(1.0, 0.0)

    def seconds(self, choice: Sequence[int]) -> float:
        """max(A, N) of a plan."""
        critical = sum(float(table[i]) for table, i in zip(self.compute, choice, strict=True))
        return max(critical + self.waiting.of(choice), self.busy.of(choice))


def model_of(
    graph: Graph, units: Sequence[Unit], candidates: Sequence[Sequence[Candidate]], *, cluster: Cluster, block: int
) -> Model:
    """Tables for all units and for all pairs of units that exchange a tensor."""
    geometry = placed_units(graph, units, candidates, speeds=cluster.speeds, block=block)
    builder = _Builder(graph, geometry, cluster, [len(found) for found in candidates])
    for placed in geometry.ops.values():
        builder.add_compute(placed)
    for unit, compute in enumerate(builder.late):
        builder.compute[unit] = builder.early[unit].max(2).sum(0) + compute.max(1)
    for name, home in geometry.homes.items():
        builder.add_transfers(name, home)
    waiting, busy = Sums(builder.waits, builder.edge_waits), Sums(builder.busy, builder.edge_busy)
    return Model(builder.compute, waiting, busy, builder.held)


class _Builder:
    def __init__(self, graph: Graph, geometry: Geometry, cluster: Cluster, counts: Sequence[int]) -> None:
        nodes = len(cluster.nodes)
        self.graph, self.geometry, self.link = graph, geometry, cluster.link
        self.nodes = cluster.nodes
        self.early = [np.zeros((2, count, nodes)) for count in counts]  # forward; backward up to the input gradient
        self.late = [np.zeros((count, nodes)) for count in counts]  # weight gradients and updates
        self.compute = [np.zeros(count) for count in counts]
        self.waits = [np.zeros(count) for count in counts]
        self.busy = [np.zeros(count) for count in counts]
        self.held = [np.zeros((count, nodes)) for count in counts]
        self.edge_waits: dict[Pair, Array] = {}
        self.edge_busy: dict[Pair, Array] = {}
        self.known: dict[tuple[bytes, ...], tuple[Array, Array]] = {}
        placed = {name: [op for op in ops if op.name in geometry.ops] for name, ops in graph.consumers().items()}
        self.readers = placed
        self.kept = {tensor for name in originals(graph) for tensor in graph.ops[name].outputs}

    def add_compute(self, placed: Placed) -> None:
        """What `cost.seconds_on` says, for all candidates and devices at once."""
        op = placed.op
        kind = kind_of(self.graph, op)
        work = zip(self.nodes, placed.flops.T, placed.traffic_bytes.T, strict=True)
        seconds = np.stack([node.speed(kind).seconds(flops, traffic) for node, flops, traffic in work], 1)
        if op.phase == UPDATE or op.kind in _LATE:
            self.late[placed.unit] += seconds
        else:
            self.early[placed.unit][0 if op.phase == FORWARD else 1] += seconds

    def add_transfers(self, name: str, home: Home) -> None:
        """A tensor's way to its readers in each unit, and the memory that it takes if it is kept."""
        readers = self.readers[name]
        if home.forward and any(reader.phase != FORWARD for reader in readers):
            self.held[home.unit] += home.size * volumes(home.have)
        using = [op.name for op in readers if op.phase != UPDATE and self.geometry.ops[op.name].unit == home.unit]
        if home.persists and using:  # and twice more as gradient and velocity
            self.held[home.unit] += 3 * home.size * volumes(self.geometry.need(name, using))
        size = np.dtype(wire_dtype(self.graph, name, self.link)).itemsize
        for unit in sorted({self.geometry.ops[reader.name].unit for reader in readers}):
            ops = [reader for reader in readers if self.geometry.ops[reader.name].unit == unit]
            if name in self.kept and unit != home.unit:
                continue  # see passes/keep.py: a map is rather kept than sent again
            need = self.geometry.need(name, [op.name for op in ops])
            awaited = any(op.phase != UPDATE for op in ops)
            awaited &= not (home.forward and all(op.phase != FORWARD for op in ops)) and not home.persists
            busy, messages = self._transfer(home, need, size, same=unit == home.unit)
            wait = np.where(messages > 0, busy + self.link.latency_seconds, 0.0) if awaited else np.zeros_like(busy)
            if unit == home.unit:
                self.busy[unit] += busy
                self.waits[unit] += wait
                continue
            if not home.forward:
                wait = np.maximum(0.0, wait - self.late[home.unit].max(1)[:, None])
            self._add_edge(home.unit, unit, wait, busy)

    def _add_edge(self, source: int, target: int, wait: Array, busy: Array) -> None:
        pair = (min(source, target), max(source, target))
        if source > target:
            wait, busy = wait.T, busy.T
        self.edge_waits[pair] = self.edge_waits.get(pair, 0.0) + wait
        self.edge_busy[pair] = self.edge_busy.get(pair, 0.0) + busy

    def _transfer(self, home: Home, need: Array, element_bytes: int, *, same: bool) -> tuple[Array, Array]:
        """Seconds of the busiest link and messages of the busiest device: [candidates of the producer, candidates of
        the reader], or one axis if they are the same unit. `element_bytes` on the wire."""
        key = (home.have.tobytes(), home.own.tobytes(), need.tobytes(), bytes([same, element_bytes]))
        if key not in self.known:
            have, own, partial = home.have, home.own, home.partial
            if not same:
                have, own, need, partial = have[:, None], own[:, None], need[None], partial[:, None]
            moved = _overlap(own[..., :, None, :, :], need[..., None, :, :, :])
            there = _overlap(own[..., :, None, :, :], need[..., None, :, :, :], have[..., None, :, :, :])
            moved = moved - np.where(partial[..., None, None], 0, there)
            moved *= 1 - np.eye(moved.shape[-1], dtype=moved.dtype)
            size = np.maximum(moved.sum(-1).max(-1), moved.sum(-2).max(-1)) * element_bytes
            some = moved > 0
            messages = np.maximum(some.sum(-1).max(-1), some.sum(-2).max(-1))
            self.known[key] = (size / self.link.bytes_per_second + messages * MESSAGE_seconds, messages)
        return self.known[key]


def _overlap(*boxes: Array) -> Array:
    """Elements that boxes [..., dimension, 2] have in common."""
    start, stop = boxes[0][..., 0], boxes[0][..., 1]
    for box in boxes[1:]:
        start, stop = np.maximum(start, box[..., 0]), np.minimum(stop, box[..., 1])
    return np.maximum(stop - start, 0).prod(-1)
