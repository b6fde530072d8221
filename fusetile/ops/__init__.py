"""The op table: one row per op kind. A new op is a row in the file of its family."""

from fusetile.ops import (
    arithmetic,
    conv,
    functions,
    loss,
    matmul,
    norm,
    pointwise,
    pool,
    rearrange,
    reduce,
    resample,
    shape,
    update,
)
from fusetile.ops.base import ROWS, Axis, Domain, Row, Spec, domain_of, overwritten, register, row

__all__ = [
    "ROWS",
    "Axis",
    "Domain",
    "Row",
    "Spec",
    "arithmetic",
    "conv",
    "domain_of",
    "functions",
    "loss",
    "matmul",
    "norm",
    "overwritten",
    "pointwise",
    "pool",
    "rearrange",
    "reduce",
    "register",
    "resample",
    "row",
    "shape",
    "update",
]
