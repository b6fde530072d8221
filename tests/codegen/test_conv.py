"""Convolutions, fully connected layers and their gradients against the rows' numpy references.

All cases of a channel block are lowered first and share one library. Inputs are NaN wherever a case may not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusetile.box import Box, volume
from fusetile.codegen import conv
from fusetile.codegen.build import build_library
from fusetile.codegen.calls import KernelCall, Lowered, Ref, make_kernel
from fusetile.codegen.conv_gradient_source import GRADIENT_INTS, weight_gradient
from fusetile.codegen.conv_source import TAP_INTS, tap_convolution
from fusetile.codegen.conv_tiles import cover_pixels, machine, written_lines
from fusetile.codegen.job import Job
from fusetile.codegen.register_tile import ACTIVATIONS, Tile
from fusetile.codegen.targets import TARGETS, Target, host
from fusetile.codegen.tvm_pipeline import assembly
from fusetile.errors import PlanError
from fusetile.ops import row
from fusetile.program import Buffer
from fusetile.runtime.native import Library
from fusetile.runtime.storage import make_arena, pack, unpack
from tests.codegen.harness import Case, buffer_for, inside, middle, place, run_calls, stored

Shape = tuple[int, ...]
WIDTHS = (1, 5, 9, 15)  # of outputs: few, so that few register tiles are compiled


def lower(job: Job) -> Lowered:
    """Lower with the direct kernels, whether or not others would be chosen."""
    lowered: Lowered = getattr(conv, f"lower_{row(job.op.kind).kernel}")(job)
    return lowered


@dataclass
class Problem:
    """One op, a box of its iterations, and buffers that are larger than the box needs."""

    label: str
    case: Case
    box: Box
    inputs: list[Buffer]
    outputs: list[Buffer]
    calls: tuple[KernelCall, ...]
    scratch: tuple[Buffer, ...]


def problem(case: Case, box: Box, block: int, target: Target, *, raw: bool, spare: Sequence[int]) -> Problem:
    """Lower an op for a box. `raw`: map inputs with few channels are stored unblocked. `spare`: margin, additional
    border and pitch."""
    margin, border, pitch = spare
    inputs = []
    for i, name in enumerate(case.op.inputs):
        tensor, reach = case.graph.tensors[name], case.domain.reach(box, i)
        outside = [
            max(0, -start, stop - size) + border for (start, stop), size in zip(reach, tensor.shape, strict=True)
        ]
        layout: dict[str, Any] = {"margin": margin, "pitch": pitch}
        if len(tensor.shape) == 4 and tensor.kind == "map":
            layout["border"] = (outside[2], outside[3])
        buffer = buffer_for(name, tensor, case.domain.need(box, i), block=block, **layout)
        if raw and tensor.kind == "map" and i == 0:
            buffer = replace(buffer, block=(1, min(block, tensor.shape[1])))
        inputs.append(buffer)
    outputs = [
        buffer_for(
            name, case.graph.tensors[name], case.domain.output(box), block=block, margin=margin, border=(border, 1)
        )
        for name in case.op.outputs
    ]
    lowered = lower(Job(case.op, case.domain, box, inputs, outputs, target))
    shapes = " * ".join(str(value.shape) for value in case.inputs)
    label = f"{case.op.kind} {shapes} {dict(case.op.attrs)} box {box}"
    return Problem(label, case, box, inputs, outputs, lowered.calls, lowered.scratch)


def part(case: Case, random: np.random.Generator, block: int) -> Box:
    """A random part of the iterations, at blocks of channels."""
    box = []
    for axis in case.domain.axes:
        step = {"k": block, "c": block, "w": 5}.get(axis.name, 1)  # by 5: few widths, so few register tiles
        cuts = [*range(0, axis.size, step), axis.size]
        first, last = sorted(random.choice(len(cuts), 2, replace=False))
        box.append((cuts[first], cuts[last]))
    return tuple(box)


def windows(random: np.random.Generator, x: Shape, w: Shape, window: dict[str, Any], activation: Any) -> list[Case]:
    """A convolution, without and with activation (and bias if there is an activation), and its gradients."""
    x_NCHW, w_KCRS = (random.standard_normal(shape).astype(np.float32) for shape in (x, w))
    bias = [random.standard_normal(w[0]).astype(np.float32)] * bool(activation)
    forward = Case("Conv", [x_NCHW, w_KCRS, *bias], {**window, **activation}, filters=(1,))
    dy = random.standard_normal(forward.graph.tensors[forward.op.outputs[0]].shape).astype(np.float32)
    return [
        forward,
        Case("Conv", [x_NCHW, w_KCRS, *bias], window, filters=(1,)),
        Case("ConvInputGrad", [dy, w_KCRS], {**window, "input_shape": x}, filters=(1,)),
        Case("ConvWeightGrad", [x_NCHW, dy], {**window, "kernel_shape": w[2:]}),
    ]


def random_windows(random: np.random.Generator, block: int, count: int) -> Iterator[tuple[list[Case], bool]]:
    """Random windows: kernels 1 to 7, strides 1 to 3, dilations 1 and 2, any pads, channels that fill no block."""
    for index in range(count):
        kernel, strides, dilations = (
            tuple(int(value) for value in random.choice(choices, 2))
            for choices in ((1, 1, 2, 3, 3, 5, 7), (1, 1, 2, 3), (1, 1, 2))
        )
        pads = tuple(int(random.integers(0, d * (k - 1) + 2)) for k, d in zip(kernel * 2, dilations * 2, strict=True))
        out = (int(random.integers(1, 8)), int(random.choice(WIDTHS)))
        size = [
            max(1, (o - 1) * s + d * (k - 1) + 1 - pads[i] - pads[i + 2]) + int(random.integers(0, s))
            for i, (o, s, d, k) in enumerate(zip(out, strides, dilations, kernel, strict=True))
        ]
        channels, filters = (int(random.choice((1, 3, block, block + 4, 3 * block))) for _ in range(2))
        window = {"strides": strides, "dilations": dilations, "pads": pads}
        activation = ({}, {"activation": "relu"}, {"activation": "leaky_relu", "alpha": 0.1})[index % 3]
        x, w = (int(random.integers(1, 4)), channels, *size), (filters, channels, *kernel)
        yield windows(random, x, w, window, activation), channels < block and index % 2 == 0


def larger_windows(random: np.random.Generator, block: int) -> Iterator[tuple[list[Case], bool]]:
    """Enough rows and channels to be cut into chunks and partial sums."""
    relu = {"activation": "relu"}
    for x, filters, kernel in (
        ((2, 5 * block, 6, 15), 4 * block, 3),
        ((1, block, 20, 15), 5 * block, 1),
        ((2, 3, 40, 15), block, 3),
        ((2, 2 * block, 5, 5), 2 * block, 1),
    ):
        window = {"strides": (1, 1), "dilations": (1, 1), "pads": (kernel // 2,) * 4}
        yield windows(random, x, (filters, x[1], kernel, kernel), window, relu), True


def fully_connected(random: np.random.Generator, block: int) -> Iterator[tuple[list[Case], bool]]:
    """Fully connected layers."""
    sizes = (
        (1, 3 * block, 10),
        (1, 17 * block + 3, 2 * block + 1),
        (4, block + 5, 4 * block),
        (5, 3, block),
        (9, 2 * block, 2 * block + 1),
    )
    for n, c, k in sizes:
        x, w, dy, b = (random.standard_normal(s).astype(np.float32) for s in ((n, c), (k, c), (n, k), k))
        cases = [
            Case("Gemm", [x, w, b], {"activation": "relu"}, filters=(1,)),
            Case("Gemm", [x, w, b], {}, filters=(1,)),
            Case("GemmInputGrad", [dy, w], {"input_shape": x.shape}, filters=(1,)),
            Case("GemmWeightGrad", [x, dy], {"kernel_shape": ()}),
        ]
        yield cases, c < block and n > 4


def problems(block: int, target: Target, count: int) -> list[Problem]:
    """`count` random windows, larger ones, and fully connected layers: every case whole, and a random part of it."""
    random, found = np.random.default_rng(block), []
    every = [*random_windows(random, block, count), *larger_windows(random, block), *fully_connected(random, block)]
    for cases, raw in every:
        for case in cases:
            spare = tuple(int(v) for v in random.integers(0, 3, 3))
            unblocked = raw and "InputGrad" not in case.op.kind
            for box in (case.domain.box, part(case, random, block)):
                found.append(problem(case, box, block, target, raw=unblocked, spare=spare))
    return found


class Run:
    """A problem in an arena of its own."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.placed, self.before = place([*problem.inputs, *problem.outputs, *problem.scratch])
        self.at = {buffer.name: buffer for buffer in self.placed}
        for i, name in enumerate(problem.case.op.inputs):
            need = problem.case.domain.need(problem.box, i)
            if volume(need):
                value = problem.case.inputs[i][tuple(slice(*interval) for interval in need)]
                pack(self.before, self.at[name], need, value)

    def after(self, library: Library) -> np.ndarray:
        """The arena after the calls."""
        arena = make_arena(self.before.size)
        arena[:] = self.before
        offsets = {name: buffer.offset_bytes for name, buffer in self.at.items()}
        calls = [call.placed(offsets) for call in self.problem.calls]
        library.segment(calls, arena)()
        return arena

    def check(self, after: np.ndarray) -> None:
        """Right values in the box, zeros in its pad lanes, nothing else touched."""
        problem, expected = self.problem, self.before.copy()
        written, reference = problem.case.domain.output(problem.box), problem.case.expected(problem.box)[0]
        buffer = self.at[problem.outputs[0].name]
        values = unpack(after, buffer, written)
        tolerance = 1e-5 * max(1.0, float(np.abs(reference).max()))
        np.testing.assert_allclose(values, reference, rtol=1e-5, atol=tolerance, err_msg=problem.label)
        inside(expected, buffer, written)[...] = 0
        pack(expected, buffer, written, values)
        for scratch in problem.scratch:
            stored(expected, self.at[scratch.name])[...] = stored(after, self.at[scratch.name])
        assert np.array_equal(expected, after), f"{problem.label}: writes outside its box or leaves its pad lanes"


