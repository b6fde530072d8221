"""Between maps and filters: copies between two ways to block the first two dimensions."""

from __future__ import annotations

from fusetile.box import extents, view4
from fusetile.codegen.calls import KernelCall, Lowered, make_kernel, ref
from fusetile.codegen.job import Job


def lower_restored(job: Job) -> Lowered:
    """One work unit per pair of channels, those that pad the last blocks of the output included."""
    (x, part), (y, written) = job.operand(0), job.result()
    k, c, height, width = extents(view4(written))
    rows, columns = (-(-size // block) * block for size, block in zip((k, c), y.block, strict=True))
    body = """
for u in T.serial(lo, hi):
    i: T.int32 = u // columns
    j: T.int32 = u % columns
    at: T.int32 = i // y_b0 * y0 + j // y_b1 * y1 + j % y_b1 * y_b0 + i % y_b0
    if (i < k) and (j < c):
        origin: T.int32 = i // x_b0 * x0 + j // x_b1 * x1 + j % x_b1 * x_b0 + i % x_b0
        for h in T.serial(height):
            for w in T.serial(width):
                Y[at + h * y2 + w * y3] = X[origin + h * x2 + w * x3]
    else:
        for h in T.serial(height):
            for w in T.serial(width):
                Y[at + h * y2 + w * y3] = T.float32(0)
"""
    storage = [f"{q}{part}" for q in "xy" for part in ("0", "1", "2", "3", "_b0", "_b1")]
    kernel = make_kernel(
        "restored",
        pointers={"X": "float32", "Y": "float32"},
        ints=["k", "c", "height", "width", "columns", *storage],
        body=body,
    )
    ints = (k, c, height, width, columns, *x.strides, *x.block, *y.strides, *y.block)
    return Lowered((KernelCall(kernel, rows * columns, (ref(x, part), ref(y, written)), ints),))
