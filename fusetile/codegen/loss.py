"""Losses: partial sums per row in float64, added in order by a second call; and the gradients of class losses.

The class index is data: training checks it against the number of classes before it reaches a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fusetile.box import Box, extents, view4
from fusetile.codegen.calls import KernelCall, Lowered, Ref, indented, make_kernel, ref, vectors
from fusetile.codegen.elementwise import translate
from fusetile.codegen.job import Job
from fusetile.codegen.mapped import loops_over, mapped_call, mapped_kernel
from fusetile.codegen.reblock import conform
from fusetile.ops import row
from fusetile.ops.loss import NO_LABEL
from fusetile.program import Buffer

_STRIDES = ("x_image", "x_block", "x_row", "x_pixel", "t_image", "t_row", "t_pixel")


def _logit(block: int, channel: str) -> str:
    """The logit of a channel at a pixel."""
    return f"X[at + {channel} // {block} * x_block + {channel} % {block}]"


def _over_pixels(block: int, statements: str, *, softmax: bool = True) -> str:
    """Loops over pixels; statements know `at`, the label, whether it counts, and, for a softmax, the greatest logit,
    top[0]. A work unit u is a row."""
    top = f"""
top[0] = X[at]
for c in T.serial(channels):
    top[0] = T.max(top[0], {_logit(block, "c")})
total[0] = T.float64(0)
"""
    return f"""
for u in T.serial(lo, hi):
    n: T.int32 = u // rows
    h: T.int32 = u % rows
    for w in T.serial(columns):
        at: T.int32 = n * x_image + h * x_row + w * x_pixel
        given: T.int32 = TARGET[n * t_image + h * t_row + w * t_pixel]
        counts: T.float32 = T.Select(given == ignore, T.float32(0), T.float32(1))
        label: T.int32 = T.Select(given == ignore, 0, given)
{indented(top if softmax else "", 2)}
{indented(statements, 2)}
"""


@dataclass(frozen=True, slots=True)
class _Classes:
    """What the kernels of a class loss share: their name's ending, pointers, scalar arguments, and their values."""

    suffix: str
    pointers: dict[str, str]
    refs: tuple[Ref, ...]
    ints: tuple[int, ...]  # for `_INTS`
    weight: str  # of the spot's label
    weights: str  # of class c
    total: str  # what the sum of losses is divided by
    smooth: bool
    floats: dict[str, float]


_INTS = ("channels", "rows", "columns", *_STRIDES, "ignore", "count")


def _classes(job: Job) -> _Classes:
    weighted, smoothing = len(job.inputs) > 2, job.op.attrs.get("smoothing", 0.0)
    _, channels, rows, columns = extents(view4(job.need(0)))
    refs = tuple(ref(*operand) for operand in job.operands)
    return _Classes(
        f"{'_weighted' * weighted}{'_smooth' * bool(smoothing)}_{job.inputs[0].block[1]}",
        {"X": "float32", "TARGET": "int32"} | ({"W": "float32", "TOTAL": "float32"} if weighted else {}),
        refs,
        (channels, rows, columns, *_strides(job.inputs), job.op.attrs.get("ignore", NO_LABEL), job.op.attrs["count"]),
        "counts * W[label]" if weighted else "counts",
        "W[c]" if weighted else "T.float32(1)",
        "T.Select(TOTAL[0] == T.float32(0), T.float32(1), TOTAL[0])" if weighted else 'T.Cast("float32", count)',
        bool(smoothing),
        {"keep": 1 - smoothing, "spread": smoothing / channels} if smoothing else {},
    )


def _loss_of_classes(symbol: str, job: Job, statements: Callable[[_Classes], str], *, softmax: bool) -> Lowered:
    """Statements find loss[0] of a pixel; rows are summed, then divided by the total."""
    classes = _classes(job)
    text = statements(classes) + "\nPARTIAL[u] = T.if_then_else(w == 0, loss[0], PARTIAL[u] + loss[0])\n"
    kernel = make_kernel(
        f"{symbol}{classes.suffix}",
        pointers={**classes.pointers, "PARTIAL": "float64"},
        ints=_INTS,
        floats=list(classes.floats),
        scratch={"top": ((1,), "float32"), "total": ((1,), "float64"), "loss": ((1,), "float64")},
        body=_over_pixels(job.inputs[0].block[1], text, softmax=softmax),
    )
    images, _, rows, _ = extents(view4(job.need(0)))
    units = images * rows
    partial = Buffer(f"{job.op.name}.partial", ((0, units),), "float64")
    call = KernelCall(kernel, units, (*classes.refs, ref(partial)), classes.ints, tuple(classes.floats.values()))
    total = classes.refs[3] if len(job.inputs) > 2 else None
    mean = mean_of_partials(ref(partial), units, job.op.attrs["count"], *job.result(), total=total)
    return Lowered((call, mean), (partial,))