def check_all(block: int, target: Target, directory: Path, count: int) -> None:
    """Run every problem with 1, 2 and 3 threads."""
    runs = [Run(problem) for problem in problems(block, target, count)]
    kernels = {call.kernel.symbol: call.kernel for run in runs for call in run.problem.calls}
    path = build_library(kernels.values(), target, directory)
    with Library(path, threads=1) as library:
        single = [run.after(library) for run in runs]
    for run, after in zip(runs, single, strict=True):
        run.check(after)
    for threads in (2, 3):
        with Library(path, threads=threads) as library:
            for run, after in zip(runs, single, strict=True):
                assert np.array_equal(run.after(library), after), f"{run.problem.label}: {threads} threads"


@pytest.mark.parametrize("block", [8, 16])
def test_against_references(block, tmp_path):
    if block > host().block:
        pytest.skip("a plan for AVX-512 alone")
    check_all(block, host(), tmp_path, 20)


@pytest.fixture
def hardly_any_cache(monkeypatch):
    """Caches so small that even a test's sizes are cut into all kinds of blocks."""
    tiny = {"inner_bytes": 1024, "outer_bytes": 8192, "weights_bytes": 10000}
    monkeypatch.setattr(conv, "machine", lambda target, block: replace(machine(target, block), **tiny))


