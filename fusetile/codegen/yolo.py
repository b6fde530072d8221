"""The loss of YOLOv2 and its gradient: one pass over the cells, in each over the anchors and all true boxes.

Which boxes a cell answers for is found twice, in the loss and in the gradient: that is less than to store it.
"""

from __future__ import annotations

from collections.abc import Mapping

from fusetile.box import extents
from fusetile.codegen.calls import KernelCall, Lowered, Ref, indented, make_kernel, ref
from fusetile.codegen.job import Job
from fusetile.codegen.loss import mean_of_partials
from fusetile.graph import Op
from fusetile.ops.yolo import IGNORED_above, classes_of
from fusetile.program import Buffer

_SIZES = ("rows", "columns", "first_row", "first_column", "grid_rows", "grid_columns", "anchors", "classes", "boxes")
_STRIDES = ("x_image", "x_block", "x_row", "x_pixel", "t_image", "t_block", "t_number")
_FACTORS = ("coord", "object", "noobject", "class_")
_POINTERS = {"X": "float32", "BOXES": "float32"}
# p: centre x and y in the cell, tw, th, confidence, width, height. g: centre, width and height of a true box, in cells
# t: what p[0..3] should be, the IoU, the largest IoU with any box. top: the largest logit
# size: widths and heights of the anchors
_SCRATCH = {
    **dict.fromkeys(("p", "g", "t"), ((8,), "float32")),
    **dict.fromkeys(("top", "fit"), ((1,), "float32")),
    **dict.fromkeys(("label", "chosen"), ((1,), "int32")),
    "total": ((1,), "float64"),
}


def _sigmoid(x: str) -> str:
    return f"T.float32(1) / (T.float32(1) + T.exp(T.float32(0) - {x}))"


def _overlap(axis: int) -> str:
    """What the predicted and the true box have in common of their widths (0) or heights (1)."""
    i = ("first_column + w", "first_row + h")[axis]
    half = "T.float32(0.5)"
    at = f'(p[{axis}] + T.Cast("float32", {i}))'
    ends = [f"T.{pick}({at} {sign} {half} * p[{axis + 5}], g[{axis}] {sign} {half} * g[{axis + 2}])"
            for pick, sign in (("min", "+"), ("max", "-"))]  # fmt: skip
    return f"T.max({ends[0]} - {ends[1]}, T.float32(0))"


def _over_anchors(op: Op, block: int, lanes: int, statements: str) -> str:
    """Loops over cells and anchors: statements know p and t; label[0] is the class of the box that the anchor is
    responsible for, or -1. A work unit u is a row; `lanes` is the block of the boxes."""
    size = "BOXES[box + {} * t_number]"
    anchors = "\n".join(f"size[{i}] = T.float32({value!r})" for i, value in enumerate(op.attrs["anchors"]))
    return f"""
{anchors}
for u in T.serial(lo, hi):
    n: T.int32 = u // rows
    h: T.int32 = u % rows
    for w in T.serial(columns):
        at: T.int32 = n * x_image + h * x_row + w * x_pixel
        for a in T.serial(anchors):
            first: T.int32 = a * (5 + classes)
            p[0] = {_sigmoid(channel(block, "first"))}
            p[1] = {_sigmoid(channel(block, "(first + 1)"))}
            p[2] = {channel(block, "(first + 2)")}
            p[3] = {channel(block, "(first + 3)")}
            p[4] = {_sigmoid(channel(block, "(first + 4)"))}
            p[5] = size[2 * a] * T.exp(p[2])
            p[6] = size[2 * a + 1] * T.exp(p[3])
            label[0] = -1
            t[5] = T.float32(0)
            for m in T.serial(boxes):
                box: T.int32 = n * t_image + m // {lanes} * t_block + m % {lanes}
                if BOXES[box] >= T.float32(0):
                    g[0] = {size.format(1)} * T.Cast("float32", grid_columns)
                    g[1] = {size.format(2)} * T.Cast("float32", grid_rows)
                    g[2] = {size.format(3)} * T.Cast("float32", grid_columns)
                    g[3] = {size.format(4)} * T.Cast("float32", grid_rows)
                    common: T.float32 = {_overlap(0)} * {_overlap(1)}
                    iou: T.float32 = common / (p[5] * p[6] + g[2] * g[3] - common)
                    t[5] = T.max(t[5], iou)
                    i: T.int32 = T.min(T.Cast("int32", g[0]), grid_columns - 1)
                    j: T.int32 = T.min(T.Cast("int32", g[1]), grid_rows - 1)
                    if i == first_column + w and j == first_row + h:
                        fit[0] = T.float32(-1)
                        for b in T.serial(anchors):
                            both: T.float32 = T.min(g[2], size[2 * b]) * T.min(g[3], size[2 * b + 1])
                            alike: T.float32 = both / (g[2] * g[3] + size[2 * b] * size[2 * b + 1] - both)
                            if alike > fit[0]:
                                fit[0] = alike
                                chosen[0] = b
                        if chosen[0] == a:
                            label[0] = T.Cast("int32", BOXES[box])
                            t[0] = g[0] - T.Cast("float32", i)
                            t[1] = g[1] - T.Cast("float32", j)
                            t[2] = T.log(g[2] / size[2 * a])
                            t[3] = T.log(g[3] / size[2 * a + 1])
                            t[4] = iou
            if label[0] >= 0:
                top[0] = {channel(block, "(first + 5)")}
                for c in T.serial(classes):
                    top[0] = T.max(top[0], {channel(block, "(first + 5 + c)")})
                total[0] = T.float64(0)
                for c in T.serial(classes):
                    total[0] = total[0] + T.Cast("float64", T.exp({channel(block, "(first + 5 + c)")} - top[0]))
{indented(statements, 3)}
"""


