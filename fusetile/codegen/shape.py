"""Concatenation, slices, padding and reshapes: copies, by blocks where channels are aligned, else one by one."""

from __future__ import annotations

from fusetile.box import Box, extents, view4, volume
from fusetile.codegen.calls import KernelCall, Lowered, make_kernel, ref
from fusetile.codegen.job import Job
from fusetile.codegen.move import clear
from fusetile.codegen.reblock import move_channels
from fusetile.codegen.strided import strided_call, strided_kernel
from fusetile.errors import PlanError
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


def lower_concat(job: Job) -> Lowered:
    """Inputs in order: the zeros in the pad lanes of one make room for the next."""
    axis, written = job.op.attrs["axis"], job.written()
    calls, offset = [], 0
    for i, buffer in enumerate(job.inputs):
        part = job.need(i)
        if volume(part):
            start, stop = part[axis]
            place = (*written[:axis], (start + offset, stop + offset), *written[axis + 1 :])
            calls.append(transfer(buffer, part, job.output, place))
        offset += job.domain.reads[i][axis].size
    return Lowered(tuple(calls))


def lower_slice(job: Job) -> Lowered:
    """One copy."""
    return Lowered((transfer(job.inputs[0], job.need(0), job.output, job.written()),))


def lower_pad(job: Job) -> Lowered:
    """Zeros, and a copy among them."""
    part, written, axis = job.need(0), job.written(), job.op.attrs["axis"]
    if not volume(part):
        return Lowered((clear(job.output, written),))
    start, stop = part[axis]
    before = job.op.attrs["before"]
    place = (*written[:axis], (start + before, stop + before), *written[axis + 1 :])
    zeros = () if place == written else (clear(job.output, written),)
    return Lowered((*zeros, transfer(job.inputs[0], part, job.output, place)))


def lower_reshape(job: Job) -> Lowered:
    """Maps go through a flat [N, C*H*W]; a tensor that is flat already, or stays as it is, is copied less."""
    (source, part), (result, written) = job.operand(0), job.result()
    if extents(view4(part)) == extents(view4(written)):
        return Lowered((transfer(source, part, result, written),))
    if _is_flat(part):
        return Lowered((_spread(source, part, result, written),))
    if _is_flat(written):
        return Lowered((_flatten(source, part, result, written),))
    images, *rest = extents(view4(part))
    elements = rest[0] * rest[1] * rest[2]
    flat = Buffer(f"{job.op.name}.flat", ((0, images), (0, elements)), source.dtype, result.block)
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