def test_avx2(tmp_path, hardly_any_cache):
    if host().name != "avx512":
        pytest.skip("not on x86-64, or tested as the host")
    check_all(8, TARGETS["avx2"], tmp_path, 6)


def test_tiles_of_arm(tmp_path, hardly_any_cache):
    """The kernels of a Raspberry Pi 3, with their tiles and vectors of 4, compiled for this computer."""
    here = {"triple": host().triple, "cpu": host().cpu, "features": host().features, "zig": host().zig}
    check_all(8, replace(TARGETS["pi3"], **here), tmp_path, 6)


@pytest.mark.parametrize("name", ["pi3", "armv7"])
def test_arm_multiplies_by_element_and_spills_nothing(name):
    m = machine(TARGETS[name], 8)
    written = written_lines(m, pixel=8, lines=24 if m.written >= 24 else 8)
    tile = cover_pixels(m, 997, 1, written)[0].tile
    kernels = [tap_convolution(vectors=m.vectors, tile=tile, pixel=8, loops=1, written=written)]
    kernels += [
        weight_gradient(vectors=m.vectors, tile=Tile(longest, 0, blocks)) for blocks, longest in m.lines.items()
    ]
    for kernel in kernels:
        text = assembly(kernel.source, TARGETS[name].tvm, TARGETS[name].ir_flags)
        products = re.findall(r"\t(?:fmla\t|vmla\.f32\tq|vfma).*", text)
        assert products and "\tvdup" not in text, kernel.symbol  # on armv7 a single line is loaded into all lanes
        assert name == "armv7" or all(re.search(r"\.s\[\d\]", line) for line in products), kernel.symbol
        assert not re.search(r"\t(ldr|ldp|str|stp)\tq.*\[sp|16-byte (Spill|Reload)", text), kernel.symbol


