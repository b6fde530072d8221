"""Sums over a map per channel, in float64: bias gradients and the moments of batch normalization.

Every work unit sums a band of rows of one channel block into a partial sum of its own; a second call adds these in
order. The bands follow from the box alone, so that the result does not depend on the number of threads.
"""

from __future__ import annotations

from fusetile.box import Box
from fusetile.codegen.activation import activation_gradient
from fusetile.codegen.calls import KernelCall, Lowered, Ref, make_kernel, ref, vectors
from fusetile.codegen.job import Job
from fusetile.codegen.mapped import Loops, loops_over, mapped_call, mapped_kernel
from fusetile.codegen.pool import Gathered, gathered_maxima
from fusetile.codegen.reblock import conform
from fusetile.program import Buffer

_A64, _B64 = 'T.Cast("float64", {A})', 'T.Cast("float64", t[v])'
_D64 = 'T.Cast("float64", d[v])'
_XHAT = ["t[v] = {B} - STATS[k * BLOCK + v]", "t[v] = t[v] * STATS[pair + k * BLOCK + v]"]
# what a fused activation takes, and the gradient before it
_Y, _BEFORE = "e[v] = t[v] * GAMMA[k * BLOCK + v] + BETA[k * BLOCK + v]", "BEFORE"
# per family: the further map, the statements for a pixel, the sums it leaves
_PIXEL = {
    "channel_sum": ((), [f"s0[v] = s0[v] + {_A64}"], 1),
    "channel_moments": (
        (),
        ["t[v] = {A}", f"s0[v] = s0[v] + {_B64}", f"s1[v] = s1[v] + {_B64} * {_B64}"],
        2,
    ),
    "normalize_moments": (("B",), [f"s0[v] = s0[v] + {_A64}", *_XHAT, f"s1[v] = s1[v] + {_A64} * {_B64}"], 2),
    "normalize_moments_behind": (
        ("B",),
        [*_XHAT, _Y, _BEFORE, f"s0[v] = s0[v] + {_D64}", f"s1[v] = s1[v] + {_D64} * {_B64}"],
        2,
    ),
}


def lower_channel_sum(job: Job) -> Lowered:
    """The sum of dy over n, h and w."""
    return _lower("channel_sum", job)


def lower_channel_moments(job: Job) -> Lowered:
    """The sums of x and of x * x."""
    return _lower("channel_moments", job)


def lower_normalize_moments(job: Job) -> Lowered:
    """The sums of dy and of dy * (x - mean) / std; dy is that before the activation, if there is one."""
    family = "normalize_moments_behind" if job.op.attrs.get("activation") else "normalize_moments"
    return _lower(family, job)


def lower_pooled_normalize_moments(job: Job) -> Lowered:
    """The same, from the gradient behind a max pool."""
    family = "normalize_moments_behind" if job.op.attrs.get("activation") else "normalize_moments"
    pool = gathered_maxima(job)
    return _lower(family, job, pool)


def _lower(family: str, job: Job, pool: Gathered | None = None) -> Lowered:
    """`pool` gathers the map A from the first two inputs."""
    more, pixel, sums = _PIXEL[family]
    block = job.output.block[1]
    names = more if pool else ("A", *more)
    first = 2 if pool else 0
    small = range(first + len(names), len(job.inputs))
    before, maps = conform(job.op, job.operands[first : small.start], job.output.block)
    loops = loops_over(maps[0][1], block)
    size = loops.units * sums * block
    partial = Buffer(f"{job.op.name}.partial", ((0, size),), "float64")
    scratch = {f"s{q}": "float64" for q in range(sums)}
    store = [f"PARTIAL[(u * {sums} + {q}) * {block} + v] = s{q}[v]" for q in range(sums)]
    act = activation_gradient(job.op.attrs if more else {}, "{A}", "e[v]")
    vectors_of = dict.fromkeys(("STATS", "GAMMA", "BETA")[: len(small)], "float32")
    lines = {_BEFORE: [*act.statements, f"d[v] = {act.value}"]}
    pixel = [part.replace("BLOCK", str(block)) for line in pixel for part in lines.get(line, [line])]
    statements, ints = vectors(pixel, block), {"pair": job.inputs[small.start].strides[0] if small else 0}
    if pool:
        statements, ints = pool.pixel + statements.replace("{A}", "total[v]"), ints | pool.ints
    kernel = mapped_kernel(
        f"{family}{act.suffix}{pool.suffix if pool else ''}",
        block=block,
        maps=dict.fromkeys(names, "float32"),
        pointers={"PARTIAL": "float64", **vectors_of, **(pool.pointers if pool else {})},
        ints=tuple(ints),
        floats=list(act.floats),
        scratch={
            **scratch,
            **{name: "float32" for name in "ted" if f"{name}[v]" in "".join(pixel)},
            **dict.fromkeys((*act.scratch, *(("total",) if pool else ())), "float32"),
        },
        before_row=pool.before_row if pool else "",
        before_unit=vectors([f"s{q}[v] = T.float64(0)" for q in range(sums)], block),
        pixel=statements,
        after_unit=vectors(store, block),
    )
    pointers = [ref(partial), *(ref(*job.operand(i)) for i in small), *(pool.refs if pool else ())]
    floats = tuple(act.floats.values())
    summed = mapped_call(kernel, loops, maps, pointers=pointers, ints=tuple(ints.values()), floats=floats)
    finish = _finish(loops, sums, ref(partial), *job.result())
    made = [before, pool.lowered] if pool else [before]
    calls = [call for lowered in made for call in lowered.calls]
    return Lowered((*calls, summed, finish), (*(one for lowered in made for one in lowered.scratch), partial))


def _finish(loops: Loops, sums: int, partial: Ref, output: Buffer, box: Box) -> KernelCall:
    """Add the partial sums of every channel block, in order."""
    block = output.block[1]
    add = vectors(
        [f"s[v] = s[v] + PARTIAL[(((n * blocks + k) * bands + i) * {sums} + q) * {block} + v]"], block
    ).replace("\n", "\n                ")
    body = f"""
for k in T.serial(lo, hi):
    for q in T.serial({sums}):
        for v in T.vectorized({block}):
            s[v] = T.float64(0)
        for n in T.serial(images):
            for i in T.serial(bands):
                {add}
        for v in T.vectorized({block}):
            Y[q * pair + k * {block} + v] = T.Cast("{output.dtype}", s[v])
"""
    kernel = make_kernel(
        f"add_partials_{sums}_{output.dtype}_{block}",
        pointers={"PARTIAL": "float64", "Y": output.dtype},
        ints=("images", "blocks", "bands", "pair"),
        scratch={"s": ((block,), "float64")},
        body=body,
    )
    ints = (loops.images, loops.blocks, loops.bands, output.strides[0])
    return KernelCall(kernel, loops.blocks, (partial, ref(output, box)), ints)
