"""What is live if maps are computed again, against going through all steps one by one."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fusetile.box import volume
from fusetile.cluster import local_cluster
from fusetile.graph import BACKWARD, FORWARD, Graph, Op
from fusetile.ops import overwritten
from fusetile.passes.lifetimes import Again, Lifetimes
from fusetile.passes.order import late_ops
from fusetile.passes.schedule import schedule
from tests.graphs import NETWORKS
from tests.training import planned, training_graph

Step = tuple[Op, bool, list[str], list[str]]  # whether it is a copy, what it reads, what it writes


def steps_of(graph: Graph, order: list[Op], again: Again) -> list[Step]:
    """All in order: a copy right above its first reader; the late ops that the reader overtook come before copies."""
    steps: list[Step] = []
    producers, late = graph.producers(), late_ops(graph)
    number = {name: i for i, name in enumerate(graph.ops)}
    there: set[str] = set()

    def read(name: str) -> str:
        if name not in again:
            return name
        op = producers[name]
        if op.name not in there:
            there.add(op.name)
            steps.append((op, True, [read(part) for part in op.inputs], [f"{each}'" for each in op.outputs]))
        return f"{name}'"

    def run(op: Op) -> None:
        if any(step[0] is op and not step[1] for step in steps):
            return
        inputs = list(op.inputs)
        if op.phase == BACKWARD:
            if op.name not in late and any(name in again and producers[name].name not in there for name in inputs):
                for other in order[order.index(op) + 1 :]:
                    if other.name in late and number[other.name] < number[op.name]:
                        run(other)
            inputs = [read(name) for name in inputs]
        steps.append((op, False, inputs, list(op.outputs)))

    for op in order:
        run(op)
    return steps


def live_of(graph: Graph, steps: list[Step], sizes: dict[str, int]) -> list[int]:
    """Bytes at every step. What an op may overwrite, and nothing needs any more, ends before it."""
    live = [0] * len(steps)
    lasting = {*graph.gradients.values(), graph.loss}
    for start, (_, _, _, writes) in enumerate(steps):
        for name in writes:
            end = max([start, *(at for at, step in enumerate(steps) if name in step[2])])
            op, _, reads, _ = steps[end]
            for place in overwritten(graph, op) if end > start else ():
                place = f"{place}'" if f"{place}'" in reads else place
                needed = place in lasting or any(place in step[2] for step in steps[end + 1 :])
                if not needed:
                    end -= place == name
                    break
            for at in range(start, end + 1):
                live[at] += sizes.get(name.removesuffix("'"), 0)
    return live


@pytest.mark.parametrize("name", NETWORKS)
def test_live_bytes_of_random_choices(name: str) -> None:
    graph = training_graph(NETWORKS[name](2))
    plan, communication = planned(graph, "random:1", 3)
    names = schedule(graph, plan, communication, cluster=local_cluster(3)).order
    order = [graph.ops[name] for name in names]
    sizes = {name: 4 * volume(tuple((0, n) for n in tensor.shape)) for name, tensor in graph.tensors.items()}
    maps = [name for op in order if op.phase == FORWARD for name in op.outputs if len(graph.tensors[name].shape) == 4]
    counted = {name: np.array([size]) for name, size in sizes.items() if name not in graph.parameters}
    scratch = [np.array([number % 7]) for number in range(len(order))]
    lifetimes = Lifetimes(graph, order, counted, scratch, np.array([100]))
    draw = random.Random(name)
    for count in [0, len(maps), *(draw.randint(1, len(maps)) for _ in range(6))]:
        again = frozenset(draw.sample(maps, count))
        steps = steps_of(graph, order, again)
        live, copies = lifetimes.live(again)
        assert [op.name for op in copies] == [op.name for op, copied, *_ in steps if copied]
        expected = live_of(graph, steps, {name: int(size[0]) for name, size in counted.items()})
        own = [int(scratch[order.index(op)][0]) for op, *_ in steps]
        assert live[:, 0].tolist() == [100 + size + more for size, more in zip(expected, own, strict=True)], again