def test_rows_without_a_border_are_one():
    """1x1 on small maps: the pixels of all rows fill register tiles, unless there is a border between the rows."""
    random = np.random.default_rng(0)
    x, w, dy = (random.standard_normal(s).astype(np.float32) for s in ((2, 16, 7, 7), (24, 16, 1, 1), (2, 24, 7, 7)))
    window = {"strides": (1, 1), "dilations": (1, 1), "pads": (0, 0, 0, 0)}
    for kind, names, a, b, more in (
        ("Conv", TAP_INTS, x, w, {}),
        ("ConvInputGrad", TAP_INTS, dy, w, {"input_shape": x.shape}),
        ("ConvWeightGrad", GRADIENT_INTS, x, dy, {"kernel_shape": (1, 1)}),
    ):
        case = Case(kind, [a, b], {**window, **more}, filters=[i for i in (1,) if b is w])
        tensors = [case.graph.tensors[name] for name in (*case.op.inputs, *case.op.outputs)]
        for border in (0, 1):
            *inputs, output = (
                buffer_for(t.name, t, tuple((0, n) for n in t.shape), border=(border,) * 2) for t in tensors
            )
            calls = lower(Job(case.op, case.domain, case.domain.box, inputs, [output], host())).calls
            call = next(call for call in calls if len(call.ints) == len(names))
            assert call.ints[names.index("height")] == (7 if border else 1)
        case.check(border=(0, 0))


@pytest.mark.parametrize(("window", "size", "alike"), [((2, 2), (6, 8), 4), ((3, 2), (9, 4), 6), ((2, 2), (5, 8), 1)])
def test_windows_that_do_not_overlap_are_one_call(window, size, alike):
    """The input gradient as transposed convolution: phases that read the same pixels are computed together."""
    random = np.random.default_rng(0)
    w = random.standard_normal((16, 24, *window)).astype(np.float32)
    dy = random.standard_normal((2, 16, *(n // s for n, s in zip(size, window, strict=True)))).astype(np.float32)
    attrs = {"strides": window, "dilations": (1, 1), "pads": (0, 0, 0, 0), "input_shape": (2, 24, *size)}
    case = Case("ConvInputGrad", [dy, w], attrs, filters=(1,))
    tensors = [case.graph.tensors[name] for name in (*case.op.inputs, *case.op.outputs)]
    *inputs, output = (buffer_for(t.name, t, tuple((0, n) for n in t.shape), border=(1, 1)) for t in tensors)
    calls = lower(Job(case.op, case.domain, case.domain.box, inputs, [output], host())).calls
    taps = [call for call in calls if len(call.ints) == len(TAP_INTS)]
    assert {call.ints[TAP_INTS.index("phases")] for call in taps} == {alike}
    for box in (case.domain.box, middle(case.domain.box, case.domain)):
        case.check(box, rtol=1e-4, atol=1e-4, border=(1, 1), pitch=1)


def test_refuses_buffers_that_lack_padding_or_halo():
    random = np.random.default_rng(0)
    x, w = (random.standard_normal(shape).astype(np.float32) for shape in ((1, 8, 6, 6), (8, 8, 3, 3)))
    case = Case("Conv", [x, w], {"strides": (1, 1), "dilations": (1, 1), "pads": (1, 1, 1, 1)}, filters=(1,))
    tensors = [case.graph.tensors[name] for name in (*case.op.inputs, *case.op.outputs)]
    whole, weights, result = (buffer_for(t.name, t, tuple((0, n) for n in t.shape), border=(1, 1)) for t in tensors)
    for lacking in (replace(whole, border=(1, 0)), replace(whole, box=((0, 1), (0, 8), (0, 5), (0, 6)))):
        with pytest.raises(PlanError, match="holds"):
            lower(Job(case.op, case.domain, case.domain.box, [lacking, weights], [result], host()))


def test_activations_keep_what_is_no_number() -> None:
    kernels = [
        make_kernel(
            f"only_{name or 'nothing'}",
            pointers={"X": "float32"},
            floats=("alpha",),
            body=f"for u in T.serial(lo, hi):\n    X[u] = {expression.format('X[u]')}",
        )
        for name, expression in ACTIVATIONS.items()
    ]
    values = np.array([np.nan, -2, 3], np.float32)
    buffers = [Buffer(kernel.symbol, ((0, 3),)) for kernel in kernels]
    placed, arena = place(buffers)
    for buffer in placed:
        pack(arena, buffer, buffer.box, values)
    run_calls([KernelCall(k, 3, (Ref(k.symbol),), (), (0.5,)) for k in kernels], placed, arena)
    found = [unpack(arena, buffer, buffer.box) for buffer in placed]
    np.testing.assert_array_equal(found, [values, [np.nan, 0, 3], [np.nan, -1, 3]])
