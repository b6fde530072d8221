"""Box arithmetic against sets of indices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusetile.box import (
    Box,
    contains,
    empty,
    extents,
    grow,
    hull,
    intersect,
    shift,
    slices,
    subtract,
    text,
    view4,
    volume,
    whole,
)

SIZE = 6


def interval() -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: (min(pair), max(pair)))


def canonical(intervals: tuple[tuple[int, int], ...]) -> Box:
    return intervals if all(a < b for a, b in intervals) else empty(len(intervals))


boxes = st.tuples(interval(), interval(), interval()).map(canonical)


def mask(box: Box) -> np.ndarray:
    """Which elements of a cube are in the box."""
    found = np.zeros((SIZE,) * 3, bool)
    found[slices(box)] = True
    return found


@given(boxes, boxes)
def test_intersect_is_the_set_intersection(a: Box, b: Box) -> None:
    both = intersect(a, b)
    np.testing.assert_array_equal(mask(both), mask(a) & mask(b))
    assert both == canonical(both) == intersect(b, a)


@given(boxes, boxes)
def test_subtract_covers_the_difference_exactly_once(a: Box, b: Box) -> None:
    pieces = subtract(a, b)
    assert all(volume(piece) for piece in pieces)
    np.testing.assert_array_equal(
        sum([mask(p).astype(int) for p in pieces], np.zeros((SIZE,) * 3, int)), mask(a) & ~mask(b)
    )


@given(boxes, boxes)
def test_contains(outer: Box, inner: Box) -> None:
    assert contains(outer, inner) == bool((mask(outer) | ~mask(inner)).all())


@given(st.lists(boxes, min_size=1, max_size=4))
def test_hull_is_the_smallest_that_holds_all(some: list[Box]) -> None:
    least = hull(some)
    assert all(contains(least, box) for box in some)
    indices = np.argwhere(np.any([mask(box) for box in some], axis=0))
    if not len(indices):
        assert least == empty(3)
    else:
        assert least == tuple(zip(indices.min(0).tolist(), (indices.max(0) + 1).tolist(), strict=True))


@given(boxes, st.integers(0, 2), st.integers(0, 4))
def test_grow_clips_and_leaves_the_empty_box_alone(box: Box, axis: int, amount: int) -> None:
    grown = grow(box, axis, amount, SIZE)
    near = np.zeros((SIZE,) * 3, bool)
    for index in np.argwhere(mask(box)):
        for step in range(-amount, amount + 1):
            moved = index.copy()
            moved[axis] += step
            if 0 <= moved[axis] < SIZE:
                near[tuple(moved)] = True
    np.testing.assert_array_equal(mask(grown), near)


@given(boxes, boxes)
def test_slices_relative_to_an_origin_pick_the_same_elements(outer: Box, other: Box) -> None:
    inner = intersect(outer, other)
    cube = np.arange(SIZE**3).reshape((SIZE,) * 3)
    if volume(inner):
        np.testing.assert_array_equal(cube[slices(outer)][slices(inner, outer)], cube[slices(inner)])
        assert extents(shift(inner, outer)) == extents(inner)


def test_scalars_have_one_element_and_no_empty_box() -> None:
    assert volume(()) == 1 and whole(()) == () and intersect((), ()) == () and subtract((), ()) == []
    assert contains((), ()) and text(()) == "scalar"


def test_text() -> None:
    assert text(((0, 4), (2, 16))) == "[0,4)x[2,16)"


@pytest.mark.parametrize(
    ("box", "four"),
    [
        ((), ((0, 1),) * 4),
        (((2, 5),), ((0, 1), (2, 5), (0, 1), (0, 1))),
        (((2, 5), (1, 3)), ((2, 5), (1, 3), (0, 1), (0, 1))),
        (((2, 5), (1, 3), (4, 6)), ((2, 5), (1, 3), (4, 6), (0, 1))),
        (((2, 5), (1, 3), (4, 6), (0, 9)), ((2, 5), (1, 3), (4, 6), (0, 9))),
    ],
)
def test_view4_puts_channels_second(box: Box, four: Box) -> None:
    assert view4(box) == four and volume(view4(box)) == volume(box)


def test_view4_refuses_rank_five() -> None:
    with pytest.raises(ValueError, match="rank 5"):
        view4(((0, 1),) * 5)


def test_boxes_of_different_rank_do_not_mix() -> None:
    with pytest.raises(ValueError):
        intersect(((0, 1),), ((0, 1), (0, 1)))
