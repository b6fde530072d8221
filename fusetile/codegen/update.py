"""SGD with momentum and weight decay, in place, in any layout of the parameter.

Products and sums are never contracted, so that every CPU computes the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from fusetile.box import Box
from fusetile.codegen.calls import Lowered, ref
from fusetile.codegen.reblock import conform
from fusetile.codegen.strided import strided_call, strided_kernel
from fusetile.codegen.targets import Target
from fusetile.graph import Op
from fusetile.ops import Domain
from fusetile.program import Buffer

# TVM's LLVM fuses whatever product it sees go into a sum; it does not see one through integers. `zero` is 0.
_ROUNDED = 'p[v] = T.reinterpret("float32", T.bitwise_xor(T.reinterpret("int32", {}), zero))'


def lower_sgd(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target
) -> Lowered:
    """g' = g + weight_decay * w; v' = momentum * v + g'; w' = w - learning_rate * v'."""
    _, gradient, rate, *_ = inputs
    written = domain.output(box)
    before, [moved] = conform(op, [(gradient, domain.need(box, 1))], outputs[0].block)
    operands = [(outputs[0], written), moved, *((state, written) for state in outputs[1:])]
    names = ("W", "G", "V")[: len(operands)]
    statements = [_ROUNDED.format("decay * {W}"), "g[v] = {G} + p[v]"]
    if len(outputs) > 1:
        statements += [_ROUNDED.format("momentum * {V}"), "g[v] = p[v] + g[v]", "{V} = g[v]"]
    statements += [_ROUNDED.format("RATE[0] * g[v]"), "{W} = {W} - p[v]"]
    kernel = strided_kernel(
        "sgd_momentum" if len(outputs) > 1 else "sgd",
        operands=dict.fromkeys(names, "float32"),
        constants={"RATE": "float32"},
        statements=statements,
        more_ints=("zero",),
        floats=("decay", "momentum"),
        scratch={"p": "float32", "g": "float32"},
    )
    floats = (op.attrs["weight_decay"], op.attrs["momentum"])
    call = strided_call(kernel, operands, constants=[ref(rate, domain.need(box, 2))], more_ints=(0,), floats=floats)
    return Lowered((*before.calls, call), before.scratch)