def lower_cross_entropy(job: Job) -> Lowered:
    """The sum of log(sum of exp(x - max)) - (x[label] - max) over the box's pixels, over the total."""
    block = job.inputs[0].block[1]

    def log_of(channel: str) -> str:
        return f'(T.log(total[0]) - T.Cast("float64", {_logit(block, channel)} - top[0]))'

    def statements(classes: _Classes) -> str:
        text = f"""
for c in T.serial(channels):
    total[0] = total[0] + T.Cast("float64", T.exp({_logit(block, "c")} - top[0]))
loss[0] = T.Cast("float64", {classes.weight}) * {log_of("label")}
"""
        if classes.smooth:
            text += f"""
loss[0] = T.Cast("float64", keep) * loss[0]
for c in T.serial(channels):
    loss[0] = loss[0] + T.Cast("float64", spread * counts * {classes.weights}) * {log_of("c")}
"""
        return text

    return _loss_of_classes("cross_entropy", job, statements, softmax=True)


def lower_likelihood(job: Job) -> Lowered:
    """The sum of -x[label] over the box's pixels, over the total."""

    def statements(classes: _Classes) -> str:
        x = _logit(job.inputs[0].block[1], "label")
        return f'loss[0] = T.float64(0) - T.Cast("float64", {classes.weight}) * T.Cast("float64", {x})'

    return _loss_of_classes("likelihood", job, statements, softmax=False)


def lower_cross_entropy_grad(job: Job) -> Lowered:
    """dx = weight * (softmax(x) - [class is the label]) / total; the exponentials wait in dx for their sum.

    Smoothing adds spread * (softmax(x) * (sum of all weights) - weight of the class) / total."""
    block = job.inputs[0].block[1]

    def statements(classes: _Classes, y: str) -> str:
        smooth = ""
        value = f"gain[0] * (share - T.Select(c == label, T.float32(1), T.float32(0))) / {classes.total}"
        gain = f"gain[0] = {'keep * ' if classes.smooth else ''}{classes.weight}\nall[0] = T.float32(0)\n"
        if classes.smooth:
            gain += f"for c in T.serial(channels):\n    all[0] = all[0] + {classes.weights}\n"
            smooth = f" + spread * counts * (share * all[0] - {classes.weights}) / {classes.total}"
        return f"""
{gain}
for c in T.serial(channels):
    {y} = T.exp({_logit(block, "c")} - top[0])
    total[0] = total[0] + T.Cast("float64", {y})
for c in T.serial(padded):
    if c < channels:
        share: T.float32 = {y} / T.Cast("float32", total[0])
        {y} = {value}{smooth}
    else:
        {y} = T.float32(0)
"""

    return _gradient_of_classes("cross_entropy_grad", job, statements, softmax=True)


def lower_likelihood_grad(job: Job) -> Lowered:
    """dx = -weight / total at the label, else 0."""

    def statements(classes: _Classes, y: str) -> str:
        return f"""
gain[0] = (T.float32(0) - {classes.weight}) / {classes.total}
for c in T.serial(padded):
    {y} = T.Select(c == label, gain[0], T.float32(0))
"""

    return _gradient_of_classes("likelihood_grad", job, statements, softmax=False)


