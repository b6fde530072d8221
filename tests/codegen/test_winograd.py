"""Winograd convolutions: the algebra, every kernel against the references, rounding errors, and when they are chosen.

A tile that reads beyond what it may reads NaN, which its transform spreads over all of its outputs.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fusetile.codegen import conv_choice, winograd
from fusetile.codegen.conv_choice import DIRECT, tile
from fusetile.codegen.conv_tiles import Machine, machine
from fusetile.codegen.job import Job
from fusetile.codegen.lower import lower
from fusetile.codegen.targets import TARGETS
from fusetile.codegen.tvm_pipeline import assembly
from fusetile.codegen.winograd_math import both_sides, matrices
from fusetile.codegen.winograd_source import convolve_channels, convolve_tiles, filter_gradient
from fusetile.codegen.winograd_tiles import longest
from fusetile.graph import Tensor
from fusetile.reference import run_op
from tests.codegen import harness
from tests.codegen.harness import TARGET, Case, middle, seeded

BLOCKS = sorted({8, TARGET.block})
RELU = {"activation": "relu"}
LEAKY = {"activation": "leaky_relu", "alpha": 0.1}
B = 8

# images, channels, rows, columns; filters; pads; what the forward op does besides
PROBLEMS = (
    ((1, 2 * B, 9, 13), 2 * B, (1, 1, 1, 1), RELU),
    ((2, 3 * B + 4, 6, 7), B + 4, (1, 1, 1, 1), LEAKY),
    ((1, 6 * B, 5, 4), 16 * B, (1, 1, 1, 1), RELU),
    ((3, 8 * B, 4, 9), 8 * B, (0, 2, 1, 0), {}),
    ((1, 2 * B, 30, 34), 3 * B, (2, 2, 2, 2), {}),
)


def cases(
    x: tuple[int, ...], filters: int, pads: tuple[int, ...], extra: dict[str, Any], *, seed: int = 0
) -> list[Case]:
    """A convolution and its gradients on random data."""
    random = seeded(seed)
    window = {"strides": (1, 1), "dilations": (1, 1), "pads": pads}
    x_NCHW = random.standard_normal(x).astype(np.float32)
    w = random.standard_normal((filters, x[1], 3, 3)).astype(np.float32)
    bias = [random.standard_normal(filters).astype(np.float32)] * bool(extra)
    forward = Case("Conv", [x_NCHW, w, *bias], {**window, **extra}, filters=(1,))
    dy = random.standard_normal(forward.graph.tensors[forward.op.outputs[0]].shape).astype(np.float32)
    return [
        forward,
        Case("ConvInputGrad", [dy, w], {**window, "input_shape": x}, filters=(1,)),
        Case("ConvWeightGrad", [x_NCHW, dy], {**window, "kernel_shape": (3, 3)}),
    ]


@pytest.fixture
def use(monkeypatch):
    """Choose the algorithm whatever it is worth."""

    def choose(m: int) -> None:
        monkeypatch.setattr(conv_choice, "tile", lambda *sizes, **options: m)

    return choose


def test_less_scratch_and_the_same_bits(use, monkeypatch):
    use(4)
    monkeypatch.setattr(winograd, "SMALL_floats", 1)
    for case in cases(*PROBLEMS[-1]):
        plain, lean = (
            case.check(rtol=1e-3, atol=1e-3, threads=(2,), lean=lean, border=(2, 2)) for lean in (False, True)
        )
        assert np.array_equal(plain, lean)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("m", [2, 4])
def test_against_references(use, m, problem, block):
    use(m)
    shape, filters, *rest = problem
    scale = block // B
    shape = (shape[0], shape[1] * scale, *shape[2:])
    for case in cases(shape, filters * scale, *rest):
        tolerance = 3e-5 * float(np.abs(case.expected(case.domain.box)[0]).max())
        for box in (case.domain.box, middle(case.domain.box, case.domain, channels=block * (case.op.kind == "Conv"))):
            case.check(box, atol=tolerance, threads=(1, 2, 3), block=block, border=(3, 3), margin=1, pitch=1)


@pytest.mark.parametrize("m", [2, 4])
def test_part_of_the_input_channels_is_a_partial_sum(use, m):
    use(m)
    forward, backward, _ = cases((1, 4 * B, 6, 6), 4 * B, (1, 1, 1, 1), {})
    for case in (forward, backward):
        *box, (_, channels) = case.domain.box
        for part in ((0, 2 * B), (2 * B, channels)):
            case.check((*box, part), atol=1e-3, border=(2, 2))


def test_many_blocks_of_tiles_and_chunks_of_channels(use, monkeypatch):
    """Hardly any cache: every loop of the lowering turns."""
    use(4)
    monkeypatch.setattr(winograd, "machine", lambda *key: small_caches(machine(*key)))
    monkeypatch.setattr(winograd, "MAX_TURNS", 5)
    for problem in (((1, 4 * B, 30, 34), 2 * B, (1, 1, 1, 1), RELU), ((2, 6 * B, 9, 14), 16 * B, (1, 1, 1, 1), RELU)):
        for case in cases(*problem):
            tolerance = 3e-5 * float(np.abs(case.expected(case.domain.box)[0]).max())
            case.check(atol=tolerance, threads=(1, 2, 3), border=(1, 1))


def small_caches(m: Machine) -> Machine:
    """The same CPU with hardly any cache."""
    return harness.replace(m, outer_bytes=40_000)


# what conv_choice and --numerics promise: errors against float64, relative to the direct kernel's, of F(2x2) and F(4x4)
L2_LIMITS = {"Conv": (0.8, 2.2), "ConvInputGrad": (0.8, 2.2), "ConvWeightGrad": (1.4, 3.5)}
LARGEST_LIMITS = {2: 1.2, 4: 2.8}


@pytest.mark.parametrize("kind", list(L2_LIMITS))
@pytest.mark.parametrize("problem", [((3, 40, 13, 17), 72, (1, 1, 1, 1)), ((1, 64, 7, 7), 128, (0, 2, 1, 0))])
def test_rounding_errors(use, problem, kind):
    case = next(c for c in cases(*problem, {}, seed=3) if c.op.kind == kind)
    box = case.domain.box
    (exact,) = run_op(case.graph, case.op, case.domain, box, [value.astype(np.float64) for value in case.inputs])
    l2, largest = {}, {}
    for m in (DIRECT, 2, 4):
        use(m)
        (found,) = case.check(box, atol=1e-2, threads=(1,), border=(2, 2))
        l2[m] = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        largest[m] = float(np.abs(found - exact).max() / np.sqrt((exact**2).mean()))
    assert 0 < l2[DIRECT] < 1e-6 and largest[DIRECT] < 1e-5
    for m, limit in zip((2, 4), L2_LIMITS[kind], strict=True):
        assert l2[m] <= limit * l2[DIRECT], l2
        assert largest[m] <= LARGEST_LIMITS[m] * largest[DIRECT], largest


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("gradient", [False, True])
def test_matrices_convolve_exactly(m, gradient):
    output, weights, inputs = matrices(m, gradient=gradient)
    taps, size = len(weights[0]), len(inputs)
    g = [Fraction(3 * i + 1, 7) for i in range(taps)]
    d = [Fraction(i * i - 5, 3) for i in range(size)]
    products = [a * b for a, b in zip(times(weights, g), times(inputs, d), strict=True)]
    expected = [sum(g[k] * d[i + k] for k in range(taps)) for i in range(len(output))]
    assert times(output, products) == expected
    assert len(output) + taps - 1 == size == m + 2


def times(matrix: list[list[Fraction]], vector: list[Fraction]) -> list[Fraction]:
    return [sum((a * b for a, b in zip(row, vector, strict=True)), start=Fraction(0)) for row in matrix]


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_statements_multiply_from_both_sides(m, gradient, which):
    matrix = matrices(m, gradient=gradient)[which]
    statements = both_sides(matrix, lambda i, j: f"source[{i}, {j}]", lambda i, j: f"target[{i}, {j}]")
    rows, columns = len(matrix), len(matrix[0])
    source, target = seeded().standard_normal((columns, columns)), np.zeros((rows, rows))
    arrays = {name: np.zeros((count, 1)) for name, count in (("loaded", 36), ("halfway", 36), ("temporary", 48))}
    lanes = type("T", (), {"float32": float})
    exec("\n".join(statements), {"source": source, "target": target, "v": 0, "T": lanes, **arrays})
    values = np.array(matrix, float)
    np.testing.assert_allclose(target, values @ source @ values.T, rtol=1e-12, atol=1e-12)


FAMILIES = ("conv", "conv_input_grad", "conv_weight_grad")


@pytest.mark.parametrize("family", FAMILIES)
def test_choice(family):
    for target in TARGETS.values():
        assert tile(family, 1, 208, 208, 3, 32, target=target, numerics="fast") == DIRECT
        assert tile(family, 1, 208, 208, 32, 8, target=target, numerics="fast") == DIRECT
        assert tile(family, 1, 104, 104, 64, 128, target=target, numerics="fast") == 4
        assert tile("conv", 1, 104, 104, 64, 128, target=target, numerics="strict") == 2
        assert tile("conv", 1, 2, 2, 512, 512, target=target, numerics="fast") == DIRECT
    assert tile(family, 1, 13, 13, 512, 1024, target=TARGETS["avx512"], numerics="fast") != DIRECT


def test_choice_on_avx2_is_what_was_fastest():
    """Images, size, channels in and out: the fastest algorithm, or those within 5 % of it."""
    for images, size, c, k, *fastest in (
        (1, 2, 512, 512, {DIRECT}, {2, DIRECT}, {DIRECT}),
        (1, 104, 16, 16, {4}, {4}, {4}),
        (1, 14, 32, 64, {4}, {4}, {4}),
        (1, 7, 128, 128, {2}, {2}, {4}),
        (1, 28, 128, 128, {4}, {4}, {4}),
        (1, 14, 512, 512, {2}, {2, 4}, {2}),
        (4, 14, 512, 512, {4}, {4}, {4}),
        (1, 13, 512, 1024, {2}, {2, 4}, {2}),
        (4, 13, 512, 1024, {4}, {4}, {4}),
        (1, 7, 256, 512, {DIRECT}, {2, 4}, {DIRECT}),
        (4, 7, 512, 512, {4}, {4}, {4}),
    ):
        for family, wanted in zip(FAMILIES, fastest, strict=True):
            channels = (k, c) if family == "conv_input_grad" else (c, k)
            found = tile(family, images, size, size, *channels, target=TARGETS["avx2"], numerics="fast")
            assert found in wanted, (family, images, size, c, k)


def test_strict_numerics_use_no_large_tiles():
    for case in cases((1, 64, 26, 26), 64, (1, 1, 1, 1), {}):
        buffers = [
            harness.buffer_for(name, t, tuple((0, n) for n in t.shape), border=(1, 1)) for name, t in tensors(case)
        ]
        symbols = {}
        for numerics in ("fast", "strict"):
            job = Job(case.op, case.domain, case.domain.box, buffers[:-1], buffers[-1:], TARGET, numerics)
            lowered = lower(job)
            symbols[numerics] = [call.kernel.symbol for call in lowered.calls]
        assert all(symbol.startswith("winograd4_") for symbol in symbols["fast"])
        assert all(symbol.startswith("winograd2_") for symbol in symbols["strict"])


def tensors(case: Case) -> list[tuple[str, Tensor]]:
    """What the op reads and writes."""
    return [(name, case.graph.tensors[name]) for name in (*case.op.inputs, *case.op.outputs)]


def test_what_winograd_cannot_do_is_direct(use, monkeypatch):
    """Other windows, strides, dilations, and channels that fill no block."""
    use(4)
    monkeypatch.setattr(winograd, "lower_conv", None)
    random = seeded()
    for channels, kernel, stride, dilation in (
        (16, 3, 2, 1),
        (16, 3, 1, 2),
        (16, 5, 1, 1),
        (16, 1, 1, 1),
        (3, 3, 1, 1),
    ):
        x = random.standard_normal((1, channels, 9, 9)).astype(np.float32)
        w = random.standard_normal((16, channels, kernel, kernel)).astype(np.float32)
        attrs = {"strides": (stride,) * 2, "dilations": (dilation,) * 2, "pads": (1, 1, 1, 1)}
        Case("Conv", [x, w], attrs, filters=(1,)).check(atol=1e-4, border=(1, 1))


@pytest.mark.parametrize("name", ["pi3", "armv7"])
@pytest.mark.parametrize("m", [2, 4])
def test_multiplication_on_arm_needs_no_stack(name, m):
    """Loops of multiplications multiply by element and keep everything in registers."""
    cpu = machine(TARGETS[name], 8)
    long = longest(cpu, 1)
    for kernel in (
        convolve_tiles(vectors=cpu.vectors, m=m, wide=1, long=long),
        convolve_channels(vectors=cpu.vectors, m=m, wide=1, long=long),
        filter_gradient(vectors=cpu.vectors, m=m, wide=1, lines=min(8, cpu.lines[1])),
    ):
        text = assembly(kernel.source, TARGETS[name].tvm, TARGETS[name].ir_flags)
        blocks = re.split(r"\n(?=\.LBB)", text)
        by_element = r"\t(?:fmla\t.*\.s|vmla\.f32\tq.*d\d+)\[\d\]"
        hot = [block for block in blocks if len(re.findall(by_element, block)) >= 2 * (long - 1)]
        assert hot, kernel.symbol
        for block in hot:
            assert not re.search(r"\t(ldr|ldp|str|stp)\tq.*\[sp|16-byte (Spill|Reload)", block), (
                f"{kernel.symbol} on {name}:\n{block}"
            )
