"""Every row of the op table: what a box of iterations reads and writes; boxes put together give the whole."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fusetile.box import Box, extents, slices, volume
from fusetile.graph import Graph, Op
from fusetile.ops import ROWS, Domain
from fusetile.ops.base import Spread, Window
from fusetile.reference import run_op
from tests.ops.case import Case
from tests.ops.cases import CASES

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))


def compute(graph: Graph, op: Op, domain: Domain, box: Box, values: list[np.ndarray]) -> list[np.ndarray]:
    """The op on a box, given only what it needs."""
    inputs = [value[slices(domain.need(box, i))].copy() for i, value in enumerate(values)]
    return run_op(graph, op, domain, box, inputs)


def random_box(domain: Domain, rng: np.random.Generator, whole: tuple[str, ...] = ()) -> Box:
    """A non-empty part of every axis, some of them whole."""
    box = []
    for axis in domain.axes:
        ends = sorted(rng.choice(axis.size + 1, 2, replace=False).tolist())
        box.append((0, axis.size) if rng.integers(3) == 0 or axis.name in whole else (ends[0], ends[1]))
    return tuple(box)


def reductions(domain: Domain) -> tuple[str, ...]:
    return tuple(axis.name for axis in domain.axes if axis.kind == "reduction")


def test_every_row_has_a_case() -> None:
    assert {case.kind for case in CASES} == set(ROWS) - {"GradientNorm"}  # whose boxes are shards side by side


@cases
def test_outputs_have_the_declared_shapes_and_types(case: Case) -> None:
    graph, op, domain = case.build()
    for name, value, access in zip(
        op.outputs, compute(graph, op, domain, domain.box, case.values()), domain.writes, strict=True
    ):
        tensor = graph.tensors[name]
        assert value.shape == tensor.shape and str(value.dtype) == tensor.dtype
        assert tuple(dim.size for dim in access) == tensor.shape
    for i, name in enumerate(op.inputs):
        assert tuple(dim.size for dim in domain.reads[i]) == graph.tensors[name].shape


@cases
def test_a_box_gives_that_part_of_the_whole(case: Case) -> None:
    graph, op, domain = case.build()
    values, rng = case.values(), np.random.default_rng(1)
    whole = compute(graph, op, domain, domain.box, values)
    for _ in range(25):
        box = random_box(domain, rng, whole=reductions(domain))
        for o, part in enumerate(compute(graph, op, domain, box, values)):
            expected = whole[o][slices(domain.output(box, o))]
            assert part.shape == expected.shape == extents(domain.output(box, o))
            np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-6)


@cases
def test_any_cut_of_any_axis_adds_up_to_the_whole(case: Case) -> None:
    """Parts along parallel axes lie side by side, parts along reduction axes are added, in any combination."""
    graph, op, domain = case.build()
    values, rng = case.values(), np.random.default_rng(2)
    whole = compute(graph, op, domain, domain.box, values)
    for _ in range(6):
        cuts = []
        for axis in domain.axes:
            inner = rng.choice(np.arange(1, axis.size), min(int(rng.integers(3)), axis.size - 1), replace=False)
            cuts.append(list(itertools.pairwise([0, *sorted(inner.tolist()), axis.size])))
        total = [np.zeros_like(value) for value in whole]
        count = [np.zeros(value.shape, int) for value in whole]
        for box in itertools.product(*cuts):
            first = all(part[0] == 0 for part, axis in zip(box, domain.axes, strict=True) if axis.kind == "reduction")
            for o, part in enumerate(compute(graph, op, domain, box, values)):
                total[o][slices(domain.output(box, o))] += part
                count[o][slices(domain.output(box, o))] += first
        for o, expected in enumerate(whole):
            assert (count[o] == 1).all()
            np.testing.assert_allclose(total[o], expected, rtol=1e-4, atol=1e-5)


@cases
def test_empty_boxes_need_and_write_nothing(case: Case) -> None:
    _, op, domain = case.build()
    nothing = ((0, 0),) * len(domain.axes)
    assert not any(volume(domain.need(nothing, i)) for i in range(len(op.inputs)))
    assert not any(volume(domain.output(nothing, o)) for o in range(len(op.outputs)))


# Operands of which every element that is needed counts. Left out: what a comparison may hide, weights (their window is
# always whole), and a bias (which only the first part of a reduction adds).
_ALL_COUNT = {
    **dict.fromkeys(("Conv", "ConvInputGrad", "Gemm", "GemmInputGrad", "AveragePool", "AveragePoolGrad"), (0,)),
    **dict.fromkeys(("ConvWeightGrad", "GemmWeightGrad", "Add", "MeanSquaredError", "MeanSquaredErrorGrad"), (0, 1)),
    **dict.fromkeys(("GlobalAveragePool", "GlobalAveragePoolGrad", "ChannelSum", "ChannelMoments"), (0,)),
    **dict.fromkeys(("Normalize", "NormalizeMoments", "CrossEntropy", "Slice", "Reshape", "Pad", "SGD"), (0,)),
    "Concat": (0, 1, 2),
}


def _every_element_counts(case: Case) -> bool:
    """Not where a window steps over rows, not before an activation, not where labels are ignored."""
    taps = case.attrs.get("kernel", case.attrs.get("kernel_shape", ())) or case.inputs[-1][0][2:]
    taps = case.inputs[1][0][2:] if case.kind in ("Conv", "ConvInputGrad") else taps
    gaps = any(stride > tap for stride, tap in zip(case.attrs.get("strides", ()), taps, strict=False))
    dilated = max(case.attrs.get("dilations", (1,))) > 1
    hidden = case.attrs.get("activation") or "ignore" in case.attrs
    return case.kind in _ALL_COUNT and not (gaps or dilated or hidden)


@pytest.mark.parametrize(
    "case", list(filter(_every_element_counts, CASES)), ids=lambda case: case.name.replace(" ", "-")
)
def test_need_is_no_larger_than_what_is_read(case: Case) -> None:
    """A change of any face of the needed box changes the result."""
    graph, op, domain = case.build()
    rng = np.random.default_rng(3)
    for trial in range(8):
        values, box = case.values(trial), random_box(domain, rng)
        before = compute(graph, op, domain, box, values)
        for i in _ALL_COUNT[case.kind][: len(values)]:
            need = domain.need(box, i)
            for axis, (start, stop) in enumerate(need if volume(need) else ()):
                for at in (start, stop - 1):
                    changed = [value.copy() for value in values]
                    face = slices((*need[:axis], (at, at + 1), *need[axis + 1 :]))
                    changed[i][face] += 100 * rng.standard_normal(changed[i][face].shape)
                    after = compute(graph, op, domain, box, changed)
                    assert not np.array_equal(before[0], after[0]), f"input {i}, box {box}: {need} along {axis}"


# -- windows against sets of indices ---------------------------------------------------------------------------------

GEOMETRIES = list(itertools.product((1, 5, 8), (1, 2, 3, 5), (1, 2, 3), (1, 2, 3), (0, 1, 3)))


def sizes(size: int, taps: int, stride: int, dilation: int, pad: int) -> int:
    return (size + 2 * pad - dilation * (taps - 1) - 1) // stride + 1


def reads(out: int, taps: int, stride: int, dilation: int, pad: int) -> set[int]:
    return {out * stride - pad + tap * dilation for tap in range(taps)}


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: "-".join(map(str, g)))
def test_windows_and_their_transpose_against_index_sets(geometry: tuple[int, int, int, int, int]) -> None:
    size, taps, stride, dilation, pad = geometry
    outputs = sizes(*geometry)
    if outputs < 1:
        return
    window = Window("h", size, taps, stride, dilation, pad)
    spread = Spread("h", outputs, taps, stride, dilation, pad)
    for start, stop in itertools.combinations(range(outputs + 1), 2):
        touched = set().union(*(reads(out, taps, stride, dilation, pad) for out in range(start, stop)))
        assert window.interval({"h": (start, stop)}) == (min(touched), max(touched) + 1)
    for start, stop in itertools.combinations(range(size + 1), 2):
        low, high = spread.interval({"h": (start, stop)})
        held = {out for out in range(-20, 40) if reads(out, taps, stride, dilation, pad) & set(range(start, stop))}
        assert held <= set(range(low, high))
        if dilation == 1 and held:
            assert (low, high) == (min(held), max(held) + 1)
        if dilation == 1 and not held:
            assert low >= high  # between two windows
