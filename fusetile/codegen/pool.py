"""Pooling and its gradients.

Windows are clipped at the edge of the whole image: kernels know where their box lies in it.
The gradients gather: every element of dx looks at the outputs whose windows hold it, so that work units write disjoint
elements, in an order that does not depend on how the image is cut.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from fusetile.box import Box, extents, view4
from fusetile.codegen.calls import Lowered, Ref, greater, ref, vectors
from fusetile.codegen.job import Job
from fusetile.codegen.mapped import loops_over, mapped_call, mapped_kernel
from fusetile.codegen.reblock import conform
from fusetile.graph import Op
from fusetile.program import Buffer

Axis = tuple[int, int, int]  # taps, stride, dilation
_AXES = (("r", "h"), ("s", "w"))  # name of the tap and of the position along rows and columns
_GREATER = greater("{X}", "best[v]")
_INTS = ("h_origin", "w_origin", "h_before", "w_before", "h_after", "w_after", "x_h", "x_w", "H", "W")


def _axes(op: Op) -> tuple[Axis, Axis]:
    down, across = zip(op.attrs["kernel"], op.attrs["strides"], op.attrs.get("dilations", (1, 1)), strict=True)
    return down, across


def _name(kind: str, axes: tuple[Axis, Axis], *more: str) -> str:
    return "_".join([kind, *("x".join(map(str, axis)) for axis in axes), *more])


def _ints(op: Op, box: Box, window: Box, image: Sequence[int]) -> tuple[int, ...]:
    """Values of _INTS: the first row and column of a map's box, the pads, the first row and column of `window`, the
    other operand's box, and the size of its image."""
    _, _, rows, columns = view4(box)
    return (rows[0], columns[0], *op.attrs["pads"], window[2][0], window[3][0], *image)


def _clip(axis: Axis, tap: str, at: str, size: str) -> str:
    """The taps of a window that lie in the image: {tap}0 <= tap < {tap}1; {at}_start is the window's first row."""
    taps, stride, dilation = axis
    return f"""
{at}_start: T.int32 = ({at}_origin + {at}) * {stride} - {at}_before
{tap}0: T.int32 = T.max(0, ({dilation - 1} - {at}_start) // {dilation})
{tap}1: T.int32 = T.min({taps}, ({size} - {at}_start + {dilation - 1}) // {dilation})
"""


def _windows(axes: tuple[Axis, Axis], block: int, statements: Sequence[str]) -> str:
    """Loops over the taps r, s of a window in the image; {X} is the element of x. Whole windows have constant loops."""
    (down, _, down_by), (across, _, across_by) = axes
    x = (
        f"X[n * X_image + k * X_block + (h_start + r * {down_by} - x_h) * X_row"
        f" + (w_start + s * {across_by} - x_w) * {block} + v]"
    )
    inner = textwrap.indent(vectors([line.replace("{X}", x) for line in statements], block), " " * 12)
    loops = "    for r in T.serial({}):\n        for s in T.serial({}):\n{}"
    return (
        f"if r1 - r0 == {down} and s1 - s0 == {across}:\n{loops.format(down, across, inner)}"
        f"else:\n{loops.format('r0, r1', 's0, s1', inner)}"
    )


