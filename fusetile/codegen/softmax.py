"""Softmax: all passes over one line of elements, before the next line is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from fusetile.box import extents, view4
from fusetile.codegen.calls import Lowered, indented, ref, vectors
from fusetile.codegen.elementwise import STRIDES, broadcast_element, translate
from fusetile.codegen.job import Job
from fusetile.codegen.mapped import loops_over, mapped_call, mapped_kernel
from fusetile.codegen.reblock import conform
from fusetile.codegen.reduce import AT, LOOPS, SUMMED
from fusetile.ops.base import All

_REAL = "(k + j) * BLOCK + v < channels"
_LARGEST = "top[v] = T.Select(REAL, T.Select(top[v] < {x0}, {x0}, top[v]), top[v])"
_ADDED = 'total[v] = total[v] + T.Select(REAL, T.Cast("float64", {}), T.float64(0))'
_STORED = "{{y}} = T.Select(REAL, {}, T.float32(0))"


def lower_softmax(job: Job) -> Lowered:
    """The maximum, the powers and their sum, and what they are of it; the powers wait in y for their sum."""
    power, value, _ = translate("exp(x0 - x2)", {})
    if job.op.kind == "Softmax":
        powers = [*power, f"{{y}} = {value}", _ADDED.format("{y}")]
        before, last, result = [], ['t0[v] = T.Cast("float32", T.float64(1) / total[v])'], "{y} * t0[v]"
    else:
        powers = [*power, _ADDED.format(value)]
        log, text, _ = translate("log(x0)", {})
        before = ['e[v] = T.Cast("float32", total[v])']
        last, result = [line.replace("{x0}", "e[v]") for line in log], "{x0} - top[v] - LOG"
        last, result = [*last, f"e[v] = {text}"], result.replace("LOG", "e[v]")
    elements = {"x2": "top[v]"}
    passes = [
        (['top[v] = -T.infinity("float32")'], [_LARGEST], _joined("top", "T.max(top[0], top[v])")),
        (["total[v] = T.float64(0)"], powers, _joined("total", "total[0] + total[v]")),
        ([*before, *last], [_STORED.format(result)], ""),
    ]
    return _lines(job, {"x0": "X"}, passes, elements)


def lower_softmax_grad(job: Job) -> Lowered:
    """The sum, and what follows from it."""
    power, value, _ = translate("x1" if job.op.kind == "SoftmaxGrad" else "exp(x1)", {})
    if job.op.kind == "SoftmaxGrad":
        added, result = "{x0} * {x1}", "{x1} * ({x0} - e[v])"
    else:
        added, result = "{x0}", f"{{x0}} - {value} * e[v]"
    passes = [
        (["total[v] = T.float64(0)"], [_ADDED.format(added)], _joined("total", "total[0] + total[v]")),
        (['e[v] = T.Cast("float32", total[v])'], [*power, _STORED.format(result)], ""),
    ]
    return _lines(job, {"x0": "DY", "x1": "X"}, passes, {})


def _joined(array: str, both: str) -> str:
    """All lanes become what all of them make together."""
    return f"""
for v in T.serial(1, BLOCK):
    {array}[0] = {both}
for v in T.serial(1, BLOCK):
    {array}[v] = {array}[0]
"""


def _lines(
    job: Job, names: Mapping[str, str], passes: Sequence[tuple[list[str], list[str], str]], elements: Mapping[str, str]
) -> Lowered:
    """Passes over every line: statements before them, for each element, and, if lanes belong to one line, after them.
    Inputs are called `names`; the line's elements are {y} and those of `names`, others `elements`."""
    block, full = job.output.block[1], job.written()
    before, operands = conform(job.op, job.operands, job.output.block)
    # a line is what goes along the dimensions that are no axes
    kept = tuple((0, 1) if isinstance(dim, All) else part for dim, part in zip(job.domain.writes[0], full, strict=True))
    sizes, left = extents(view4(full)), extents(view4(kept))
    counts = (sizes[0], -(-sizes[1] // block), sizes[2], sizes[3])
    line = [count if size != other else 1 for count, size, other in zip(counts, sizes, left, strict=True)]
    together = sizes[1] != left[1]
    pointers = {**dict.fromkeys(names.values(), "float32"), "Y": "float32"}
    at = {key: broadcast_element(name, AT) for key, name in (*names.items(), ("y", "Y"))} | dict(elements)
    text = ""
    for start, each, joined in passes:
        inner = vectors([one.replace("REAL", _REAL).format_map(at) for one in each], block)
        text += vectors(start, block) + LOOPS.strip("\n") + "\n" + indented(inner, 4) + "\n"
        text += joined.replace("BLOCK", str(block)) if together else ""
    kernel = mapped_kernel(
        f"{job.op.kind.lower()}{'_together' if together else ''}",
        block=block,
        maps={},
        pointers=pointers,
        ints=[*SUMMED, "channels", *(f"{name}_{axis}" for name in pointers for axis in STRIDES)],
        scratch={"total": "float64", **{f"t{i}": "float32" for i in range(12)}, "top": "float32", "e": "float32"},
        pixel=text.replace("BLOCK", str(block)),
    )
    placed = [*operands, job.result()]
    call = mapped_call(
        kernel,
        loops_over(kept, block, each=prod(line)),
        [],
        pointers=[ref(buffer, part) for buffer, part in placed],
        ints=(*line, sizes[1], *(stride for buffer, _ in placed for stride in buffer.strides)),
    )
    return Lowered((*before.calls, call), before.scratch)
