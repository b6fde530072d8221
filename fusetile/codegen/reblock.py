"""Copies between buffers of different blocks, or to channels that are no multiple of the block.

Elements go one by one: for operands as rare as graph inputs with few channels and unaligned concatenations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusetile.box import Box, extents, view4, volume
from fusetile.codegen.calls import KernelCall, Lowered, Ref, make_kernel
from fusetile.errors import PlanError
from fusetile.graph import Op
from fusetile.program import Buffer

_SIZES = ("channels", "height", "width")


def position(buffer: Buffer, box: Box) -> tuple[Ref, int, int]:
    """(image, lane, block) of a box whose channels may start within a block: the address of its first image, row and
    column in channel block 0 of the buffer, the channel it starts at from there, and the block."""
    if buffer.block[0] != 1:
        raise PlanError(f"{buffer.name}: block {buffer.block} has no channels to copy one by one")
    whole, part = view4(buffer.box), view4(box)
    aligned = (part[0], whole[1], *part[2:])
    start = [low - origin for (low, _), (origin, _) in zip(aligned, whole, strict=True)]
    s0, _, s2, s3 = buffer.strides
    element = start[0] * s0 + (start[2] + buffer.border[0]) * s2 + (start[3] + buffer.border[1]) * s3
    return Ref(buffer.name, element * np.dtype(buffer.dtype).itemsize), part[1][0] - whole[1][0], buffer.block[1]


def move_channels(source: Buffer, source_box: Box, target: Buffer, target_box: Box) -> KernelCall:
    """Copy a box to a box of equal extents, whatever the blocks; if the target's channels end in the last block of its
    buffer, the rest of that block becomes zero."""
    n, channels, height, width = extents(view4(source_box))
    from_, from_lane, from_block = position(source, source_box)
    to, to_lane, to_block = position(target, target_box)
    ends = view4(target_box)[1][1] == view4(target.box)[1][1]
    padded = -(-(to_lane + channels) // to_block) * to_block - to_lane if ends else channels
    kernel = make_kernel(
        f"move_channels_{source.dtype}",
        pointers={"X": source.dtype, "Y": source.dtype},
        ints=[*_SIZES, "padded", *(f"{q}{part}" for q in "xy" for part in ("_lane", "_block", "0", "1", "2", "3"))],
        body="""
for u in T.serial(lo, hi):
    n: T.int32 = u // padded
    c: T.int32 = u % padded
    y: T.int32 = n * y0 + (y_lane + c) // y_block * y1 + (y_lane + c) % y_block
    if c < channels:
        x: T.int32 = n * x0 + (x_lane + c) // x_block * x1 + (x_lane + c) % x_block
        for h in T.serial(height):
            for w in T.serial(width):
                Y[y + h * y2 + w * y3] = X[x + h * x2 + w * x3]
    else:
        for h in T.serial(height):
            for w in T.serial(width):
                Y[y + h * y2 + w * y3] = T.Cast(DTYPE, 0)
""".replace("DTYPE", repr(source.dtype)),
    )
    ints = (channels, height, width, padded, from_lane, from_block, *source.strides, to_lane, to_block, *target.strides)
    return KernelCall(kernel, n * padded, (from_, to), ints)


def conform(
    op: Op, operands: Sequence[tuple[Buffer, Box]], block: tuple[int, int]
) -> tuple[Lowered, list[tuple[Buffer, Box]]]:
    """The operands in buffers of one block: calls and scratch to get there, and the operands to use."""
    calls, scratch, result = [], [], []
    for i, (buffer, box) in enumerate(operands):
        if buffer.block != block and volume(box):
            copy = Buffer(f"{op.name}.block{i}", box, buffer.dtype, block)
            calls.append(move_channels(buffer, box, copy, box))
            scratch.append(copy)
            buffer = copy
        result.append((buffer, box))
    return Lowered(tuple(calls), tuple(scratch)), result
