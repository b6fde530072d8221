"""Cut an op's iteration domain over the devices.

    Split(parts=(("h", 2), ("w", 2)), devices=(0, 1, 2, 3))      Conv n k h w c, 1x8x13x13, on four devices

        device 0: h 0..7  w 0..7     device 1: h 0..7  w 7..13   device 2: h 7..13 w 0..7    ...

A split names axes, so one split serves a layer's forward and backward ops: a split of `k` cuts the output channels of a
convolution, makes its input gradient a partial sum and cuts its weight gradient by rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import gcd, lcm

import numpy as np

from fusetile.box import Box, empty, volume
from fusetile.ops import Axis, Domain
from fusetile.plan import Placement

CHANNEL_AXES = ("k", "c")
SMALLEST_SHARD_elements = 2048


@dataclass(frozen=True, slots=True)
class Split:
    """How many parts along which axes, and which device takes which part (row-major over `parts`). Devices that are not
    named compute nothing."""

    parts: tuple[tuple[str, int], ...]
    devices: tuple[int, ...]


def cut(size: int, weights: Sequence[float], granule: int = 1) -> list[tuple[int, int]]:
    """[0, size) in consecutive intervals in proportion to the weights, cut at multiples of `granule`."""
    units = -(-size // granule)
    total = sum(weights)
    ends = [min(size, granule * int(units * part / total + 0.5)) for part in accumulate(weights)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def tile(domain: Domain, *, split: Split, speeds: Sequence[float], block: int, replicate: bool = True) -> Placement:
    """Place an op. `speeds` are all devices' relative speeds, `block` the channel block at which channels are cut.

    Devices that differ only along an axis which this op does not have would do the same work. If the op's outputs are
    whole they all do it (`replicate`), and the first of them owns the result; partial sums are made only once.
    """
    grid = np.array(split.devices).reshape([count for _, count in split.parts])
    intervals = [_intervals(domain, axis, grid, i, speeds, block) for i, (axis, _) in enumerate(split.parts)]
    compute = [empty(len(domain.axes))] * len(speeds)
    own = list(compute)
    for part in np.ndindex(*grid.shape):
        chosen = {axis: intervals[i][part[i]] for i, (axis, _) in enumerate(split.parts) if domain.has(axis)}
        box = tuple(chosen.get(axis.name, (0, axis.size)) for axis in domain.axes)
        if any(start >= stop for start, stop in box):
            continue
        first = all(index == 0 or domain.has(axis) for index, (axis, _) in zip(part, split.parts, strict=True))
        device = int(grid[part])
        if first:
            own[device] = box
        if first or (replicate and not domain.is_partial(box)):
            compute[device] = box
    return Placement(tuple(compute), tuple(own))


def _intervals(
    domain: Domain, axis: str, grid: np.ndarray, i: int, speeds: Sequence[float], block: int
) -> list[tuple[int, int]]:
    if not domain.has(axis):
        return []
    rows = np.moveaxis(grid, i, 0).reshape(grid.shape[i], -1)
    weights = [sum(speeds[device] for device in row) for row in rows]
    cut_axis = domain.axes[domain.axis(axis)]
    return cut(cut_axis.size, weights, granule(cut_axis, block) if axis in CHANNEL_AXES else 1)


def granule(axis: Axis, block: int) -> int:
    """Where channels may be cut: at multiples of so many. Those that belong to them elsewhere fill whole blocks too."""
    per, times = axis.group
    return per * lcm(block // gcd(block, per), block // gcd(block, times))


def shard(box: Box, *, holders: Sequence[int], speeds: Sequence[float], block: int) -> dict[int, Box]:
    """Cut one box of a parameter among devices that hold it, along the channel axis that has most blocks. Shards are
    not made smaller than a message is worth: only the first holders get one of a small box."""
    holders = holders[: max(1, volume(box) // SMALLEST_SHARD_elements)]
    axis = max(range(min(2, len(box))), key=lambda i: (-(-(box[i][1] - box[i][0]) // block), -i))
    start, stop = box[axis]
    pieces = cut(stop - start, [speeds[device] for device in holders], block)
    boxes = {
        device: (*box[:axis], (start + low, start + high), *box[axis + 1 :])
        for device, (low, high) in zip(holders, pieces, strict=True)
    }
    return {device: piece for device, piece in boxes.items() if volume(piece)}
