"""What follows from the sums of a normalization of layers, instances or groups: means, and statistics."""

from __future__ import annotations

from fusetile.box import extents, view4
from fusetile.codegen.calls import Lowered, ref, vectors
from fusetile.codegen.job import Job
from fusetile.codegen.mapped import loops_over, mapped_call, mapped_kernel

_AT = "n * {0}_image + h * {0}_row + w * {0}_pixel"


def lower_statistics(job: Job) -> Lowered:
    """Both sums over `count`; of Statistics, the mean and 1 / sqrt(variance + epsilon)."""
    block, written, need = job.output.block[1], job.written(), job.need(0)
    per, channels = job.op.attrs.get("per_group", 1), extents(view4(written))[1]
    start, stop = view4(need)[1]
    # the block in which the groups begin, and how far in them is the first channel that is written
    low = start // block * block
    first, inside = start - low, view4(written)[1][0] - start
    part = need if per == 1 else (need[0], (low, stop), *need[2:])
    ints = {"channels": channels, "count": job.op.attrs["count"]}
    for key, buffer in zip("AB", job.inputs, strict=True):
        image, depth, row, pixel = buffer.strides
        ints |= {f"{key}_image": image, f"{key}_block": depth, f"{key}_row": row, f"{key}_pixel": pixel}
    if per > 1:
        ints |= {"per": per, "first": first, "inside": inside}
    sums = []
    for i, key in enumerate("AB"):
        at = _AT.format(key)
        if per == 1:
            sums.append(vectors([f"s{i}[v] = {key}[{at} + k * {key}_block + v]"], block))
            continue
        channel = f"(first + T.truncdiv(T.min(k * {block} + v, channels - 1) + inside, per) * per + c)"
        element = f"{key}[{at} + T.truncdiv({channel}, {block}) * {key}_block + T.truncmod({channel}, {block})]"
        sums.append(f"""
for v in T.serial({block}):
    s{i}[v] = T.float64(0)
    for c in T.serial(per):
        s{i}[v] = s{i}[v] + {element}
""")
    real = f"T.Select(k * {block} + v < channels, {{}}, T.float32(0))"
    each = 'T.Cast("float64", count)'
    lines = [f"s{i}[v] = s{i}[v] / {each}" for i in range(2)]
    second = 'T.Cast("float32", s1[v])'
    if job.op.kind == "Statistics":
        lines.append('s1[v] = T.max(s1[v] - s0[v] * s0[v], T.float64(0)) + T.Cast("float64", epsilon)')
        second = 'T.Cast("float32", T.float64(1) / T.sqrt(s1[v]))'
    lines += [f"{{Y{i}}} = {real.format(value)}" for i, value in enumerate(('T.Cast("float32", s0[v])', second))]
    floats = {"epsilon": job.op.attrs["epsilon"]} if job.op.kind == "Statistics" else {}
    kernel = mapped_kernel(
        f"{job.op.kind.lower()}{'_of_groups' if per > 1 else ''}",
        block=block,
        maps={"Y0": "float32", "Y1": "float32"},
        pointers={"A": "float64", "B": "float64"},
        ints=list(ints),
        floats=list(floats),
        scratch={"s0": "float64", "s1": "float64"},
        pixel="".join(sums) + vectors(lines, block),
    )
    call = mapped_call(
        kernel,
        loops_over(written, block, each=per),
        job.results,
        pointers=[ref(buffer, part) for buffer in job.inputs],
        ints=tuple(ints.values()),
        floats=tuple(floats.values()),
    )
    return Lowered((call,))