def _gradient_of_classes(
    symbol: str, job: Job, statements: Callable[[_Classes, str], str], *, softmax: bool
) -> Lowered:
    """Statements write the gradient of a pixel's channels, pad lanes included."""
    lanes, classes = job.output.block[1], _classes(job)
    text = "to: T.int32 = n * y_image + h * y_row + w * y_pixel\n"
    text += statements(classes, f"DX[to + c // {lanes} * y_block + c % {lanes}]")
    kernel = make_kernel(
        f"{symbol}{classes.suffix}_{lanes}",
        pointers={**classes.pointers, "DX": "float32"},
        ints=(*_INTS, "y_image", "y_block", "y_row", "y_pixel", "padded"),
        floats=list(classes.floats),
        scratch={
            **dict.fromkeys(("top", "gain", "all"), ((1,), "float32")),
            "total": ((1,), "float64"),
        },
        body=_over_pixels(job.inputs[0].block[1], text, softmax=softmax),
    )
    written = job.written()
    images, channels, rows, _ = extents(view4(written))
    ints = (*classes.ints, *job.output.strides, -(-channels // lanes) * lanes)
    pointers = (*classes.refs, ref(*job.result()))
    return Lowered((KernelCall(kernel, images * rows, pointers, ints, tuple(classes.floats.values())),))


def lower_label_weight(job: Job) -> Lowered:
    """The sum of the weights of the box's labels."""
    images, rows, columns = [*extents(job.need(0)), 1, 1][:3]
    kernel = make_kernel(
        "label_weight",
        pointers={"TARGET": "int32", "W": "float32", "PARTIAL": "float64"},
        ints=("rows", "columns", *_STRIDES[4:], "ignore"),
        body="""
for u in T.serial(lo, hi):
    n: T.int32 = u // rows
    h: T.int32 = u % rows
    PARTIAL[u] = T.float64(0)
    for w in T.serial(columns):
        label: T.int32 = TARGET[n * t_image + h * t_row + w * t_pixel]
        if label != ignore:
            PARTIAL[u] = PARTIAL[u] + T.Cast("float64", W[label])
""",
    )
    units = images * rows
    partial = Buffer(f"{job.op.name}.partial", ((0, units),), "float64")
    ints = (rows, columns, *_label_strides(job.inputs[0]), job.op.attrs.get("ignore", NO_LABEL))
    pointers = (*(ref(*operand) for operand in job.operands), ref(partial))
    call = KernelCall(kernel, units, pointers, ints)
    return Lowered((call, mean_of_partials(ref(partial), units, 1, *job.result())), (partial,))


def lower_mean_of_pairs(job: Job) -> Lowered:
    """The sum of the row's expression in the elements x0 of the output and x1 of the target, over `count`."""
    block = max(buffer.block[1] for buffer in job.inputs[:2])
    before, maps = conform(job.op, job.operands[:2], (1, block))
    statements, value, floats = translate(row(job.op.kind).expression, job.op.attrs)
    statements = [*statements, f'total[v] = total[v] + T.Cast("float64", {value})']
    kernel = mapped_kernel(
        f"mean_of_{job.op.kind.lower()}",
        block=block,
        maps={"x0": "float32", "x1": "float32"},
        pointers={"PARTIAL": "float64"},
        ints=["channels"],
        floats=list(floats),
        scratch={**{f"t{i}": "float32" for i in range(len(statements) - 1)}, "total": "float64"},
        before_unit=vectors(["total[v] = T.float64(0)"], block),
        pixel=vectors(statements, block),
        # pad lanes are zero in both, and yet may have a loss
        after_unit=vectors(
            [f"PARTIAL[u * {block} + v] = T.if_then_else(k * {block} + v < channels, total[v], T.float64(0))"],
            block,
        ),
    )
    loops = loops_over(job.need(0), block)
    size = loops.units * block
    partial = Buffer(f"{job.op.name}.partial", ((0, size),), "float64")
    channels = extents(view4(job.need(0)))[1]
    call = mapped_call(kernel, loops, maps, pointers=[ref(partial)], ints=(channels,), floats=tuple(floats.values()))
    mean = mean_of_partials(ref(partial), size, job.op.attrs["count"], *job.result())
    return Lowered((*before.calls, call, mean), (*before.scratch, partial))


def mean_of_partials(
    partial: Ref, size: int, count: int, output: Buffer, box: Box, *, total: Ref | None = None
) -> KernelCall:
    """output[0] = (sum of the partial sums, in order) / count, or over a total that is data, unless that is zero."""
    divisor = 'T.Cast("float64", T.Select(TOTAL[0] == T.float32(0), T.float32(1), TOTAL[0]))'
    body = f"""
for u in T.serial(lo, hi):
    total[0] = T.float64(0)
    for i in T.serial(size):
        total[0] = total[0] + PARTIAL[i]
    for i in T.serial(lanes):
        Y[i] = T.float32(0)
    Y[0] = T.Cast("float32", total[0] / {divisor if total else 'T.Cast("float64", count)'})
"""
    kernel = make_kernel(
        "weighted_mean_of_partials" if total else "mean_of_partials",
        pointers={"PARTIAL": "float64", **({"TOTAL": "float32"} if total else {}), "Y": "float32"},
        ints=("size", "count", "lanes"),
        scratch={"total": ((1,), "float64")},
        body=body,
    )
    pointers = (partial, *([total] if total else []), ref(output, box))
    return KernelCall(kernel, 1, pointers, (size, count, output.block[1]))


def _strides(inputs: Sequence[Buffer]) -> tuple[int, ...]:
    """Values of _STRIDES."""
    return (*inputs[0].strides, *_label_strides(inputs[1]))


def _label_strides(labels: Buffer) -> tuple[int, int, int]:
    """Labels [N] lie along the second storage dimension, [N, H, W] along the first three."""
    s0, s1, s2, _ = labels.strides
    return (s1, 0, 0) if len(labels.box) == 1 else (s0, s1, s2)
