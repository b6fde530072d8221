"""What kernels cost on a Raspberry Pi, as far as an emulator can tell: executed instructions per vector
multiply-add of the direct convolution. They are the same on every computer, so they have limits."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from benchmarks.arm import HOT
from benchmarks.emulated.emulator import Program
from benchmarks.emulated.layers import DIRECT, PHASES, Layer
from benchmarks.emulated.loops import hot_loops, typical_distance
from benchmarks.emulated.others import products_of_attention
from fusetile.codegen.targets import TARGETS, host
from tests.codegen.harness import Case

FORWARD, INPUT, WEIGHT = PHASES
# small maps, with the register tiles of large ones
CASES = (
    (Layer(32, 32, 26, 3), FORWARD, DIRECT, 1.25),
    (Layer(32, 32, 26, 3), INPUT, DIRECT, 1.25),
    (Layer(32, 32, 26, 3), WEIGHT, DIRECT, 1.3),
    (Layer(64, 64, 28, 3, 2), FORWARD, DIRECT, 1.25),
    (Layer(64, 64, 28, 3, 2), INPUT, DIRECT, 1.25),
    (Layer(128, 128, 28, 1), FORWARD, DIRECT, 1.25),
    (Layer(128, 128, 28, 1), INPUT, DIRECT, 1.25),
    (Layer(128, 128, 28, 1), WEIGHT, DIRECT, 1.3),
    (Layer(512, 128, 7, 1), FORWARD, DIRECT, 1.25),
    (Layer(512, 128, 7, 1), INPUT, DIRECT, 1.25),  # only 49 pixels use the turned weights
    (Layer(128, 512, 7, 1, images=4), INPUT, DIRECT, 1.25),
    (Layer(512, 128, 7, 1), WEIGHT, DIRECT, 1.3),
    (Layer(3, 32, 52, 3), FORWARD, DIRECT, 1.4),
    (Layer(3, 32, 52, 3), WEIGHT, DIRECT, 1.4),
    (Layer(64, 64, 36, 3), FORWARD, 4, 0.5),
    (Layer(64, 64, 36, 3), INPUT, 4, 0.5),
    (Layer(64, 64, 36, 3), WEIGHT, 4, 0.5),
    (Layer(64, 128, 28, 3), FORWARD, 4, 0.5),  # many channels
    (Layer(16, 16, 26, 3, groups=16), FORWARD, DIRECT, 2.2),
    (Layer(16, 16, 26, 3, groups=16), WEIGHT, DIRECT, 2.6),
)
# 64-bit CPUs run the same kernels, cut for other caches; compiling is what takes time
OF_CPU = {"pi3": CASES, "pi4": CASES[::3], "pi5": CASES[1::3], "armv7": CASES[::3]}
ARMV7 = 1.6  # times the limits: 16 registers instead of 32
LOAD_DISTANCE = 5  # median: an in-order CPU would wait


@cache
def expected(case: int) -> np.ndarray:
    """What a case gives, by the numpy reference."""
    layer, phase, algorithm, _ = CASES[case]
    work = layer.work(phase, algorithm, host())
    filters = [] if phase == WEIGHT else [1]
    reference = Case(work.op.kind, list(work.inputs.values()), work.op.attrs, filters)
    return reference.expected(reference.domain.box)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_CPU)
def test_executed_instructions(name: str, plugin: Path, tmp_path: Path) -> None:
    target = TARGETS[name]
    works = [layer.work(phase, algorithm, target) for layer, phase, algorithm, _ in OF_CPU[name]]
    program = Program(works, target, tmp_path, plugin)
    for i, (layer, phase, algorithm, limit) in enumerate(OF_CPU[name]):
        (result,), profile = program.run(i)
        case = f"{layer}, {phase}, F({algorithm})"
        reference = expected(CASES.index((layer, phase, algorithm, limit)))
        np.testing.assert_allclose(result, reference, rtol=0, atol=1e-4 * abs(result).max(), err_msg=case)
        assert profile.executed / layer.ideal <= limit * (ARMV7 if name == "armv7" else 1), case
        loops = hot_loops(profile, HOT)
        assert loops and not [text for loop in loops for text in loop.stack], case
        if algorithm:
            assert layer.chosen(phase, target) == algorithm, case
        if name != "armv7" and algorithm == DIRECT:
            assert typical_distance(loops)[1] >= LOAD_DISTANCE, case


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), [("pi3", 1.9), ("armv7", 2.5)])
def test_products_of_attention(name: str, limit: float, plugin: Path, tmp_path: Path) -> None:
    """Few tokens of a short inner dimension: what is not multiplication counts."""
    target, products = TARGETS[name], list(products_of_attention(np.random.default_rng(0)))
    program = Program([one.work(target) for one in products], target, tmp_path, plugin)
    for i, one in enumerate(products):
        (result,), profile = program.run(i)
        reference = Case(one.kind, one.values, one.attrs)
        (wanted,) = reference.expected(reference.domain.box)
        np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-4, err_msg=one.name)
        assert profile.executed / one.elements <= limit, one.name
        if name != "armv7":  # which has so few registers that an address comes from there
            assert not [text for loop in hot_loops(profile, HOT) for text in loop.stack], one.name