def _pool(
    kind: str,
    job: Job,
    *,
    start: Sequence[str],
    tap: Sequence[str],
    end: Sequence[str],
    scratch: dict[str, str],
    divisor: str = "",
) -> Lowered:
    """y from the windows of x: statements before, for each tap of, and after a window. {ARG} is the tap of the maximum,
    an output or an input."""
    axes, block = _axes(job.op), job.output.block[1]
    before, [(x, window), *argmax] = conform(job.op, job.operands, job.output.block)
    maps = job.results + argmax
    names = ("Y", "ARG")[: len(maps)]
    pixel = (
        _clip(axes[1], "s", "w", "W")
        + divisor
        + vectors(start, block)
        + _windows(axes, block, tap)
        + vectors(end, block)
    )
    kernel = mapped_kernel(
        _name(kind, axes),
        block=block,
        maps={name: buffer.dtype for name, (buffer, _) in zip(names, maps, strict=True)},
        pointers={"X": "float32"},
        ints=("channels", *_INTS, "X_image", "X_block", "X_row"),
        scratch=scratch,
        before_row=_clip(axes[0], "r", "h", "H"),
        pixel=pixel,
    )
    written, image = job.written(), [dim.size for dim in job.domain.reads[0][2:]]
    call = mapped_call(
        kernel,
        loops_over(written, block),
        maps,
        pointers=[ref(x, window)],
        ints=(extents(written)[1], *_ints(job.op, written, window, image), *x.strides[:3]),
    )
    return Lowered((*before.calls, call), before.scratch)


def lower_max_pool(job: Job) -> Lowered:
    """The maximum of every window and the tap where it is: the first one, or the first NaN."""
    columns = job.op.attrs["kernel"][1]
    return _pool(
        "max_pool",
        job,
        start=['best[v] = -T.infinity("float32")', "tap[v] = 0"],
        tap=[
            f"tap[v] = T.Select({_GREATER}, r * {columns} + s, tap[v])",
            f"best[v] = T.Select({_GREATER}, {{X}}, best[v])",
        ],
        end=[
            "{Y} = best[v]",
            f"tap[v] = T.Select(k * {job.output.block[1]} + v < channels, tap[v], 0)",
            '{ARG} = T.Cast("uint8", tap[v])',
        ],
        scratch={"best": "float32", "tap": "int32"},
    )


def lower_max_pool_pick(job: Job) -> Lowered:
    """The element of every window at the tap that was its maximum."""
    columns = job.op.attrs["kernel"][1]
    return _pool(
        "max_pool_pick",
        job,
        start=["found[v] = T.float32(0)", 'tap[v] = T.Cast("int32", {ARG})'],
        tap=[f"found[v] = T.Select(tap[v] == r * {columns} + s, {{X}}, found[v])"],
        end=["{Y} = found[v]"],
        scratch={"found": "float32", "tap": "int32"},
    )


def _divisor(axis: Axis, tap: str, at: str, size: str, *, include_pad: bool) -> str:
    """{at}_count: how much of the image (or of the padded image) a window covers along one axis."""
    if include_pad:
        return f"{at}_count: T.int32 = T.min({at}_start + {axis[0]}, {size} + {at}_after) - {at}_start\n"
    return f"{at}_count: T.int32 = {tap}1 - {tap}0\n"


def lower_average_pool(job: Job) -> Lowered:
    """The average of every window, over what it covers of the image (with count_include_pad: of the padded image)."""
    include = bool(job.op.attrs["count_include_pad"])
    axes = _axes(job.op)
    counts = [
        _divisor(axis, tap, at, size, include_pad=include)
        for axis, (tap, at), size in zip(axes, _AXES, "HW", strict=True)
    ]
    return _pool(
        "average_pool_padded" if include else "average_pool",
        job,
        start=["total[v] = T.float32(0)"],
        tap=["total[v] = total[v] + {X}"],
        end=['{Y} = total[v] / T.Cast("float32", h_count * w_count)'],
        scratch={"total": "float32"},
        divisor="".join(counts),
    )


# -- gradients -------------------------------------------------------------------------------------------------------


def _holders(axis: Axis, tap: str, at: str) -> str:
    """The outputs o{at} whose windows hold row {at}: o{at}0 <= o{at} < o{at}1, as far as they exist."""
    taps, stride, dilation = axis
    return f"""
{at}_padded: T.int32 = {at}_origin + {at} + {at}_before
o{at}0: T.int32 = T.max(0, ({at}_padded - {dilation * (taps - 1)} + {stride - 1}) // {stride})
o{at}1: T.int32 = T.min({at.upper()}, {at}_padded // {stride} + 1)
"""


