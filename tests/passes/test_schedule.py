"""Schedules: transfers paired, inputs there in time, no deadlock; and `check` sees it where there is one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from fusetile.box import contains, volume
from fusetile.cluster import local_cluster
from fusetile.errors import PlanError
from fusetile.graph import UPDATE, Graph
from fusetile.ops import domain_of
from fusetile.passes.communicate import Communication
from fusetile.passes.schedule import (
    Action,
    Await,
    Compute,
    Pack,
    Place,
    Post,
    Schedule,
    Ship,
    SMALL_bytes,
    Transfer,
    check,
    schedule,
)
from fusetile.plan import Plan
from tests.graphs import NETWORKS
from tests.passes.golden import assert_golden, schedule_text, small
from tests.training import PLAIN, planned, training_graph

PLANS = [(2, "grid:2x1"), (2, "channel"), (6, "batch"), (4, "grid:2x2"), (4, "random:1"), (3, "auto"), (6, "random:2")]
cases = pytest.mark.parametrize(("name", "nodes", "plan"), [(name, *plan) for name in NETWORKS for plan in PLANS])


@cache
def scheduled(name: str, nodes: int, plan: str) -> tuple[Graph, Plan, Communication, Schedule]:
    graph = training_graph(NETWORKS[name](2) if name in NETWORKS else small())
    placed, communication = planned(graph, plan, nodes, halo="exchange")
    return graph, placed, communication, schedule(graph, placed, communication, cluster=local_cluster(placed.nodes))


@pytest.mark.parametrize("plan", ["grid:2x1", "channel"])
def test_schedule_golden(plan: str) -> None:
    graph = training_graph(small(), optimizer=PLAIN)
    placed, communication = planned(graph, plan, 2, halo="exchange")
    found = schedule(graph, placed, communication, cluster=local_cluster(placed.nodes))
    assert_golden(f"schedule_{plan.replace(':', '_')}", schedule_text(found, communication))


@cases
def test_every_device_computes_its_part_in_one_global_order(name: str, nodes: int, plan: str) -> None:
    graph, placed, _, found = scheduled(name, nodes, plan)
    assert sorted(found.order) == sorted(graph.ops)
    known = {*graph.parameters, *graph.fed()}
    read_later: dict[str, int] = {}
    for at, op_name in enumerate(found.order):
        op = graph.ops[op_name]
        assert set(op.inputs) <= known
        known |= set(op.outputs)
        read_later |= dict.fromkeys(op.inputs, at)
    for op in graph.ops.values():  # updates are in place: nothing may read the old value after them
        if op.phase == UPDATE:
            at = found.order.index(op.name)
            for old, new in graph.next_value.items():
                assert new not in op.outputs or read_later[old] == at
    for device, actions in enumerate(found.actions):
        mine = [name for name in found.order if volume(placed.placements[name].compute[device])]
        assert [action.op for action in actions if isinstance(action, Compute)] == mine


@cases
def test_sends_match_receives_and_each_end_does_its_part_once(name: str, nodes: int, plan: str) -> None:
    _, _, communication, found = scheduled(name, nodes, plan)
    moves = [(i, move) for i, delivery in enumerate(communication.deliveries) for move in delivery.transfers()]
    carried = [(part.delivery, part.move) for transfer in found.transfers for part in transfer.parts]
    assert sorted(map(repr, moves)) == sorted(map(repr, carried))
    for transfer in found.transfers:
        assert all((p.move.source, p.move.target) == (transfer.source, transfer.target) for p in transfer.parts)
    done = Counter(
        (type(action), device, tag)
        for device, actions in enumerate(found.actions)
        for action in actions
        if isinstance(action, Pack | Ship | Post | Await)
        for tag in (action.tags if isinstance(action, Await) else (action.tag,))
    )
    ends = [((Pack, Ship, Await), t.source, t.tag) for t in found.transfers]
    ends += [((Post, Await), t.target, t.tag) for t in found.transfers]
    assert done == Counter((kind, device, tag) for kinds, device, tag in ends for kind in kinds)


@cases
def test_what_an_op_reads_is_there_and_what_is_sent_is_written(name: str, nodes: int, plan: str) -> None:
    """On every device: Ship after the tensor's op, Place after the transfers that it needs, reading after Place."""
    graph, placed, communication, found = scheduled(name, nodes, plan)
    producers = graph.producers()
    for device, actions in enumerate(found.actions):
        computed: set[str] = set()
        complete: set[int] = set()
        ready: set[int] = {
            i for i, d in enumerate(communication.deliveries) if not any(m.target == device for m in d.moves)
        }
        for action in actions:
            match action:
                case Compute(op):
                    for i, tensor in enumerate(graph.ops[op].inputs):
                        index = communication.reads[op, tensor]
                        need = domain_of(graph, graph.ops[op]).need(placed.placements[op].compute[device], i)
                        mine = communication.deliveries[index].in_place[device] and contains(
                            communication.layouts[communication.deliveries[index].tensor].have[device], need
                        )
                        assert mine or index in ready, f"{op} reads {tensor} before it is there"
                    computed.add(op)
                case Pack(tag) | Ship(tag):
                    for part in found.transfers[tag].parts:
                        tensor = communication.deliveries[part.delivery].tensor
                        if tensor in producers:
                            assert producers[tensor].name in computed
                        else:
                            new = producers[graph.next_value[tensor]].name
                            assert new not in computed, "the next step's value would be sent"
                case Await(tags):
                    complete |= set(tags)
                case Place(delivery):
                    coming = {
                        transfer.tag
                        for transfer in found.transfers
                        for part in transfer.parts
                        if part.delivery == delivery and transfer.target == device
                    }
                    assert coming <= complete
                    ready.add(delivery)
        assert set(placed.placements) >= computed


