"""Layouts and redistribution, against arrays that are really moved, on random layouts."""

from __future__ import annotations

import numpy as np
import pytest

from fusetile.box import Box, contains, empty, hull, intersect, slices, volume, whole
from fusetile.errors import PlanError
from fusetile.plan import Layout, Move, redistribute, uncovered

SHAPE = (5, 6, 4)


def random_box(rng: np.random.Generator, within: Box) -> Box:
    """Possibly empty."""
    ends = [sorted(rng.integers(start, stop + 1, 2).tolist()) for start, stop in within]
    box = tuple((a, b) for a, b in ends)
    return box if volume(box) else empty(len(within))


def partition(rng: np.random.Generator, nodes: int) -> tuple[Box, ...]:
    """Own boxes, some of them empty, in no order: cut the largest piece at a random place until there are enough."""
    pieces = [whole(SHAPE)]
    while len(pieces) < rng.integers(1, nodes + 1):
        box = pieces.pop(max(range(len(pieces)), key=lambda i: volume(pieces[i])))
        axis = int(rng.integers(len(box)))
        start, stop = box[axis]
        at = int(rng.integers(start, stop + 1))
        sides = [(*box[:axis], side, *box[axis + 1 :]) for side in ((start, at), (at, stop))]
        pieces += [side for side in sides if volume(side)]
    pieces += [empty(len(SHAPE))] * (nodes - len(pieces))
    return tuple(pieces[i] for i in rng.permutation(nodes))


def random_pick(rng: np.random.Generator, nodes: int) -> Layout:
    own = partition(rng, nodes)
    return Layout(tuple(hull([box, random_box(rng, whole(SHAPE))]) for box in own), own, "pick")


def random_sum(rng: np.random.Generator, nodes: int) -> Layout:
    have = [random_box(rng, whole(SHAPE)) for _ in range(nodes)]
    have[int(rng.integers(nodes))] = whole(SHAPE)
    return Layout(tuple(have), tuple(have), "sum")


@pytest.mark.parametrize("seed", range(60))
def test_pick_delivers_every_needed_element_once_from_its_owner(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes = int(rng.integers(1, 7))
    layout = random_pick(rng, nodes)
    layout.check(whole(SHAPE), "x")
    need = tuple(random_box(rng, whole(SHAPE)) for _ in range(nodes))
    arrived = [np.zeros(SHAPE, int) for _ in range(nodes)]
    for move in redistribute(layout, need):
        assert volume(move.box)
        source = layout.have if move.source == move.target else layout.own
        assert contains(source[move.source], move.box)
        arrived[move.target][slices(move.box)] += 1
        if move.source != move.target:  # nothing travels that is there already
            assert not volume(intersect(layout.have[move.target], move.box))
    for count, box in zip(arrived, need, strict=True):
        expected = np.zeros(SHAPE, int)
        expected[slices(box)] = 1
        np.testing.assert_array_equal(count, expected)


@pytest.mark.parametrize("seed", range(60))
def test_sum_adds_all_contributions_in_rank_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes = int(rng.integers(1, 7))
    layout = random_sum(rng, nodes)
    layout.check(whole(SHAPE), "x")
    need = tuple(random_box(rng, whole(SHAPE)) for _ in range(nodes))
    parts = rng.standard_normal((nodes, *SHAPE))
    total = np.zeros(SHAPE)
    for part, have in zip(parts, layout.have, strict=True):
        total[slices(have)] += part[slices(have)]  # rank order: the bits must agree
    moves = redistribute(layout, need)
    for target, wanted in enumerate(need):
        mine = [move for move in moves if move.target == target]
        assert [move.source for move in mine] == sorted({move.source for move in mine})
        got = np.zeros(SHAPE)
        for move in mine:
            assert contains(layout.have[move.source], move.box)
            got[slices(move.box)] += parts[move.source][slices(move.box)]
        np.testing.assert_array_equal(got[slices(wanted)], total[slices(wanted)])


def test_nothing_moves_where_everybody_has_all() -> None:
    everything = (whole(SHAPE),) * 3
    layout = Layout(everything, (whole(SHAPE), empty(3), empty(3)))
    assert {(move.source, move.target) for move in redistribute(layout, everything)} == {(0, 0), (1, 1), (2, 2)}


def test_halo_exchange_as_in_the_glossary() -> None:
    layout = Layout((((0, 7),), ((7, 13),)), (((0, 7),), ((7, 13),)))
    assert list(redistribute(layout, (((0, 8),), ((6, 13),)))) == [
        Move(0, 0, ((0, 7),)),
        Move(1, 0, ((7, 8),)),
        Move(0, 1, ((6, 7),)),
        Move(1, 1, ((7, 13),)),
    ]


def test_uncovered() -> None:
    assert uncovered(((0, 4),), (((0, 2),), ((3, 4),))) == [((2, 3),)]
    assert uncovered(((0, 4),), (((2, 4),), ((0, 3),))) == []


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout((((0, 4),), ((2, 4),)), (((0, 3),), ((2, 4),))), "do not partition"),  # overlap
        (Layout((((0, 4),), ((2, 4),)), (((0, 1),), ((2, 4),))), "do not partition"),  # a hole
        (Layout((((0, 2),), ((0, 4),)), (((0, 3),), ((3, 4),))), "device 0 owns"),  # own more than have
        (Layout((((0, 5),), ((0, 0),)), (((0, 4),), ((0, 0),))), "device 0 owns"),  # beyond the tensor
        (Layout((((0, 1),), ((2, 4),)), (((0, 1),), ((2, 4),)), "sum"), r"no device contributes to \[1,2\)"),
    ],
)
def test_illegal_layouts_are_refused(layout: Layout, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        layout.check(((0, 4),), "the tensor")