def channel(block: int, number: str) -> str:
    """A channel of the output at a cell."""
    return f"X[at + {number} // {block} * x_block + {number} % {block}]"


def _arguments(job: Job) -> tuple[int, ...]:
    """Values of _SIZES and _STRIDES."""
    y, boxes = job.inputs
    _, (row, _), (column, _) = job.box
    anchors = len(job.op.attrs["anchors"]) // 2
    sizes = (*extents(job.box)[1:], row, column, *(axis.size for axis in job.domain.axes[1:]), anchors)
    classes = classes_of(job.domain.reads[0][1].size, anchors)
    return (*sizes, classes, job.domain.reads[1][1].size, *y.strides, *boxes.strides[:3])


def _over_cells(
    job: Job, symbol: str, statements: str, result: tuple[str, str, Ref], ints: Mapping[str, int]
) -> KernelCall:
    """A pass over the box's cells that writes `result`: its name, type and place. The `ints` are further arguments."""
    block, lanes = (buffer.block[1] for buffer in job.inputs)
    name, dtype, place = result
    kernel = make_kernel(
        symbol,
        pointers={**_POINTERS, name: dtype},
        ints=(*_SIZES, *_STRIDES, *ints),
        floats=_FACTORS,
        scratch={**_SCRATCH, "size": ((len(job.op.attrs["anchors"]),), "float32")},
        body=_over_anchors(job.op, block, lanes, statements),
    )
    images, rows, _ = extents(job.box)
    pointers = (*(ref(*operand) for operand in job.operands), place)
    return KernelCall(
        kernel, images * rows, pointers, (*_arguments(job), *ints.values()), tuple(job.op.attrs["factors"])
    )


def lower_yolo(job: Job) -> Lowered:
    """The sum over the box's cells, over the number of images."""
    block, lanes = (buffer.block[1] for buffer in job.inputs)
    logit = channel(block, "(first + 5 + label[0])")
    squares = " + ".join(f"(p[{i}] - t[{i}]) * (p[{i}] - t[{i}])" for i in range(4))
    statements = f"""
if w == 0 and a == 0:
    PARTIAL[u] = T.float64(0)
if label[0] >= 0:
    PARTIAL[u] = PARTIAL[u] + T.Cast("float64", coord * ({squares}))
    PARTIAL[u] = PARTIAL[u] + T.Cast("float64", object * (p[4] - t[4]) * (p[4] - t[4]))
    PARTIAL[u] = PARTIAL[u] + T.Cast("float64", class_) * (T.log(total[0]) - T.Cast("float64", {logit} - top[0]))
elif t[5] <= T.float32({IGNORED_above}):
    PARTIAL[u] = PARTIAL[u] + T.Cast("float64", noobject * p[4] * p[4])
"""
    images, rows, _ = extents(job.box)
    partial = Buffer(f"{job.op.name}.partial", ((0, images * rows),), "float64")
    call = _over_cells(job, f"yolo_{block}_{lanes}", statements, ("PARTIAL", "float64", ref(partial)), {})
    mean = mean_of_partials(ref(partial), images * rows, job.op.attrs["count"], *job.result())
    return Lowered((call, mean), (partial,))


def lower_yolo_grad(job: Job) -> Lowered:
    """The gradient of all channels of the box's cells, pad lanes included."""
    (block, lanes), made = (buffer.block[1] for buffer in job.inputs), job.output.block[1]

    def dy(number: str) -> str:
        return f"DX[to + {number} // {made} * y_block + {number} % {made}]"

    statements = f"""
to: T.int32 = n * y_image + h * y_row + w * y_pixel
one: T.float32 = T.float32(1) / T.Cast("float32", count)
for c in T.serial(5 + classes):
    {dy("(first + c)")} = T.float32(0)
if label[0] >= 0:
    {dy("first")} = T.float32(2) * one * coord * (p[0] - t[0]) * p[0] * (T.float32(1) - p[0])
    {dy("(first + 1)")} = T.float32(2) * one * coord * (p[1] - t[1]) * p[1] * (T.float32(1) - p[1])
    {dy("(first + 2)")} = T.float32(2) * one * coord * (p[2] - t[2])
    {dy("(first + 3)")} = T.float32(2) * one * coord * (p[3] - t[3])
    {dy("(first + 4)")} = T.float32(2) * one * object * (p[4] - t[4]) * p[4] * (T.float32(1) - p[4])
    for c in T.serial(classes):
        share: T.float32 = T.exp({channel(block, "(first + 5 + c)")} - top[0]) / T.Cast("float32", total[0])
        {dy("(first + 5 + c)")} = one * class_ * (share - T.Select(c == label[0], T.float32(1), T.float32(0)))
elif t[5] <= T.float32({IGNORED_above}):
    {dy("(first + 4)")} = T.float32(2) * one * noobject * p[4] * p[4] * (T.float32(1) - p[4])
if a == anchors - 1:
    for c in T.serial(padded - anchors * (5 + classes)):
        {dy("(anchors * (5 + classes) + c)")} = T.float32(0)
"""
    ints = dict(zip(("y_image", "y_block", "y_row", "y_pixel"), job.output.strides, strict=True))
    ints |= {"padded": -(-extents(job.written())[1] // made) * made, "count": job.op.attrs["count"]}
    dx = ("DX", "float32", ref(*job.result()))
    return Lowered((_over_cells(job, f"yolo_grad_{block}_{lanes}_{made}", statements, dx, ints),))