def _gather(axes: tuple[Axis, Axis], inner: str) -> str:
    """Loops over the outputs oh, ow whose windows hold a pixel, and the taps r, s at which they do."""
    text = inner
    for axis, (tap, at) in zip(reversed(axes), reversed(_AXES), strict=True):
        _, stride, dilation = axis
        distance = f"({at}_padded - o{at} * {stride})"
        text = f"{tap}: T.int32 = {distance} // {dilation}\n{text}"
        if dilation > 1:
            text = f"if {distance} % {dilation} == 0:\n{textwrap.indent(text, '    ')}"
        text = f"for o{at} in T.serial(o{at}0, o{at}1):\n{textwrap.indent(text, '    ')}"
    return text


@dataclass(frozen=True, slots=True)
class Gathered:
    """What a kernel over the pixels of a pool's input needs so that `pixel` leaves in total[v] what comes to a pixel
    from the outputs whose windows hold it. The kernel's name ends in `suffix`; `lowered` comes before it."""

    suffix: str
    pointers: dict[str, str]
    refs: tuple[Ref, ...]
    ints: dict[str, int]
    before_row: str
    pixel: str
    lowered: Lowered


def _gathered(job: Job, *, names: str, inner: str) -> Gathered:
    """`inner` adds to total[v]; {DY}, {ARG} are the elements of the first inputs, `names`."""
    axes, window, lanes = _axes(job.op), job.need(0), job.output.block[1]
    keys = names.split()
    conformed, operands = conform(job.op, [(buffer, window) for buffer in job.inputs[: len(keys)]], job.output.block)
    maps = dict(zip(keys, operands, strict=True))
    at = {
        name: f"{name}[n * {name}_image + k * {name}_block + (oh - x_h) * {name}_row + (ow - x_w) * {lanes} + v]"
        for name in maps
    }
    image = [dim.size for dim in job.domain.reads[0][2:]]
    ints = dict(zip(_INTS, _ints(job.op, job.box, window, image), strict=True))
    for name, (buffer, _) in maps.items():
        strides = zip(("image", "block", "row"), buffer.strides[:3], strict=True)
        ints |= {f"{name}_{axis}": stride for axis, stride in strides}
    return Gathered(
        _name("", axes),
        {name: buffer.dtype for name, (buffer, _) in maps.items()},
        # a box that no window reaches reads nothing: any address will do
        tuple(ref(buffer, part if part[0][1] else None) for buffer, part in operands),
        ints,
        before_row=_holders(axes[0], "r", "h"),
        pixel=_holders(axes[1], "s", "w")
        + vectors(["total[v] = T.float32(0)"], lanes)
        + _gather(axes, inner.format_map(at)),
        lowered=conformed,
    )


def _pool_grad(kind: str, output: Buffer, box: Box, found: Gathered, ints: dict[str, int] | None = None) -> Lowered:
    """dx, given how each pixel's is gathered."""
    block, numbers = output.block[1], found.ints | (ints or {})
    kernel = mapped_kernel(
        kind + found.suffix,
        block=block,
        maps={"DX": "float32"},
        pointers=found.pointers,
        ints=tuple(numbers),
        scratch={"total": "float32"},
        before_row=found.before_row,
        pixel=found.pixel + vectors(["{DX} = total[v]"], block),
    )
    loops, ints_ = loops_over(box, block), tuple(numbers.values())
    call = mapped_call(kernel, loops, [(output, box)], pointers=found.refs, ints=ints_)
    return Lowered((*found.lowered.calls, call), found.lowered.scratch)


def gathered_maxima(job: Job) -> Gathered:
    """The sum of dy over the windows whose maximum a pixel is; the first inputs are dy and argmax."""
    columns = job.op.attrs["kernel"][1]
    inner = vectors(
        [f'total[v] = total[v] + T.Select(T.Cast("int32", {{ARG}}) == r * {columns} + s, {{DY}}, T.float32(0))'],
        job.output.block[1],
    )
    return _gathered(job, names="DY ARG", inner=inner)


