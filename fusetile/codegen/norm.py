"""Batch normalization but for its sums: the statistics per channel, and the maps that they normalize."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fusetile.box import Box, extents, view4
from fusetile.codegen.activation import activation, activation_gradient, keeps_zero
from fusetile.codegen.calls import KernelCall, Lowered, make_kernel, ref, vectors
from fusetile.codegen.job import Job
from fusetile.codegen.mapped import loops_over, mapped_call, mapped_kernel
from fusetile.codegen.move import zero_pads
from fusetile.codegen.pool import Gathered, gathered_maxima
from fusetile.codegen.reblock import conform
from fusetile.program import Buffer

# -- per channel -----------------------------------------------------------------------------------------------------

_MOMENTS = """
mean: T.float64 = SUMS[c] / T.Cast("float64", count)
raw: T.float64 = SUMS[sums_pair + c] / T.Cast("float64", count) - mean * mean
variance: T.float64 = T.Select(raw < T.float64(0), T.float64(0), raw)
"""
_STATISTICS = """
STATS[c] = T.Cast("float32", mean)
STATS[stats_pair + c] = T.Cast("float32", T.float64(1) / T.sqrt(variance + T.Cast("float64", epsilon)))
"""
_FROZEN = """
mean: T.float64 = T.Cast("float64", MEAN[c])
variance: T.float64 = T.Cast("float64", VARIANCE[c])
"""
_RUNNING = """
new: T.float64 = T.float64(1) - T.Cast("float64", keep)
MEAN[c] = T.Cast("float32", T.Cast("float64", MEAN[c] * keep) + mean * new)
VARIANCE[c] = T.Cast("float32", T.Cast("float64", VARIANCE[c] * keep) + variance * new)
"""
# pad lanes of what an op makes; what it updates in place keeps the zeros that it has there
_PADS = {
    "STATS": ("STATS[c] = T.float32(0)", "STATS[stats_pair + c] = T.float32(0)"),
    "DGAMMA": ("DGAMMA[c] = T.float32(0)",),
    "DBETA": ("DBETA[c] = T.float32(0)",),
}
_PARAMETERS = """
DGAMMA[c] = T.Cast("float32", SUMS[sums_pair + c])
DBETA[c] = T.Cast("float32", SUMS[c])
"""


def _per_channel(
    name: str,
    statements: str,
    operands: Mapping[str, tuple[Buffer, Box]],
    *,
    ints: Mapping[str, int] | None = None,
    floats: Mapping[str, float] | None = None,
) -> Lowered:
    """One call that executes statements for every channel c of vectors [C] and pairs [2, C]; pad lanes become zero."""
    first, box = next(iter(operands.values()))
    block = first.block[1]
    channels = extents(view4(box))[1]
    pads = [line for key in operands for line in _PADS.get(key, ())]
    rest = "\n        ".join(statements.strip().splitlines())
    body = f"for c in T.serial(lo, hi):\n    if c < channels:\n        {rest}\n"
    if pads:
        body += "    else:\n        " + "\n        ".join(pads)
    pairs = {f"{key.lower()}_pair": buffer.strides[0] for key, (buffer, box) in operands.items() if len(box) == 2}
    numbers = {"channels": channels, **pairs, **(ints or {})}
    kernel = make_kernel(
        name,
        pointers={key: buffer.dtype for key, (buffer, _) in operands.items()},
        ints=list(numbers),
        floats=list(floats or {}),
        body=body,
    )
    pointers = tuple(ref(buffer, part) for buffer, part in operands.values())
    padded = -(-channels // block) * block
    return Lowered((KernelCall(kernel, padded, pointers, tuple(numbers.values()), tuple((floats or {}).values())),))


def lower_batch_statistics(job: Job) -> Lowered:
    """Mean and 1/std from the sums over the batch."""
    operands = {"SUMS": job.operand(0), "STATS": job.result()}
    count, epsilon = {"count": job.op.attrs["count"]}, {"epsilon": job.op.attrs["epsilon"]}
    return _per_channel("batch_statistics", _MOMENTS + _STATISTICS, operands, ints=count, floats=epsilon)


def lower_frozen_statistics(job: Job) -> Lowered:
    """Mean and 1/std from the running statistics."""
    operands = {key: job.operand(i) for i, key in enumerate(("MEAN", "VARIANCE"))}
    operands["STATS"] = job.result()
    return _per_channel(
        "frozen_statistics", _FROZEN + _STATISTICS, operands, floats={"epsilon": job.op.attrs["epsilon"]}
    )


def lower_running_statistics(job: Job) -> Lowered:
    """The running statistics, in place; of several batches, one call each."""
    calls: list[KernelCall] = []
    for i in (0, *range(3, len(job.inputs))):
        operands = {"SUMS": job.operand(i)}
        operands |= {key: job.result(o) for o, key in enumerate(("MEAN", "VARIANCE"))}
        count, keep = {"count": job.op.attrs["count"]}, {"keep": job.op.attrs["momentum"]}
        calls += _per_channel("running_statistics", _MOMENTS + _RUNNING, operands, ints=count, floats=keep).calls
    return Lowered(tuple(calls))


def lower_normalize_parameter_grad(job: Job) -> Lowered:
    """The gradients of gamma and beta from the moments."""
    operands = {"SUMS": job.operand(0)}
    operands |= {key: job.result(o) for o, key in enumerate(("DGAMMA", "DBETA"))}
    return _per_channel("normalize_parameter_grad", _PARAMETERS, operands)


# -- maps ------------------------------------------------------------------------------------------------------------

_CHANNEL = "k * {block} + v"


def lower_normalize(job: Job) -> Lowered:
    """y = activation((x - mean) / std * gamma + beta)."""
    block = job.output.block[1]
    c, act = _CHANNEL.format(block=block), activation(job.op.attrs, "t[v]")
    normalized = _maps(
        f"normalize{act.suffix}",
        job,
        maps=("X",),
        pointers={"STATS": "float32", "GAMMA": "float32", "BETA": "float32"},
        before=[],
        pixel=[
            f"t[v] = {{X}} - STATS[{c}]",
            f"t[v] = t[v] * STATS[pair + {c}]",
            f"t[v] = t[v] * GAMMA[{c}] + BETA[{c}]",
            *act.statements,
            f"{{Y}} = {act.value}",
        ],
        scratch=("t", *act.scratch),
        floats=act.floats,
    )
    clears = () if keeps_zero(job.op.attrs) else zero_pads(*job.result())
    return Lowered((*normalized.calls, *clears), normalized.scratch)


def lower_normalize_input_grad(job: Job) -> Lowered:
    """dx = gamma / std * (dy - moments[0] / count - xhat * moments[1] / count), dy before the activation if any."""
    return _input_grad(job)


def lower_pooled_normalize_input_grad(job: Job) -> Lowered:
    """The same, from the gradient behind a max pool."""
    pool = gathered_maxima(job)
    return _input_grad(job, pool)


def _input_grad(job: Job, pool: Gathered | None = None) -> Lowered:
    c = _CHANNEL.format(block=job.output.block[1])
    fused, act = bool(job.op.attrs.get("activation")), activation_gradient(job.op.attrs, "{DY}", "e[v]")
    again = [f"e[v] = t[v] * GAMMA[{c}] + BETA[{c}]"] if fused else []
    each = 'T.Cast("float64", count)'
    return _maps(
        f"normalize_input_grad{act.suffix}",
        job,
        maps=("DY", "X"),
        pointers={"STATS": "float32", "GAMMA": "float32", "MOMENTS": "float64"}
        | ({"BETA": "float32"} if fused else {}),
        before=[
            f'm[v] = T.Cast("float32", MOMENTS[{c}] / {each})',
            f'x[v] = T.Cast("float32", MOMENTS[moments_pair + {c}] / {each})',
            f"g[v] = GAMMA[{c}] * STATS[pair + {c}]",
        ],
        pixel=[
            f"t[v] = {{X}} - STATS[{c}]",
            f"t[v] = t[v] * STATS[pair + {c}]",
            *again,
            *act.statements,
            f"d[v] = {act.value}",
            "t[v] = d[v] - m[v] - t[v] * x[v]",
            "{Y} = t[v] * g[v]",
        ],
        scratch=("m", "x", "g", "t", "d", *(("e",) if fused else ()), *act.scratch),
        floats=act.floats,
        ints={"moments_pair": job.inputs[5 if pool else 4].strides[0], "count": job.op.attrs["count"]},
        pool=pool,
    )


def lower_frozen_normalize_input_grad(job: Job) -> Lowered:
    """dx = gamma / std * dy."""
    c = _CHANNEL.format(block=job.output.block[1])
    return _maps(
        "frozen_normalize_input_grad",
        job,
        maps=("DY",),
        pointers={"STATS": "float32", "GAMMA": "float32"},
        before=[f"g[v] = GAMMA[{c}] * STATS[pair + {c}]"],
        pixel=["{Y} = {DY} * g[v]"],
        scratch=("g",),
    )


def _maps(
    name: str,
    job: Job,
    *,
    maps: Sequence[str],
    pointers: Mapping[str, str],
    before: Sequence[str],
    pixel: Sequence[str],
    scratch: Sequence[str],
    ints: Mapping[str, int] | None = None,
    floats: Mapping[str, float] | None = None,
    pool: Gathered | None = None,
) -> Lowered:
    """One pass over the maps `maps` (the first inputs) to Y; the other inputs are `pointers`, first STATS. `pool`
    gathers the map DY from the first two inputs."""
    block = job.output.block[1]
    written = job.written()
    names, first = (maps[1:], 2) if pool else (maps, 0)
    small = range(first + len(names), len(job.inputs))
    conformed, operands = conform(job.op, job.operands[first : small.start], job.output.block)
    numbers = {"pair": job.inputs[small.start].strides[0], **(ints or {})}
    statements = vectors(pixel, block)
    if pool:
        statements, numbers = pool.pixel + statements.replace("{DY}", "total[v]"), numbers | pool.ints
        conformed = Lowered((*conformed.calls, *pool.lowered.calls), (*conformed.scratch, *pool.lowered.scratch))
    kernel = mapped_kernel(
        f"{name}{pool.suffix if pool else ''}",
        block=block,
        maps=dict.fromkeys((*names, "Y"), "float32"),
        pointers={**pointers, **(pool.pointers if pool else {})},
        ints=list(numbers),
        floats=list(floats or {}),
        scratch=dict.fromkeys((*scratch, *(("total",) if pool else ())), "float32"),
        before_row=pool.before_row if pool else "",
        before_unit=vectors(before, block),
        pixel=statements,
    )
    refs = [*(ref(*job.operand(i)) for i in small), *(pool.refs if pool else ())]
    call = mapped_call(
        kernel,
        loops_over(written, block),
        [*operands, job.result()],
        pointers=refs,
        ints=tuple(numbers.values()),
        floats=tuple((floats or {}).values()),
    )
    return Lowered((*conformed.calls, call), conformed.scratch)
