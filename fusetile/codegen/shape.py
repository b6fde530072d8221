"""Concatenation, slices, padding and reshapes: copies, by blocks where channels are aligned, else one by one."""

from __future__ import annotations

from collections.abc import Sequence

from fusetile.box import Box, extents, view4, volume
from fusetile.codegen.calls import KernelCall, Lowered, make_kernel, ref
from fusetile.codegen.move import clear
from fusetile.codegen.reblock import move_channels
from fusetile.codegen.strided import strided_call, strided_kernel
from fusetile.codegen.targets import Target
from fusetile.errors import PlanError
from fusetile.graph import Op
from fusetile.ops import Domain
from fusetile.program import Buffer


def transfer(source: Buffer, source_box: Box, target: Buffer, target_box: Box) -> KernelCall:
    """Copy a box to a box of equal extents, whatever the alignment of their channels."""
    if not _in_blocks(source, source_box, target, target_box):
        return move_channels(source, source_box, target, target_box)
    dtype = source.dtype
    kernel = strided_kernel(f"copy_{dtype}", operands={"X": dtype, "Y": dtype}, statements=["{Y} = {X}"])
    return strided_call(kernel, [(source, source_box), (target, target_box)])


def _in_blocks(source: Buffer, source_box: Box, target: Buffer, target_box: Box) -> bool:
    """Whether whole blocks can be copied: pad lanes may go along, other channels may not."""
    block = source.block[1]
    start, stop = view4(source_box)[1]
    low, high = view4(source.box)[1]
    first = view4(target_box)[1][0] - view4(target.box)[1][0]
    aligned = (start - low) % block == 0 and first % block == 0
    return source.block == target.block and aligned and ((stop - start) % block == 0 or stop == high)


def lower_concat(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target
) -> Lowered:
    """Inputs in order: the zeros in the pad lanes of one make room for the next."""
    axis, written = op.attrs["axis"], domain.output(box)
    calls, offset = [], 0
    for i, buffer in enumerate(inputs):
        part = domain.need(box, i)
        if volume(part):
            start, stop = part[axis]
            place = (*written[:axis], (start + offset, stop + offset), *written[axis + 1 :])
            calls.append(transfer(buffer, part, outputs[0], place))
        offset += domain.reads[i][axis].size
    return Lowered(tuple(calls))


def lower_slice(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target
) -> Lowered:
    """One copy."""
    return Lowered((transfer(inputs[0], domain.need(box, 0), outputs[0], domain.output(box)),))


def lower_pad(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target
) -> Lowered:
    """Zeros, and a copy among them."""
    part, written, axis = domain.need(box, 0), domain.output(box), op.attrs["axis"]
    if not volume(part):
        return Lowered((clear(outputs[0], written),))
    start, stop = part[axis]
    before = op.attrs["before"]
    place = (*written[:axis], (start + before, stop + before), *written[axis + 1 :])
    zeros = () if place == written else (clear(outputs[0], written),)
    return Lowered((*zeros, transfer(inputs[0], part, outputs[0], place)))


def lower_reshape(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target
) -> Lowered:
    """Maps go through a flat [N, C*H*W]; a tensor that is flat already, or stays as it is, is copied less."""
    (source, part), (result, written) = (inputs[0], domain.need(box, 0)), (outputs[0], domain.output(box))
    if extents(view4(part)) == extents(view4(written)):
        return Lowered((transfer(source, part, result, written),))
    if _is_flat(part):
        return Lowered((_spread(source, part, result, written),))
    if _is_flat(written):
        return Lowered((_flatten(source, part, result, written),))
    images, *rest = extents(view4(part))
    elements = rest[0] * rest[1] * rest[2]
    flat = Buffer(f"{op.name}.flat", ((0, images), (0, elements)), source.dtype, result.block)
    return Lowered((_flatten(source, part, flat, flat.box), _spread(flat, flat.box, result, written)), (flat,))


def _is_flat(box: Box) -> bool:
    return extents(view4(box))[2:] == (1, 1)


def _flatten(source: Buffer, part: Box, flat: Buffer, written: Box) -> KernelCall:
    """flat[n, (c * height + h) * width + w] = source[n, c, h, w]; the last channel zeroes the pad lanes."""
    body = """
for u in T.serial(lo, hi):
    n: T.int32 = u // channels
    c: T.int32 = u % channels
    for h in T.serial(height):
        for w in T.serial(width):
            j: T.int32 = (c * height + h) * width + w
            FLAT[n * f_image + j // f_lanes * f_block + j % f_lanes] = (
                MAP[n * m_image + c // m_lanes * m_block + h * m_row + w * m_lanes + c % m_lanes]
            )
    if c == channels - 1:
        for i in T.serial(padded - channels * height * width):
            j: T.int32 = channels * height * width + i
            FLAT[n * f_image + j // f_lanes * f_block + j % f_lanes] = T.float32(0)
"""
    return _between("flatten", body, source, part, flat, written, channels=extents(view4(part))[1])


def _spread(flat: Buffer, part: Box, result: Buffer, written: Box) -> KernelCall:
    """result[n, c, h, w] = flat[n, (c * height + h) * width + w]; channels beyond the last are zeroed."""
    body = """
for u in T.serial(lo, hi):
    n: T.int32 = u // padded
    c: T.int32 = u % padded
    for h in T.serial(height):
        for w in T.serial(width):
            j: T.int32 = T.min(c, channels - 1) * height * width + h * width + w
            MAP[n * m_image + c // m_lanes * m_block + h * m_row + w * m_lanes + c % m_lanes] = (
                T.Select(c < channels, FLAT[n * f_image + j // f_lanes * f_block + j % f_lanes], T.float32(0))
            )
"""
    lanes = result.block[1]
    return _between(
        "spread", body, result, written, flat, part, channels=-(-extents(view4(written))[1] // lanes) * lanes
    )


def _between(
    name: str, body: str, map_: Buffer, map_box: Box, flat: Buffer, flat_box: Box, *, channels: int
) -> KernelCall:
    """A call with one work unit per image and channel (of `channels`); `padded` counts the written channels' lanes."""
    if map_.dtype != "float32" or flat.dtype != "float32":
        raise PlanError(f"{map_.name} of {map_.dtype} can't be reshaped: only float32 can")
    ints = (
        "channels",
        "height",
        "width",
        "padded",
        "m_image",
        "m_block",
        "m_row",
        "m_lanes",
        "f_image",
        "f_block",
        "f_lanes",
    )
    pointers = {"MAP": "float32", "FLAT": "float32"}
    kernel = make_kernel(name, pointers=pointers, ints=ints, body=body)
    images, depth, height, width = extents(view4(map_box))
    lanes = flat.block[1]
    padded = channels if name == "spread" else -(-extents(view4(flat_box))[1] // lanes) * lanes
    values = (depth, height, width, padded, *map_.strides[:3], map_.block[1], *flat.strides[:2], lanes)
    return KernelCall(kernel, images * channels, (ref(map_, map_box), ref(flat, flat_box)), values)
