"""Moves between buffers of one device: what packs, unpacks and adds the boxes that devices exchange.

    copy         target[box] = source[box]          accumulate   target[box] += source[box]
    clear        target[box] = 0
    zero         a whole buffer                     zero_border  all of a buffer that is not its box: borders and pitch

Pad lanes move with their block. Boxes start at multiples of the block and end there or at the tensor's end.
"""

from __future__ import annotations

from fusetile.box import Box, extents, view4
from fusetile.codegen.calls import KernelCall, make_kernel, ref
from fusetile.codegen.strided import LANES, plane, strided_call, strided_kernel
from fusetile.errors import PlanError
from fusetile.program import Buffer


def copy(source: Buffer, target: Buffer, box: Box) -> KernelCall:
    """Copy `box` from one buffer of a tensor to another of the same block and dtype."""
    dtype = _common_dtype(source, target)
    kernel = strided_kernel(f"copy_{dtype}", operands={"X": dtype, "Y": dtype}, statements=["{Y} = {X}"])
    return strided_call(kernel, [(source, box), (target, box)])


def accumulate(source: Buffer, target: Buffer, box: Box) -> KernelCall:
    """Add `box` of one buffer of a tensor to that of another of the same block and dtype."""
    dtype = _common_dtype(source, target)
    kernel = strided_kernel(f"accumulate_{dtype}", operands={"X": dtype, "Y": dtype}, statements=["{Y} = {Y} + {X}"])
    return strided_call(kernel, [(source, box), (target, box)])


def clear(buffer: Buffer, box: Box) -> KernelCall:
    """Zero a box of a buffer."""
    kernel = strided_kernel(
        f"clear_{buffer.dtype}", operands={"Y": buffer.dtype}, statements=[f'{{Y}} = T.Cast("{buffer.dtype}", 0)']
    )
    return strided_call(kernel, [(buffer, box)])


def zero(buffer: Buffer) -> KernelCall:
    """Zero a buffer, its border included."""
    planes, size = plane(buffer)
    return _fill_zero(buffer, planes, size, 0, (0, 0))


def zero_border(buffer: Buffer) -> KernelCall:
    """Zero what lies around the box of a buffer: the borders, and pixels beyond the box in each row."""
    planes, size = plane(buffer)
    _, _, height, width = extents(view4(buffer.box))
    _, _, row, pixel = buffer.strides
    first = buffer.border[0] * row + buffer.border[1] * pixel
    return _fill_zero(buffer, planes, size, height, (first, width * pixel))


def zero_pads(buffer: Buffer, box: Box) -> tuple[KernelCall, ...]:
    """Zero the lanes behind the box's last channel in its last block, if there are any."""
    images, channels, height, width = extents(view4(box))
    b0, b1 = buffer.block
    if channels % b1 == 0:
        return ()
    if b0 != 1:
        raise PlanError(f"{buffer.name}: block {buffer.block} has pad lanes in two dimensions")
    body = """
for u in T.serial(lo, hi):
    for h in T.serial(height):
        for w in T.serial(width):
            for i in T.serial(first, lanes):
                Y[u * image + last + h * row + w * lanes + i] = T.Cast(DTYPE, 0)
""".replace("DTYPE", repr(buffer.dtype))
    names = ("height", "width", "first", "lanes", "image", "last", "row")
    kernel = make_kernel(f"zero_pads_{buffer.dtype}", pointers={"Y": buffer.dtype}, ints=names, body=body)
    image, block, row, _ = buffer.strides
    ints = (height, width, channels % b1, b1, image, channels // b1 * block, row)
    return (KernelCall(kernel, images, (ref(buffer, box),), ints),)


def _fill_zero(buffer: Buffer, planes: int, size: int, rows: int, kept: tuple[int, int]) -> KernelCall:
    """Zero all of every plane but `kept` = (first element in the first row, elements) of each of `rows` rows."""
    body = f"""
for u in T.serial(lo, hi):
    for r in T.serial(rows + 1):
        start: T.int32 = u * size + T.if_then_else(r == 0, 0, first + (r - 1) * row + kept)
        stop: T.int32 = u * size + T.if_then_else(r == rows, size, first + r * row)
        for i in T.serial((stop - start) // {LANES}):
            for v in T.vectorized({LANES}):
                Y[start + i * {LANES} + v] = T.Cast("{buffer.dtype}", 0)
        for i in T.serial((stop - start) % {LANES}):
            Y[start + (stop - start) // {LANES} * {LANES} + i] = T.Cast("{buffer.dtype}", 0)
"""
    ints = ("size", "rows", "row", "first", "kept")
    kernel = make_kernel(f"zero_{buffer.dtype}", pointers={"Y": buffer.dtype}, ints=ints, body=body)
    return KernelCall(kernel, planes, (ref(buffer),), (size, rows, buffer.strides[2], *kept))


def _common_dtype(source: Buffer, target: Buffer) -> str:
    if source.dtype != target.dtype:
        raise PlanError(f"{source.name} of {source.dtype} can't be moved to {target.name} of {target.dtype}")
    return source.dtype
