"""The weight update, bit by bit."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fusetile.codegen.targets import TARGETS
from tests.codegen.harness import Case, seeded

RATE = np.array([0.1], np.float32)


@pytest.mark.parametrize("shape", [(19, 11, 3, 3), (24, 20), (37,)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_equals_the_reference_bit_by_bit(shape: tuple[int, ...], momentum: float) -> None:
    random = seeded()
    w, g, v = (random.standard_normal(shape, np.float32) for _ in range(3))
    inputs = [w, g, RATE, *([v] if momentum else [])]
    filters = [i for i, value in enumerate(inputs) if value.ndim > 1]
    case = Case("SGD", inputs, {"momentum": momentum, "weight_decay": 0.01}, filters)
    case.check(rtol=0, atol=0)
    part = ((8, shape[0]), *case.domain.box[1:])
    case.check(part, rtol=0, atol=0, margin=1)


@pytest.mark.parametrize("name", ["pi3", "armv7", "avx2", "avx512"])
def test_no_target_contracts(name: str) -> None:
    from fusetile.codegen.lower import lower
    from fusetile.codegen.tvm_pipeline import assembly
    from tests.codegen.harness import buffer_for

    shape = (8, 8, 3, 3)
    values = [np.zeros(shape, np.float32)] * 2
    case = Case("SGD", [*values, RATE, values[0]], {"momentum": 0.9, "weight_decay": 0.1}, (0, 1, 3))
    tensors = case.graph.tensors
    inputs = [buffer_for(i, tensors[i], case.domain.need(case.domain.box, k)) for k, i in enumerate(case.op.inputs)]
    lowered = lower(case.op, case.domain, case.domain.box, inputs, [inputs[0], inputs[3]], target=TARGETS[name])
    text = assembly(lowered.calls[0].kernel.source, TARGETS[name].tvm, TARGETS[name].ir_flags)
    assert "mul" in text and not re.search("fma|fml|fnm|vmla|vmls|vnmla", text)