def lower_max_pool_grad(job: Job) -> Lowered:
    """dx: the sum of dy over the windows whose maximum a pixel is."""
    found = gathered_maxima(job)
    return _pool_grad("max_pool_grad", *job.result(), found)


def lower_average_pool_grad(job: Job) -> Lowered:
    """dx: the sum over the windows that hold a pixel of dy / (what the window covers)."""
    include = bool(job.op.attrs["count_include_pad"])
    text = ""
    for axis, (_, at) in zip(_axes(job.op), _AXES, strict=True):
        taps, stride, _ = axis
        size, first = f"image_{at}", f"o{at} * {stride} - {at}_before"
        if include:
            text += f"{at}_count: T.int32 = T.min({first} + {taps}, {size} + {at}_after) - ({first})\n"
        else:
            text += f"{at}_count: T.int32 = T.min({first} + {taps}, {size}) - T.max({first}, 0)\n"
    text += vectors(['total[v] = total[v] + {DY} / T.Cast("float32", h_count * w_count)'], job.output.block[1])
    kind = "average_pool_grad_padded" if include else "average_pool_grad"
    found = _gathered(job, names="DY", inner=text)
    height, width = job.op.attrs["input_shape"][2:]
    return _pool_grad(kind, *job.result(), found, {"image_h": height, "image_w": width})


# -- global ----------------------------------------------------------------------------------------------------------


def lower_global_average_pool(job: Job) -> Lowered:
    """The sum of the box's pixels over the area of the whole image, added in float64."""
    block = job.output.block[1]
    before, [(x, part)] = conform(job.op, [job.operand(0)], job.output.block)
    x_at = f"X[n * X_image + k * X_block + y * X_row + x * {block} + v]"
    pixels = "\n".join(
        [
            vectors(["total[v] = T.float64(0)"], block),
            "for y in T.serial(height):\n    for x in T.serial(width):",
            textwrap.indent(vectors([f'total[v] = total[v] + T.Cast("float64", {x_at})'], block), " " * 8),
            vectors(['{Y} = T.Cast("float32", total[v] / T.Cast("float64", area))'], block),
        ]
    )
    kernel = mapped_kernel(
        "global_average_pool",
        block=block,
        maps={"Y": "float32"},
        pointers={"X": "float32"},
        ints=("height", "width", "area", "X_image", "X_block", "X_row"),
        scratch={"total": "float64"},
        pixel=pixels,
    )
    written = job.written()
    (top, bottom), (left, right) = part[2:]
    area = job.domain.axes[job.domain.axis("h")].size * job.domain.axes[job.domain.axis("w")].size
    ints = (bottom - top, right - left, area, *x.strides[:3])
    call = mapped_call(kernel, loops_over(written, block), [job.result()], pointers=[ref(x, part)], ints=ints)
    return Lowered((*before.calls, call), before.scratch)


def lower_global_average_pool_grad(job: Job) -> Lowered:
    """dy over the area of the image, for every pixel of it."""
    block, written = job.output.block[1], job.written()
    kernel = mapped_kernel(
        "global_average_pool_grad",
        block=block,
        maps={"DX": "float32"},
        pointers={"DY": "float32"},
        ints=("area", "DY_image", "DY_block"),
        pixel=vectors(['{DX} = DY[n * DY_image + k * DY_block + v] / T.Cast("float32", area)'], block),
    )
    _, _, height, width = job.op.attrs["input_shape"]
    before, [(dy, part)] = conform(job.op, [job.operand(0)], job.output.block)
    ints = (height * width, *dy.strides[:2])
    call = mapped_call(kernel, loops_over(written, block), [job.result()], pointers=[ref(dy, part)], ints=ints)
    return Lowered((*before.calls, call), before.scratch)
