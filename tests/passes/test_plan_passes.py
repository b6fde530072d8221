"""From a plan's name to placements and layouts: cuts, shards, halos, deliveries."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusetile.box import Box, contains, extents, intersect, slices, volume, whole
from fusetile.cluster import Link, local_cluster
from fusetile.errors import PlanError, UserError
from fusetile.graph import FORWARD, UPDATE, Graph
from fusetile.ops import Axis, Domain, domain_of
from fusetile.passes.assign import assign
from fusetile.passes.communicate import LOGGED, Communication, MOST_parts, aligned, communicate, moved_bytes
from fusetile.passes.group import Halo, group
from fusetile.passes.keep import is_left_out, originals
from fusetile.passes.tile import CHANNEL_AXES, SMALLEST_SHARD_elements, Split, cut, shard, tile
from fusetile.plan import Placement, Plan, uncovered
from tests.graphs import NETWORKS, Net
from tests.passes.golden import assert_golden, communication_text, plan_text, small
from tests.random_graphs import random_graph
from tests.training import PLAIN, mixed_cluster, planned, training_graph

PLANS = [
    *((2, plan) for plan in ("grid:2x1", "batch", "channel", "random:1")),
    *((3, plan) for plan in ("grid:1x3", "auto", "random:2")),
    *((4, plan) for plan in ("grid:2x2", "channel", "random:3")),
    *((6, plan) for plan in ("grid:2x3", "mixed", "random:4", "random:5")),
]


@cache
def training(name: str) -> Graph:
    return training_graph(NETWORKS[name](3))


@cache
def assigned(name: str, nodes: int, plan: str) -> Plan:
    return assign(training(name), plan=plan, cluster=local_cluster(nodes), block=8)


# -- cut, tile, shard ------------------------------------------------------------------------------------------------

weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=8)


@given(st.integers(1, 100), weights, st.sampled_from([1, 8, 16]))
def test_cut_partitions_at_multiples_of_the_granule(size: int, shares: list[float], granule: int) -> None:
    pieces = cut(size, shares, granule)
    assert len(pieces) == len(shares) and pieces[0][0] == 0 and pieces[-1][1] == size
    for (_, stop), (start, _) in pairwise(pieces):
        assert stop == start and (stop % granule == 0 or stop == size)


@given(st.integers(1, 1000), weights)
def test_cut_is_in_proportion_to_the_weights(size: int, shares: list[float]) -> None:
    ends = np.cumsum(shares) / sum(shares) * size
    assert all(abs(stop - end) <= 0.5 + 1e-6 * size for (_, stop), end in zip(cut(size, shares), ends, strict=True))


def domain(**sizes: int) -> Domain:
    """Axes in order; those in capital letters are reductions."""
    axes = tuple(Axis(n.lower(), s, "parallel" if n.islower() else "reduction") for n, s in sizes.items())
    return Domain(axes, (), ())


@given(
    st.permutations(range(6)),
    st.sampled_from([(("h", 2), ("w", 3)), (("k", 6),), (("n", 2), ("k", 3)), (("c", 3), ("h", 2)), (("h", 6),)]),
    st.lists(st.sampled_from([1.0, 3.0, 10.0]), min_size=7, max_size=7),
    st.sampled_from([8, 16]),
)
def test_tiles_partition_the_domain(
    devices: list[int], parts: tuple[tuple[str, int], ...], speeds: list[float], block: int
) -> None:
    """Device 6 is left out; channels are cut at blocks; rows that are fewer than the parts leave some empty."""
    axes = domain(n=3, k=20, h=5, w=4, C=9)
    placed = tile(axes, split=Split(parts, tuple(devices)), speeds=speeds, block=block)
    assert sum(map(volume, placed.own)) == volume(axes.box) and not uncovered(axes.box, placed.own)
    assert volume(placed.compute[6]) == 0
    for compute, own in zip(placed.compute, placed.own, strict=True):
        assert contains(compute, own)
        for axis, (start, stop) in zip(axes.axes, own, strict=True):
            if axis.name in CHANNEL_AXES:
                assert start % block == 0 and (stop % block == 0 or stop == axis.size or not volume(own))


def test_axes_that_an_op_lacks_replicate_it_unless_it_is_partial() -> None:
    split = Split((("h", 2), ("k", 2)), (3, 1, 0, 2))
    pointwise = tile(domain(n=2, k=16), split=split, speeds=(1,) * 4, block=8)
    low, high = ((0, 2), (0, 8)), ((0, 2), (8, 16))
    assert pointwise.compute == (low, high, high, low)  # the grid is [[3, 1], [0, 2]]
    assert pointwise.own == (((0, 0), (0, 0)), high, ((0, 0), (0, 0)), low)
    partial = tile(domain(n=2, K=16), split=split, speeds=(1,) * 4, block=8)
    assert partial.compute == partial.own == pointwise.own


@pytest.mark.parametrize("box", [((0, 64), (0, 48), (0, 3), (0, 3)), ((16, 64), (0, 40)), ((8, 4000),)])
def test_shards_cut_the_box_that_is_held(box: Box) -> None:
    pieces = shard(box, holders=[2, 0, 5], speeds=(1, 9, 2, 9, 9, 1), block=8)
    assert sum(map(volume, pieces.values())) == volume(box) and not uncovered(box, tuple(pieces.values()))
    assert set(pieces) <= {0, 2, 5}
    for piece in pieces.values():
        assert all((start - low) % 8 == 0 for (start, _), (low, _) in zip(piece, box, strict=True))


def test_small_parameters_have_one_owner() -> None:
    assert shard(((0, 20),), holders=[4, 2], speeds=(1,) * 5, block=8) == {4: ((0, 20),)}
    large = ((0, 2 * SMALLEST_SHARD_elements),)
    assert set(shard(large, holders=[4, 2], speeds=(1,) * 5, block=8)) == {2, 4}


# -- assign ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["batch", "grid:2x1", "channel"])
def test_assign_golden(plan: str) -> None:
    graph = training_graph(small(), optimizer=PLAIN)
    placed = assign(graph, plan=plan, cluster=mixed_cluster("pi3", "pi4"), block=8)
    assert_golden(f"assign_{plan.replace(':', '_')}", plan_text(graph, placed))


@pytest.mark.parametrize(("nodes", "plan"), PLANS)
@pytest.mark.parametrize("name", NETWORKS)
def test_own_iterations_partition_every_domain(name: str, nodes: int, plan: str) -> None:
    """Before and after halos have grown: what grows is computed, never owned."""
    graph, before = training(name), assigned(name, nodes, plan)
    after = group(graph, before, cluster=local_cluster(nodes), halo="recompute")
    assert set(before.placements) == set(after.placements) == set(graph.ops)
    for op in graph.ops.values():
        axes = domain_of(graph, op)
        one, other = before.placements[op.name], after.placements[op.name]
        if op.name in originals(graph) and is_left_out(other):
            continue  # kept, not computed again
        assert one.own == other.own
        assert sum(map(volume, one.own)) == volume(axes.box) and not uncovered(axes.box, one.own)
        for own, compute, grown in zip(one.own, one.compute, other.compute, strict=True):
            assert contains(compute, own) and contains(grown, compute) and contains(axes.box, grown)
            if volume(own) and axes.is_partial(own):
                assert compute == own == grown  # a sum over a halo would count it twice


def test_a_layers_forward_and_backward_are_cut_alike() -> None:
    graph = training("plain")
    placed = assign(graph, plan="grid:2x2", cluster=local_cluster(4), block=8)
    conv = next(op for op in graph.ops.values() if op.kind == "Conv")
    rows = {axis.name: i for i, axis in enumerate(domain_of(graph, conv).axes)}
    for op in graph.ops.values():
        if op.layer == conv.name and op.kind == "ConvWeightGrad":
            mine = {axis.name: i for i, axis in enumerate(domain_of(graph, op).axes)}
            for one, other in zip(placed.placements[conv.name].own, placed.placements[op.name].own, strict=True):
                assert all(one[rows[axis]] == other[mine[axis]] for axis in "hw")
            return
    raise AssertionError("the layer has no weight gradient")


def test_the_tail_behind_a_grid_is_cut_by_channels() -> None:
    graph = training("plain")
    placed = assign(graph, plan="grid:2x2", cluster=local_cluster(4), block=8)
    cut_axes = {}
    for op in graph.ops.values():
        if op.phase == FORWARD:
            axes = domain_of(graph, op).axes
            boxes = {box for box in placed.placements[op.name].own if volume(box)}
            cut_axes[op.kind] = {a.name for i, a in enumerate(axes) if len({box[i] for box in boxes}) > 1}
    assert cut_axes["Conv"] == {"h", "w"} and cut_axes["Gemm"] <= {"k"} and cut_axes["MaxPool"] == {"h", "w"}


def test_mixed_cuts_samples_if_there_are_enough_and_else_tiles() -> None:
    for nodes, axis in ((2, "n"), (4, "h")):
        graph = training("plain")
        placed = assign(graph, plan="mixed", cluster=local_cluster(nodes), block=8)
        first = next(op for op in graph.ops.values() if op.kind == "Conv")
        i = domain_of(graph, first).axis(axis)
        assert len({box[i] for box in placed.placements[first.name].own if volume(box)}) > 1


def test_a_plan_read_from_a_file_is_that_plan(tmp_path: Path) -> None:
    graph, cluster = training("plain"), local_cluster(3)
    placed, _ = planned(graph, "random:7", cluster, seed=1)
    path = tmp_path / "plan.json"
    boxes = {
        name: {key: [list(box) if volume(box) else None for box in getattr(p, key)] for key in ("compute", "own")}
        for name, p in placed.placements.items()
    }
    path.write_text(json.dumps({"ops": [{"name": name, **item} for name, item in boxes.items()]}))
    again = assign(graph, plan=str(path), cluster=cluster, block=8)
    assert again == placed and group(graph, again, cluster=cluster, halo="recompute") == placed
    for other, message in (
        (json.dumps({"ops": []}), "another model"),
        (json.dumps([1]), "not a plan.json"),
        ("{", "not a plan.json"),
        (path.read_text().replace('"compute"', '"computes"'), "not a plan.json"),
    ):
        broken = tmp_path / "broken.json"
        broken.write_text(other)
        with pytest.raises(UserError, match=message):
            assign(graph, plan=str(broken), cluster=cluster, block=8)
    with pytest.raises(UserError, match="for 2 node"):
        assign(graph, plan=str(path), cluster=local_cluster(2), block=8)
    with pytest.raises(UserError, match="another model"):
        assign(training("branches"), plan=str(path), cluster=cluster, block=8)
    with pytest.raises(UserError, match="No such file"):
        assign(graph, plan=str(tmp_path / "none.json"), cluster=cluster, block=8)


# -- group -----------------------------------------------------------------------------------------------------------


def test_group_golden() -> None:
    graph = training_graph(small(), optimizer=PLAIN)
    cluster = local_cluster(2)
    placed = group(graph, assign(graph, plan="grid:2x1", cluster=cluster, block=8), cluster=cluster, halo="recompute")
    assert_golden("group", plan_text(graph, placed))


def test_exchange_grows_nothing_and_recompute_leaves_no_halo_to_send_between_convolutions() -> None:
    from tests.graphs import Net

    net = Net((1, 3, 16, 8))
    graph = training_graph(net.done(net.conv(net.relu(net.conv(net.relu(net.conv(net.x, 8)), 8)), 8)))
    cluster = local_cluster(2)
    plan = assign(graph, plan="grid:2x1", cluster=cluster, block=8)
    assert group(graph, plan, cluster=cluster, halo="exchange").placements == plan.placements
    grown = group(graph, plan, cluster=cluster, halo="recompute")
    first, second, _ = (op for op in graph.ops.values() if op.kind == "Conv")
    rows = domain_of(graph, first).axis("h")
    for op, halo in ((first, 2), (second, 1)):  # what the third convolution sees; the backward pass may need more
        (_, low), (high, _) = (box[rows] for box in grown.placements[op.name].compute)
        assert low >= 8 + halo and high <= 8 - halo
    for delivery in communicate(graph, grown, block=8).deliveries:
        assert not (delivery.tensor in (first.outputs[0], second.outputs[0]) and delivery.transfers())


# -- communicate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["grid:2x1", "channel"])
def test_communicate_golden(plan: str) -> None:
    graph = training_graph(small(), optimizer=PLAIN)
    _, communication = planned(graph, plan, 2, halo="exchange")
    assert_golden(f"communicate_{plan.replace(':', '_')}", communication_text(communication))


def assert_delivered(graph: Graph, plan: Plan, communication: Communication, block: int) -> None:
    """Layouts legal; every reader's receptive field inside its delivery, at whole blocks; every needed element there
    once (pick), or once from every device that holds a part of it (sum)."""
    for name, layout in communication.layouts.items():
        layout.check(whole(graph.tensors[name].shape), name)
    producers, again = graph.producers(), originals(graph)
    for op in graph.ops.values():
        axes = domain_of(graph, op)
        for i, name in enumerate(op.inputs):
            delivery = communication.deliveries[communication.reads[op.name, name]]
            kept = name not in communication.layouts and name in producers and again[producers[name].name].outputs
            assert delivery.tensor in (kept or (name,)) and op.name in delivery.readers
            for need, box in zip(delivery.need, plan.placements[op.name].compute, strict=True):
                assert contains(need, axes.need(box, i))
    for delivery in communication.deliveries:
        tensor = graph.tensors[delivery.tensor]
        layout = communication.layouts.get(delivery.tensor)
        for device, need in enumerate(delivery.need):
            assert aligned(need, tensor, block) == need
            if layout is None or not volume(need):
                assert not [move for move in delivery.moves if move.target == device]
                continue
            count = np.zeros(tensor.shape, int)
            if delivery.in_place[device]:
                count[slices(intersect(need, layout.have[device]))] += 1
            for move in delivery.moves:
                if move.target == device:
                    assert contains(layout.have[move.source], move.box) and volume(move.box)
                    count[slices(move.box)] += 1
            expected = np.zeros(tensor.shape, int)
            for have in layout.have if layout.combine == "sum" else ():
                expected[slices(intersect(have, need))] += 1
            if layout.combine == "pick":
                expected[slices(need)] = 1
            np.testing.assert_array_equal(count, expected)


@pytest.mark.parametrize(("nodes", "plan"), PLANS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_needed_element_is_delivered_exactly_once(name: str, nodes: int, plan: str) -> None:
    graph = training(name)
    halos: tuple[Halo, ...] = ("exchange", "recompute")
    for halo in halos:
        placed = group(graph, assigned(name, nodes, plan), cluster=local_cluster(nodes), halo=halo)
        assert_delivered(graph, placed, communicate(graph, placed, block=8), block=8)


@pytest.mark.parametrize("seed", range(12))
def test_deliveries_of_random_networks(seed: int) -> None:
    graph = training_graph(random_graph(seed + 50))
    assert_delivered(graph, *planned(graph, f"random:{seed}", 4, seed=seed, block=16), block=16)


def test_large_weights_travel_in_several_moves() -> None:
    """Cut at whole blocks; maps are not."""
    net = Net((2, 160, 9, 9))
    graph = training_graph(net.done(net.conv(net.x, 200)))
    _, communication = planned(graph, "batch", 2)
    into = [[m for m in d.transfers() if m.target == 1] for d in communication.deliveries if d.transfers()]
    several = [moves for moves in into if len(moves) > 1]
    assert len(several) == 2  # the weights, and their gradient
    for moves in several:
        assert len(moves) == MOST_parts
        assert all(edge % 8 == 0 for move in moves for interval in move.box[:2] for edge in interval)


def test_the_loss_reaches_everybody_and_next_values_lie_where_the_parameters_do() -> None:
    graph = training("plain")
    _, communication = planned(graph, "grid:2x1", 3)
    (loss,) = (d for d in communication.deliveries if d.tensor == graph.loss)
    assert LOGGED in loss.readers and loss.need == (((0, 1),),) * 3
    assert all(communication.layouts[old] == communication.layouts[new] for old, new in graph.next_value.items())


def test_readers_of_one_halo_share_one_exchange() -> None:
    """The forward convolution and its weight gradient read the same rows."""
    graph = training("plain")
    _, communication = planned(graph, "grid:2x1", 2, halo="exchange")
    first = next(op for op in graph.ops.values() if op.kind == "MaxPool")
    deliveries = [d for d in communication.deliveries if d.tensor == first.outputs[0]]
    assert any({graph.ops[r].kind for r in d.readers} == {"Conv", "ConvWeightGrad"} for d in deliveries)


def test_moved_bytes() -> None:
    graph = training_graph(small())
    _, communication = planned(graph, "batch", 2)
    moved = [d for d in communication.deliveries if d.tensor.startswith("grad.")]
    total = sum(moved_bytes(graph, d, Link(1.0, 0.0)) for d in moved)
    weights = sum(p.value.size for name, p in graph.parameters.items() if name in graph.gradients)
    assert total == 4 * weights  # each gradient's half from the device that does not own the shard


def test_an_illegal_plan_is_refused() -> None:
    graph = training("plain")
    placed, _ = planned(graph, "grid:2x1", 2)
    name = next(op.name for op in graph.ops.values() if op.kind == "MaxPool")
    twice = placed.placements[name].own[:1] * 2
    wrong = Plan(2, {**placed.placements, name: Placement(twice, twice)})
    with pytest.raises(PlanError, match="do not partition"):
        communicate(graph, wrong, block=8)


def test_the_check_of_deliveries_sees_a_missing_and_a_double_move() -> None:
    from dataclasses import replace

    graph = training("plain")
    placed, communication = planned(graph, "grid:2x1", 2, halo="exchange")
    index = next(i for i, d in enumerate(communication.deliveries) if d.transfers())
    delivery = communication.deliveries[index]
    for moves in (delivery.moves[:-1], (*delivery.moves, delivery.moves[-1])):
        broken = list(communication.deliveries)
        broken[index] = replace(delivery, moves=moves)
        with pytest.raises(AssertionError):
            assert_delivered(graph, placed, replace(communication, deliveries=tuple(broken)), block=8)


def test_updates_own_whole_parameters() -> None:
    """The shards of a parameter partition it, whatever devices hold of it."""
    for nodes, plan in PLANS:
        graph = training("plain")
        placed, _ = planned(graph, plan, nodes)
        for op in graph.ops.values():
            if op.phase == UPDATE:
                axes, shape = domain_of(graph, op), graph.tensors[op.outputs[0]].shape
                shards = [axes.output(box) for box in placed.placements[op.name].own]
                assert sum(map(volume, shards)) == volume(whole(shape))
                assert all(extents(box)[2:] in (shape[2:], (0,) * len(shape[2:])) for box in shards)
