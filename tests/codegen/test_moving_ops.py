"""Concat, Slice, Reshape and Dropout against the rows' references."""

from __future__ import annotations

import numpy as np
import pytest

from fusetile.ops.rearrange import Dims, inverse, reshaped, shape_of, whole_view
from fusetile.ops.resample import Taps
from tests.codegen.harness import Case, middle, seeded
from tests.ops.cases import TERMS, product_shapes

LAYOUT = {"margin": 1, "border": (1, 2), "pitch": 1}
STEP = np.array([7], np.int32)


def tensor(*shape: int, seed: int = 0) -> np.ndarray:
    return seeded(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("channels", [(8, 16, 5), (3, 10, 4, 20)])
def test_concat_and_slice_of_channels(channels: tuple[int, ...]) -> None:
    parts = [tensor(2, count, 5, 7, seed=i) for i, count in enumerate(channels)]
    case = Case("Concat", parts, {"axis": 1})
    case.check(rtol=0, atol=0)
    case.check(((0, 2), (8, sum(channels)), (1, 4), (2, 7)), rtol=0, atol=0, **LAYOUT)
    case.check(((0, 2), (0, 16), (1, 4), (2, 7)), rtol=0, atol=0, **LAYOUT)
    start = sum(channels[:-1])
    back = Case("Slice", case.expected(case.domain.box), {"axis": 1, "start": start, "stop": sum(channels)})
    back.check(rtol=0, atol=0, **LAYOUT)
    back = Case("Slice", case.expected(case.domain.box), {"axis": 1, "start": 0, "stop": channels[0]})
    back.check(middle(back.domain.box, back.domain), rtol=0, atol=0, **LAYOUT)


@pytest.mark.parametrize("axis", [0, 2, 3])
def test_concat_along_other_axes(axis: int) -> None:
    case = Case("Concat", [tensor(2, 11, 5, 7), tensor(2, 11, 5, 7, seed=1)], {"axis": axis})
    case.check(middle(case.domain.box, case.domain), rtol=0, atol=0, **LAYOUT)


def test_slice_of_flat_tensors() -> None:
    case = Case("Slice", [tensor(3, 29)], {"axis": 1, "start": 5, "stop": 18})
    case.check(rtol=0, atol=0, margin=1)


@pytest.mark.parametrize("raw", [(), (0,)])
@pytest.mark.parametrize(
    ("before", "after"),
    [((3, 5, 4, 3), (3, 60)), ((3, 60), (3, 5, 4, 3)), ((3, 5, 4, 3), (3, 10, 2, 3)), ((3, 11, 1, 1), (3, 11))],
)
def test_reshape(before: tuple[int, ...], after: tuple[int, ...], raw: tuple[int, ...]) -> None:
    case = Case("Reshape", [tensor(*before)], {"shape": after})
    case.check(((1, 3), *case.domain.box[1:]), rtol=0, atol=0, raw=raw if before[1] < 8 else (), **LAYOUT)


@pytest.mark.parametrize("shape", [(3, 19, 5, 6), (4, 27)])
def test_dropout(shape: tuple[int, ...]) -> None:
    attrs = {"ratio": 0.3, "seed": 0x9ABCDEF0FEDCBA98, "site": 3}
    case = Case("Dropout", [tensor(*shape), STEP], attrs)
    case.check(rtol=1e-7, atol=0)
    box = middle(case.domain.box, case.domain, channels=8)
    (y,) = case.check(((1, shape[0]), *box[1:]), rtol=1e-7, atol=0, **LAYOUT)
    assert 0.5 < np.count_nonzero(y) / y.size < 0.9


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_pad(axis: int) -> None:
    for channels in (11, 16):
        case = Case("Pad", [tensor(2, channels, 5, 7)], {"axis": axis, "before": 3, "after": 2})
        case.check(rtol=0, atol=0, **LAYOUT)
        case.check(middle(case.domain.box, case.domain, channels=8), rtol=0, atol=0, **LAYOUT)


def shuffled(shape: tuple[int, ...], split: tuple[int, ...], order: tuple[int, ...], result: tuple[int, ...]) -> Dims:
    """Reshape, transpose, reshape."""
    view = reshaped(whole_view(shape), split)
    assert view
    dims = reshaped(tuple(view[axis] for axis in order), result)
    assert dims
    return dims


MOVES = {
    "channel shuffle": ((2, 24, 5, 7), (2, 3, 8, 5, 7), (0, 2, 1, 3, 4), (2, 24, 5, 7)),
    "space to depth": ((2, 5, 6, 8), (2, 5, 3, 2, 4, 2), (0, 3, 5, 1, 2, 4), (2, 20, 3, 4)),
    "channels last": ((2, 11, 3, 5), (2, 11, 15), (0, 2, 1), (2, 15, 11)),
    "heads": ((2, 36, 3, 5), (2, 4, 9, 15), (0, 1, 3, 2), (2, 4, 15, 9)),
    "heads of tokens": ((2, 11, 48), (2, 11, 3, 16), (0, 2, 1, 3), (2, 3, 11, 16)),
    "whole vectors": ((2, 16, 6, 8), (2, 16, 3, 2, 4, 2), (0, 3, 5, 1, 2, 4), (2, 64, 3, 4)),
    "lanes of many images": ((20, 128), (20, 8, 16), (2, 0, 1), (16, 160)),
    "rows": ((3, 20), (3, 4, 5), (0, 2, 1), (3, 20)),
    "the batch inside": ((3, 20), (3, 20), (1, 0), (20, 3)),
}


@pytest.mark.parametrize("name", MOVES)
def test_rearrange_is_reshape_and_transpose(name: str) -> None:
    shape, split, order, result = MOVES[name]
    dims, x = shuffled(*MOVES[name]), tensor(*shape)
    for case in (
        Case("Rearrange", [x], {"dims": dims}),
        Case("Rearrange", [tensor(*shape_of(dims))], {"dims": inverse(dims, len(shape))}),
    ):
        case.check(rtol=0, atol=0, **LAYOUT)
        channels = case.domain.axes[case.domain.axis("k")].size
        case.check(middle(case.domain.box, case.domain, channels=8 * (channels > 8)), rtol=0, atol=0, **LAYOUT)
    whole = Case("Rearrange", [x], {"dims": dims})
    (y,) = whole.expected(whole.domain.box)
    np.testing.assert_array_equal(y, x.reshape(split).transpose(order).reshape(result))


@pytest.mark.parametrize("shape", [(19, 11, 3, 2), (8, 3, 1, 1), (5, 20)])
def test_between_maps_and_filters(shape: tuple[int, ...]) -> None:
    for kind, stored, wanted in (("FilterOf", "map", "filter"), ("MapOf", "filter", "map")):
        case = Case(kind, [tensor(*shape)], {}, filters=[0] if stored == "filter" else [])
        assert case.graph.tensors[case.op.outputs[0]].kind == wanted
        case.check(rtol=0, atol=0)
        if shape[0] > 8 and shape[1] > 8:
            case.check(((8, shape[0]), (0, 8)), rtol=0, atol=0)


def test_resample_by_tables() -> None:
    reflected = Taps.picking(7, [2, 1, 0, 1, 2, 3, 4, 5, 6, 5, -1])
    linear = Taps.weighted(5, [[(i // 2, 0.3), (min(i // 2 + 1, 4), 0.7)] for i in range(10)])
    for rows, columns in ((reflected, reflected), (linear, reflected), (linear.transposed(), reflected.transposed())):
        x = tensor(2, 19, rows.size, columns.size)
        case = Case("Resample", [x, *rows.tables(), *columns.tables()], {"rows": rows, "columns": columns})
        case.check(**LAYOUT)
        case.check(middle(case.domain.box, case.domain, channels=8), **LAYOUT)


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_products_of_matrices(terms: tuple[str, str]) -> None:
    """Also a part of every axis, as it may be cut: channels at blocks."""
    sizes = {"n": 2, "k": 19, "h": 5, "w": 11, "c": 14}
    heads = (set(terms[0]) & set(terms[1]) - {"n", "c"}).pop()
    for one, broadcast in ((1, ""), (1, "n"), (1, heads), (0, heads)):
        operands = []
        for i, (term, shape) in enumerate(zip(terms, product_shapes(terms, **sizes), strict=True)):
            alone = [1 if i == one and axis in broadcast else size for axis, size in zip(term, shape, strict=True)]
            operands.append(tensor(*alone, seed=i))
        case = Case("MatMul", operands, {"terms": terms})
        case.check(**LAYOUT)
        part = {"n": (1, 2), "k": (8, 19), "h": (1, 4), "w": (3, 10), "c": (8, 14)}
        case.check(tuple(part[axis.name] for axis in case.domain.axes), **LAYOUT)


@pytest.mark.parametrize("terms", [TERMS[0], TERMS[5], TERMS[7]], ids=str)
def test_products_of_large_matrices(terms: tuple[str, str]) -> None:
    """More rows than a work unit has, and more to sum than between two looks at the sums."""
    for sizes in ({"n": 1, "k": 11, "h": 35, "c": 300, "w": 6}, {"n": 1, "k": 150, "h": 2, "c": 300, "w": 13}):
        operands = [tensor(*shape, seed=i) for i, shape in enumerate(product_shapes(terms, **sizes))]
        Case("MatMul", operands, {"terms": terms}).check(atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 11, 5, 1), (2, 1, 5, 7), (2, 11, 1, 1), (1, 1, 1, 7)])
@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
def test_softmax(kind: str, shape: tuple[int, ...]) -> None:
    x, dy = tensor(2, 11, 5, 7), tensor(2, 11, 5, 7, seed=1)
    x[1, 2] *= 40
    forward = Case(kind, [x], {"shape": shape})
    (y,) = forward.expected(forward.domain.box)
    for case in (forward, Case(f"{kind}Grad", [dy, y], {"shape": shape})):
        case.check(atol=1e-5, **LAYOUT)
        case.check(middle(case.domain.box, case.domain, channels=8), atol=1e-5, **LAYOUT)