@cases
def test_random_speeds_never_block(name: str, nodes: int, plan: str) -> None:
    """Devices advance in random turns; an Await passes when its transfers are shipped and posted."""
    _, _, _, found = scheduled(name, nodes, plan)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        at, shipped, posted = [0] * nodes, set(), set()
        while any(at[d] < len(found.actions[d]) for d in range(nodes)):
            moved = False
            for device in rng.permutation(nodes):
                for _ in range(rng.integers(1, 9)):
                    if at[device] == len(found.actions[device]):
                        break
                    action = found.actions[device][at[device]]
                    if isinstance(action, Await) and not set(action.tags) <= shipped & posted:
                        break
                    if isinstance(action, Ship):
                        shipped.add(action.tag)
                    if isinstance(action, Post):
                        posted.add(action.tag)
                    at[device] += 1
                    moved = True
            assert moved, "all devices wait"


def moved(communication: Communication, transfer: Transfer) -> str:
    return communication.deliveries[transfer.parts[0].delivery].tensor


def test_small_moves_of_one_moment_travel_together() -> None:
    """The parameters that a step begins with: a message per pair of devices and op that they begin with, large ones
    apart."""
    graph, _, communication, found = scheduled("normalized", 3, "batch")
    parameters = {t.tag for t in found.transfers if moved(communication, t) in graph.parameters}
    gathered = []
    for actions in found.actions:
        ops = 0
        for action in actions:
            ops += isinstance(action, Compute)
            if isinstance(action, Ship) and action.tag in parameters and len(found.transfers[action.tag].parts) > 1:
                gathered.append((found.transfers[action.tag].source, found.transfers[action.tag].target, ops))
    assert gathered and len(gathered) == len(set(gathered))
    for transfer in found.transfers:
        sizes = [
            volume(p.move.box) * np.dtype(t).itemsize for p, t in zip(transfer.parts, transfer.dtypes, strict=True)
        ]
        assert len(sizes) == 1 or max(sizes) <= SMALL_bytes


def test_input_gradients_come_before_weight_gradients() -> None:
    graph, _, _, found = scheduled("plain", 2, "grid:2x1")
    for op in graph.ops.values():
        if op.kind.endswith("WeightGrad"):
            twin = [o for o in graph.ops.values() if o.layer == op.layer and o.kind.endswith("InputGrad")]
            assert all(found.order.index(other.name) < found.order.index(op.name) for other in twin)


# -- what `check` catches --------------------------------------------------------------------------------------------


def with_actions(found: Schedule, device: int, actions: list[Action]) -> Schedule:
    return replace(found, actions=tuple(tuple(actions) if d == device else a for d, a in enumerate(found.actions)))


def index_of(actions: tuple[Action, ...], kind: type) -> int:
    return next(i for i, action in enumerate(actions) if isinstance(action, kind))


@pytest.mark.parametrize("kind", [Ship, Post])
def test_a_transfer_without_its_other_end_is_caught(kind: type) -> None:
    *_, found = scheduled("plain", 2, "grid:2x1")
    for device in range(2):
        actions = list(found.actions[device])
        del actions[index_of(found.actions[device], kind)]
        with pytest.raises(PlanError, match=r"blocks on devices \[0, 1\]"):
            check(with_actions(found, device, actions), 2)


def test_an_unpaired_transfer_that_nobody_awaits_is_caught() -> None:
    *_, found = scheduled("plain", 2, "grid:2x1")
    tag = found.transfers[-1].tag
    actions = []
    for device in found.actions:
        kept = [Await(tuple(t for t in a.tags if t != tag)) if isinstance(a, Await) else a for a in device]
        actions.append(tuple(a for a in kept if not (isinstance(a, Ship) and a.tag == tag)))
    with pytest.raises(PlanError, match="unpaired"):
        check(replace(found, actions=tuple(actions)), 2)


@pytest.mark.parametrize("kind", [Ship, Post])
def test_a_transfer_that_is_started_twice_or_by_another_device_is_caught(kind: type) -> None:
    *_, found = scheduled("plain", 2, "grid:2x1")
    actions = list(found.actions[0])
    at = index_of(found.actions[0], kind)
    with pytest.raises(PlanError, match="twice, or by a wrong device"):
        check(with_actions(found, 0, [*actions[: at + 1], *actions[at:]]), 2)
    other = [actions[at], *found.actions[1]]
    with pytest.raises(PlanError, match="twice, or by a wrong device"):
        check(with_actions(found, 1, other), 2)


def test_a_deadlock_is_caught() -> None:
    """Each device waits for the other's message before it sends its own."""
    *_, found = scheduled("plain", 2, "grid:2x1")
    crossing = [[t.tag for t in found.transfers if (t.source, t.target) == ends] for ends in ((0, 1), (1, 0))]
    actions = tuple((Await((crossing[1 - device][-1],)), *found.actions[device]) for device in range(2))
    with pytest.raises(PlanError, match=r"blocks on devices \[0, 1\]"):
        check(replace(found, actions=actions), 2)


def test_the_unchanged_schedule_passes() -> None:
    *_, found = scheduled("plain", 2, "grid:2x1")
    check(found, 2)
