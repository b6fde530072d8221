"""Boxes: half-open integer ranges over the dimensions of a tensor or of an iteration domain.

A box of rank r is a tuple of r intervals `(start, stop)`. The empty box of rank r is `empty(r)`; every function
here returns it in that one form, so that boxes compare with `==`. The rank-0 box `()` holds one element.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[int, int]
Box = tuple[Interval, ...]


def empty(rank: int) -> Box:
    """The empty box of this rank (rank 0 has none: its only box holds one element)."""
    return ((0, 0),) * rank


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return tuple((0, size) for size in shape)


def volume(box: Box) -> int:
    """Number of elements."""
    elements = 1
    for start, stop in box:
        elements *= stop - start
    return elements


def extents(box: Box) -> tuple[int, ...]:
    """Length along every dimension."""
    return tuple(stop - start for start, stop in box)


def intersect(a: Box, b: Box) -> Box:
    """The elements that are in both."""
    both = []
    for (a0, a1), (b0, b1) in zip(a, b, strict=True):
        start, stop = a0 if a0 > b0 else b0, a1 if a1 < b1 else b1
        if start >= stop:
            return empty(len(a))
        both.append((start, stop))
    return tuple(both)


def contains(outer: Box, inner: Box) -> bool:
    """Whether every element of `inner` is in `outer`."""
    return volume(inner) == 0 or intersect(outer, inner) == inner


def hull(boxes: Iterable[Box]) -> Box:
    """The smallest box that holds all of them; the rank is taken from the first."""
    found, *others = boxes
    for box in others:
        if volume(found) == 0:
            found = box
        elif volume(box):
            found = tuple(
                (a0 if a0 < b0 else b0, a1 if a1 > b1 else b1) for (a0, a1), (b0, b1) in zip(found, box, strict=True)
            )
    return found


def subtract(a: Box, b: Box) -> list[Box]:
    """`a` without `b`, as disjoint boxes, in a fixed order (dimension by dimension, low side first)."""
    common = intersect(a, b)
    if volume(common) == 0:
        return [a] if volume(a) else []
    pieces: list[Box] = []
    rest = list(a)
    for axis, ((start, stop), (low, high)) in enumerate(zip(a, common, strict=True)):
        for side in ((start, low), (high, stop)):
            if side[0] < side[1]:
                pieces.append((*rest[:axis], side, *rest[axis + 1 :]))
        rest[axis] = (low, high)
    return pieces


def shift(box: Box, origin: Box) -> Box:
    """`box` in coordinates relative to the start of `origin`."""
    return tuple((start - o, stop - o) for (start, stop), (o, _) in zip(box, origin, strict=True))


def slices(box: Box, origin: Box | None = None) -> tuple[slice, ...]:
    """Index of `box` in an array that holds the box `origin` (default: the whole tensor)."""
    return tuple(slice(start, stop) for start, stop in (box if origin is None else shift(box, origin)))


def grow(box: Box, axis: int, amount: int, size: int) -> Box:
    """`box` longer by `amount` on both sides of one axis, clipped to [0, size); the empty box stays empty."""
    if volume(box) == 0:
        return box
    start, stop = box[axis]
    return (*box[:axis], (max(0, start - amount), min(size, stop + amount)), *box[axis + 1 :])


def text(box: Box) -> str:
    """`[0,4)x[0,16)`, for messages and reports."""
    return "x".join(f"[{start},{stop})" for start, stop in box) or "scalar"


def view4(box: Box) -> Box:
    """A box of a tensor of rank 0 to 4 in the four storage dimensions; a vector lies along the second (channels)."""
    match box:
        case (a, b, c, d):
            return (a, b, c, d)
        case (a, b, c):
            return (a, b, c, (0, 1))
        case (a, b):
            return (a, b, (0, 1), (0, 1))
        case (a,):
            return ((0, 1), a, (0, 1), (0, 1))
        case ():
            return ((0, 1),) * 4
    raise ValueError(f"a box of rank {len(box)} has no storage: fusetile's tensors have at most 4 dimensions")
