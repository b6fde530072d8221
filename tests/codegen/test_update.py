"""The weight update, bit by bit."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from fusetile.box import empty
from fusetile.codegen.targets import TARGETS
from fusetile.ops.update import controls_of, shards_box, states_of
from tests.codegen.harness import Case, seeded

RATE = np.array([0.1], np.float32)
EMPTY = empty(2)


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


ADAM = {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-6, "weight_decay": 0.1}
OPTIMIZERS = [
    ("SGD", {"momentum": 0.9, "nesterov": True, "clipped": True, "weight_decay": 0.01}),
    ("Adam", {**ADAM, "ema": 0.9}),
    ("Adam", {**ADAM, "decoupled": True, "clipped": True}),
    ("RMSprop", {"alpha": 0.9, "epsilon": 1e-6}),
    ("RMSprop", {"alpha": 0.9, "epsilon": 1e-6, "momentum": 0.5, "weight_decay": 0.1, "ema": 0.5}),
]


@pytest.mark.parametrize(("kind", "attrs"), OPTIMIZERS, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(OPTIMIZERS)])
def test_optimizers_bit_by_bit(kind: str, attrs: dict[str, Any]) -> None:
    random = seeded()
    states, controls = len(states_of(kind, attrs)), len(controls_of(kind, attrs))
    w, g, *more = (np.abs(random.standard_normal((19, 11, 3, 3), np.float32)) for _ in range(2 + states))
    inputs = [w, g, RATE, *more, *(RATE * (i + 2) for i in range(controls))]
    case = Case(kind, inputs, attrs, [i for i, value in enumerate(inputs) if value.ndim > 1])
    case.check(((8, 19), *case.domain.box[1:]), rtol=0, atol=0, margin=1)


def test_norm_of_shards() -> None:
    """Of three gradients, of one of which there is nothing here."""
    shapes = [(19, 11, 3, 3), (24, 20), (37,)]
    gradients = [seeded(i).standard_normal(shape, np.float32) for i, shape in enumerate(shapes)]
    case = Case("GradientNorm", gradients, {}, (0, 1))
    box = shards_box([case.graph.tensors[name] for name in case.op.inputs], [((8, 16), (0, 11)), EMPTY, ((8, 37),)])
    (found,) = case.check(box, rtol=1e-6, margin=1)
    assert found == pytest.approx((gradients[0][8:16] ** 2).sum() + (gradients[2][8:] ** 2).sum(), rel=1e-5)


@pytest.mark.parametrize("name", ["pi3", "armv7", "avx2", "avx512"])
def test_no_target_contracts(name: str) -> None:
    from fusetile.codegen.job import Job
    from fusetile.codegen.lower import lower
    from fusetile.codegen.tvm_pipeline import assembly
    from tests.codegen.harness import buffer_for

    shape = (8, 8, 3, 3)
    values = [np.zeros(shape, np.float32)] * 2
    case = Case("SGD", [*values, RATE, values[0]], {"momentum": 0.9, "weight_decay": 0.1}, (0, 1, 3))
    tensors = case.graph.tensors
    inputs = [buffer_for(i, tensors[i], case.domain.need(case.domain.box, k)) for k, i in enumerate(case.op.inputs)]
    lowered = lower(Job(case.op, case.domain, case.domain.box, inputs, [inputs[0], inputs[3]], TARGETS[name]))
    text = assembly(lowered.calls[0].kernel.source, TARGETS[name].tvm, TARGETS[name].ir_flags)
    assert "mul" in text and not re.search("fma|fml|fnm|vmla|vmls|vnmla", text)
