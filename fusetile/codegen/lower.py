"""Op -> kernel calls: one module per kernel family, found by the name in the op's row."""

from __future__ import annotations

from importlib import import_module

from fusetile.box import volume
from fusetile.codegen.calls import Lowered
from fusetile.codegen.conv_choice import lower_convolution
from fusetile.codegen.job import Job
from fusetile.errors import PlanError
from fusetile.ops import row

_CONVOLUTIONS = ("conv", "conv_input_grad", "conv_weight_grad")
# Row.kernel -> the module in this package whose function lower_FAMILY lowers it
_MODULES = {
    "elementwise": "elementwise",
    "update": "update",
    "gradient_norm": "update",
    "dropout": "dropout",
    "max_pool": "pool",
    "max_pool_grad": "pool",
    "max_pool_pick": "pool",
    "average_pool": "pool",
    "average_pool_grad": "pool",
    "global_average_pool": "pool",
    "global_average_pool_grad": "pool",
    "channel_sum": "moments",
    "channel_moments": "moments",
    "normalize_moments": "moments",
    "pooled_normalize_moments": "moments",
    "batch_statistics": "norm",
    "frozen_statistics": "norm",
    "running_statistics": "norm",
    "normalize": "norm",
    "normalize_parameter_grad": "norm",
    "normalize_input_grad": "norm",
    "pooled_normalize_input_grad": "norm",
    "frozen_normalize_input_grad": "norm",
    "cross_entropy": "loss",
    "cross_entropy_grad": "loss",
    "likelihood": "loss",
    "likelihood_grad": "loss",
    "label_weight": "loss",
    "mean_of_pairs": "loss",
    "yolo": "yolo",
    "yolo_grad": "yolo",
    "concat": "shape",
    "slice": "shape",
    "reshape": "shape",
    "pad": "shape",
    "rearrange": "rearrange",
    "restored": "filters",
    "resample": "resample",
    "mat_mul": "matmul",
    "sum_to": "reduce",
    "max_to": "reduce",
    "sums": "reduce",
    "statistics": "statistics",
    "softmax": "softmax",
    "softmax_grad": "softmax",
    "grouped_conv": "grouped",
    "grouped_conv_input_grad": "grouped",
    "grouped_conv_weight_grad": "grouped",
}


def lower(job: Job) -> Lowered:
    """The calls that do the iterations of an op, and the scratch that they use."""
    if volume(job.box) == 0:
        return Lowered()
    op, family = job.op, row(job.op.kind).kernel
    if op.attrs.get("groups", 1) > 1:
        family = f"grouped_{family}"
    for output, i in row(op.kind).in_place:
        if output < len(job.outputs) and job.outputs[output] != job.inputs[i]:
            raise PlanError(f"{op.name}: output {job.outputs[output].name} must lie in input {job.inputs[i].name}")
    if family in _CONVOLUTIONS:
        return lower_convolution(job)
    if family not in _MODULES:
        raise PlanError(f"{op.kind}: no kernel family {family!r}")
    module = import_module(f"fusetile.codegen.{_MODULES[family]}")
    lowered: Lowered = getattr(module, f"lower_{family}")(job)
    return lowered
