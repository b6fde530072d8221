"""Buffers and their places: borders, blocks and homes; live buffers never overlap; what does not fit is said."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from fusetile.box import contains, hull, volume
from fusetile.cluster import local_cluster
from fusetile.codegen.calls import KernelCall
from fusetile.codegen.draft import Draft, DraftRecv, DraftSend, lifetimes, memory_of
from fusetile.codegen.emit import emit
from fusetile.codegen.laid_out import LaidOut
from fusetile.codegen.targets import TARGETS
from fusetile.errors import DoesNotFit
from fusetile.graph import Graph
from fusetile.ops import domain_of, overwritten, row
from fusetile.passes.buffers import buffers
from fusetile.passes.communicate import aligned
from fusetile.passes.fit import INTERPRETER_bytes, fit
from fusetile.passes.plan_memory import MemoryPlan, plan_memory
from fusetile.passes.schedule import schedule
from fusetile.program import ALIGNMENT_bytes, Buffer, Wait
from tests.graphs import NETWORKS
from tests.passes.golden import assert_golden, buffers_text, memory_text, small
from tests.training import PLAIN, planned, training_graph

PLANS = [(1, "single"), (2, "grid:2x1"), (3, "channel"), (3, "batch"), (4, "grid:2x2"), (4, "random:1")]
cases = pytest.mark.parametrize(("name", "nodes", "plan"), [(name, *plan) for name in NETWORKS for plan in PLANS])


@cache
def drafted(name: str, nodes: int, plan: str) -> tuple[Draft, ...]:
    graph = training_graph(NETWORKS[name](2))
    placed, communication = planned(graph, plan, nodes)
    order = schedule(graph, placed, communication, cluster=local_cluster(placed.nodes))
    storage = buffers(graph, placed, communication, order.order, block=8)
    return emit(LaidOut(graph, placed, communication, order, storage, [TARGETS["avx2"]] * nodes), block=8)


# -- buffers ---------------------------------------------------------------------------------------------------------


def test_buffers_golden() -> None:
    graph = training_graph(small(), optimizer=PLAIN)
    placed, communication = planned(graph, "grid:2x1", 2, halo="exchange")
    order = schedule(graph, placed, communication, cluster=local_cluster(placed.nodes)).order
    assert_golden("buffers", buffers_text(buffers(graph, placed, communication, order, block=8)))


@cases
@pytest.mark.parametrize("block", [8, 16])
def test_buffers_hold_what_is_computed_and_read_with_its_padding(name: str, nodes: int, plan: str, block: int) -> None:
    graph: Graph = training_graph(NETWORKS[name](2))
    placed, communication = planned(graph, plan, nodes, halo="exchange", block=block)
    order = schedule(graph, placed, communication, cluster=local_cluster(placed.nodes)).order
    for device, held in enumerate(buffers(graph, placed, communication, order, block=block)):
        names = {id(buffer): buffer.name for buffer in (*held.home.values(), *held.delivered.values())}
        assert len(set(names.values())) == len(names)
        for old, new in graph.next_value.items():
            assert held.home.get(old) is held.home.get(new)
        for index, buffer in held.delivered.items():
            tensor = communication.deliveries[index].tensor
            assert contains(buffer.box, communication.deliveries[index].need[device])
            assert communication.deliveries[index].in_place[device] == (held.home.get(tensor) is buffer)
        for buffer in (*held.home.values(), *held.delivered.values()):
            for (start, _), granule in zip(buffer.box[:2], buffer.block, strict=False):
                assert len(buffer.box) < 2 or start % granule == 0
        for op in graph.ops.values():
            box, axes = placed.placements[op.name].compute[device], domain_of(graph, op)
            if not volume(box):
                continue
            for o, output in enumerate(op.outputs):
                assert contains(held.home[output].box, axes.output(box, o))
            for i, tensor in enumerate(op.inputs):
                need, reach = axes.need(box, i), axes.reach(box, i)
                if not volume(need):
                    continue
                buffer = held.delivered[communication.reads[op.name, tensor]]
                assert contains(buffer.box, aligned(need, graph.tensors[tensor], block))
                if i in row(op.kind).padded and len(need) == 4:
                    for border, inside, beyond in zip(buffer.border, need[2:], reach[2:], strict=True):
                        assert border >= max(inside[0] - beyond[0], beyond[1] - inside[1])


def test_a_halo_that_comes_is_received_beside_what_is_there() -> None:
    graph = training_graph(NETWORKS["plain"](2))
    placed, communication = planned(graph, "grid:2x1", 2, halo="exchange")
    order = schedule(graph, placed, communication, cluster=local_cluster(placed.nodes)).order
    storage = buffers(graph, placed, communication, order, block=8)
    index, delivery = next(
        (i, d) for i, d in enumerate(communication.deliveries) if d.transfers() and d.tensor.startswith("maxpool")
    )
    have = communication.layouts[delivery.tensor].have
    for device in range(2):
        home = storage[device].home[delivery.tensor]
        assert storage[device].delivered[index] is home
        assert home.box == hull([have[device], delivery.need[device]]) != have[device]
        assert max(home.border) > 0


@cases
def test_a_shared_home_is_overwritten_only_after_the_last_reader(name: str, nodes: int, plan: str) -> None:
    graph = training_graph(NETWORKS[name](2))
    placed, communication = planned(graph, plan, nodes)
    order = schedule(graph, placed, communication, cluster=local_cluster(placed.nodes)).order
    position = {op: i for i, op in enumerate(order)}
    readers, producers = graph.consumers(), graph.producers()
    for held in buffers(graph, placed, communication, order, block=8):
        tenants: dict[int, list[str]] = {}
        for tensor, buffer in held.home.items():
            if tensor not in graph.next_value and tensor not in graph.next_value.values():
                tenants.setdefault(id(buffer), []).append(tensor)
        for tensors in tenants.values():
            tensors.sort(key=lambda tensor: position[producers[tensor].name])
            for before, after in pairwise(tensors):
                written = producers[after]
                assert before in overwritten(graph, written)
                assert max(position[reader.name] for reader in readers[before]) == position[written.name]
                assert before not in graph.gradients.values() and before != graph.loss
        if name == "normalized" and plan == "single":
            assert max(map(len, tenants.values())) > 1


# -- plan_memory -----------------------------------------------------------------------------------------------------


def assert_disjoint(memory: MemoryPlan, sizes: dict[str, int]) -> None:
    """No byte belongs to two buffers at one time; all lie inside the arena, aligned."""
    items = [
        (memory.offsets[name], memory.offsets[name] + size, *memory.live[name], name) for name, size in sizes.items()
    ]
    for i, (low, high, first, last, name) in enumerate(items):
        assert low % ALIGNMENT_bytes == 0 and low >= 0 and high <= memory.arena_bytes
        for other_low, other_high, other_first, other_last, other in items[:i]:
            apart_in_time = last < other_first or other_last < first
            assert apart_in_time or high <= other_low or other_high <= low, (name, other)


def lower_bound(memory: MemoryPlan, sizes: dict[str, int]) -> int:
    """The most that is live at one step."""
    steps = {step for name in sizes for step in memory.live[name]}
    return max(
        sum(size for name, size in sizes.items() if memory.live[name][0] <= step <= memory.live[name][1])
        for step in steps
    )


@pytest.mark.parametrize("seed", range(40))
def test_random_lifetimes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 40))
    sizes = {f"b{i}": int(size) for i, size in enumerate(rng.integers(1, 5000, count))}
    live = {name: tuple(sorted(rng.integers(0, 30, 2).tolist())) for name in sizes}
    buffers = [Buffer(name, ((0, size),), "uint8") for name, size in sizes.items()]
    memory, packed = (plan_memory(buffers, live, rounds=rounds) for rounds in (1, 20))
    assert_disjoint(memory, sizes)
    assert_disjoint(packed, sizes)
    assert packed.arena_bytes <= memory.arena_bytes
    least = lower_bound(memory, sizes)
    assert memory.peak_bytes == lower_bound(memory, memory.sizes_bytes)
    assert least <= memory.arena_bytes <= 1.7 * least + ALIGNMENT_bytes * count


def test_what_never_lives_takes_no_place() -> None:
    memory = plan_memory([Buffer("used", ((0, 16),)), Buffer("unused", ((0, 16),))], {"used": (0, 3)})
    assert memory.offsets == {"used": 0} and memory.arena_bytes == 64
    assert plan_memory([], {}).arena_bytes == 0


def test_buffers_that_meet_in_one_step_do_not_share() -> None:
    both = [Buffer(name, ((0, 16),)) for name in "ab"]
    assert plan_memory(both, {"a": (0, 3), "b": (3, 5)}).arena_bytes == 128
    assert plan_memory(both, {"a": (0, 3), "b": (4, 5)}).arena_bytes == 64


@cases
def test_live_buffers_of_programs_never_overlap(name: str, nodes: int, plan: str) -> None:
    for draft in drafted(name, nodes, plan):
        memory = memory_of(draft)
        sizes = {buffer: draft.buffers[buffer].size_bytes for buffer in memory.offsets}
        assert_disjoint(memory, sizes)
        least = lower_bound(memory, sizes)
        assert least <= memory.arena_bytes <= 1.3 * least + ALIGNMENT_bytes * len(sizes)


@cases
def test_buffers_live_from_their_first_use_until_a_transfer_is_awaited(name: str, nodes: int, plan: str) -> None:
    for draft in drafted(name, nodes, plan):
        live, awaited = lifetimes(draft), {}
        for at, step in enumerate(draft.steps):
            if isinstance(step, Wait):
                awaited |= dict.fromkeys(step.tags, at)
        for at, step in enumerate(draft.steps):
            if isinstance(step, DraftSend | DraftRecv):
                first, last = live[step.at.buffer]
                assert first <= at < awaited[step.tag] <= last
            elif not isinstance(step, Wait):
                assert all(live[p.buffer][0] <= at <= live[p.buffer][1] for p in step.pointers)
        for buffer in draft.persistent:
            assert live[buffer] == (-1, len(draft.steps))
        assert all(live[buffer][0] == -1 for buffer in draft.fed)
        assert all(live[buffer][1] == len(draft.steps) for buffer in draft.logged)


@cases
def test_parameters_exist_once_and_gradients_die_with_their_update(name: str, nodes: int, plan: str) -> None:
    graph = training_graph(NETWORKS[name](2))
    readers, states = graph.consumers(), {*graph.parameters, *graph.next_value.values()}
    for draft in drafted(name, nodes, plan):
        live = lifetimes(draft)
        calls: dict[str, int] = {}  # op -> its last step
        for at, step in enumerate(draft.steps):
            if isinstance(step, KernelCall):
                calls[step.op] = at
        for buffer in draft.buffers:
            tensor = buffer.split(" for ")[0]
            if tensor in states:  # a parameter, its next value, or a copy for a reader that has not its box
                assert tensor in graph.parameters
                assert (buffer in draft.persistent) == (buffer == tensor or tensor not in graph.next_value)
            if tensor in graph.gradients.values() and nodes == 1:  # elsewhere sums go on the way to other devices
                assert live[buffer][1] == max(calls[op.name] for op in readers[tensor])


def test_plan_memory_golden() -> None:
    graph = training_graph(small(), optimizer=PLAIN)
    placed, communication = planned(graph, "single", 1)
    order = schedule(graph, placed, communication, cluster=local_cluster(placed.nodes))
    storage = buffers(graph, placed, communication, order.order, block=8)
    (draft,) = emit(LaidOut(graph, placed, communication, order, storage, [TARGETS["avx2"]]), block=8)
    homes = [buffer for held in storage for buffer in dict.fromkeys(held.home.values())]
    live = {name: when for name, when in lifetimes(draft).items() if name in {buffer.name for buffer in homes}}
    order_of = {step: i for i, step in enumerate(sorted({step for when in live.values() for step in when}))}
    compact = {name: (order_of[first], order_of[last]) for name, (first, last) in live.items()}
    assert_golden("plan_memory", memory_text(plan_memory(homes, compact)))


# -- fit -------------------------------------------------------------------------------------------------------------

LAYERS = [f"layer {i}" for i in range(10)]


def test_what_does_not_fit_is_said() -> None:
    cluster = local_cluster(2, target="pi3")
    small_one = plan_memory([Buffer("y", ((0, 1000),))], {"y": (0, 1)})
    large_one = plan_memory(
        [Buffer("conv1", ((0, 300_000_000),)), Buffer("y", ((0, 1000),))], {"conv1": (3, 9), "y": (0, 4)}
    )
    layers = [LAYERS, LAYERS]
    assert fit([small_one, small_one], cluster=cluster, layers=layers) == [small_one, small_one]
    with pytest.raises(DoesNotFit) as caught:
        fit([small_one, large_one], cluster=cluster, layers=layers)
    message = str(caught.value)
    for part in (
        "'node1'",
        "1074 MB",
        "1248 MB",
        "174 MB too much",
        "at layer layer 3,",
        "'conv1' (1200 MB)",
        "1249MB",
        "--batch",
    ):
        assert part in message, message
    assert caught.value.exit_status == 2


def test_fit_is_exact_to_the_byte() -> None:
    cluster = local_cluster(1, target="pi3")
    memory = plan_memory([Buffer("y", ((0, 16),))], {"y": (0, 1)})
    for spare, fits in ((0, True), (-1, False)):
        device = replace(cluster.nodes[0].device, memory_bytes=memory.arena_bytes + INTERPRETER_bytes + spare)
        exact = replace(cluster, nodes=(replace(cluster.nodes[0], device=device),))
        if fits:
            fit([memory], cluster=exact, layers=[LAYERS])
        else:
            with pytest.raises(DoesNotFit):
                fit([memory], cluster=exact, layers=[LAYERS])
