"""One small graph of a single op per case, for every kind in the op table: odd sizes, strides, pads, dilations."""

from __future__ import annotations

import re

import numpy as np

from fusetile.ops import ROWS
from fusetile.ops.functions import FUNCTIONS
from fusetile.ops.loss import PAIRS
from fusetile.ops.rearrange import inverse
from fusetile.ops.resample import Taps
from tests.ops.case import COUNT, RELU, Case, F, V
from tests.ops.window_cases import convolutions, pools
from tests.yolo import ANCHORS, random_boxes

POSITIVE = ("Log", "Power", "Sqrt")  # functions of positive numbers
# attributes of the functions that have some
FUNCTION_ATTRS: dict[str, dict[str, float]] = {
    "Celu": {"alpha": 0.7},
    "Clip": {"low": -0.5, "high": 0.8},
    "Elu": {"alpha": 0.9},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "Power": {"exponent": 0.75},
    "Selu": {"alpha": 1.6, "gamma": 1.1},
}
FIT = ((2, 3, 5, 4), (2, 3, 1, 1), (1, 3, 1, 1), (1,), (2, 1, 5, 4))
"""Shapes of operands that fit a map by broadcasting."""

# the axes of the operands of products of matrices: heads as channels, and as rows
TERMS = [(a, b) for a in ("nkhc", "nkch") for b in ("nkcw", "nkwc")] + [("nkwc", "nkhc")]
TERMS += [(a, b) for a in ("nkhc", "nchk") for b in ("nwhc", "nchw")] + [("nwhc", "nchk")]

# views, by the shape of what is viewed: channel shuffle, space to depth, a transpose, attention heads, channels last
VIEWS: dict[str, tuple[tuple[int, ...], tuple[tuple[tuple[int, int, int], ...], ...]]] = {
    "channel shuffle": ((2, 6, 3, 4), (((0, 2, 1),), ((1, 3, 1), (1, 2, 3)), ((2, 3, 1),), ((3, 4, 1),))),
    "space to depth": (
        (2, 3, 4, 6),
        (((0, 2, 1),), ((2, 2, 1), (3, 2, 1), (1, 3, 1)), ((2, 2, 2),), ((3, 3, 2),)),
    ),
    "transpose": ((2, 5, 4, 3), (((0, 2, 1),), ((3, 3, 1),), ((1, 5, 1),), ((2, 4, 1),))),
    "heads": ((2, 12, 3, 2), (((0, 2, 1),), ((1, 3, 4),), ((2, 3, 1), (3, 2, 1)), ((1, 4, 1),))),
    "tokens": ((2, 5, 4, 3), (((0, 2, 1),), ((2, 4, 1), (3, 3, 1)), ((1, 5, 1),))),
    "batch moved": ((3, 10), (((1, 5, 2),), ((0, 3, 1), (1, 2, 1)))),
}
TAPS = {
    "one by one": Taps.picking(4, range(4)),
    "backwards with steps": Taps.picking(5, [4, 2, 0]),
    "reflected": Taps.picking(4, [2, 1, 0, 1, 2, 3, 2]),
    "padded": Taps.picking(3, [-1, -1, 0, 1, 2, -1]),
    "linear": Taps.weighted(3, [[(0, 1.0)], [(0, 0.25), (1, 0.75)], [(1, 0.5), (2, 0.5)], [(2, 0.7), (2, 0.3)]]),
}


def tapped(rows: str, columns: str) -> tuple[tuple[int, ...], dict[str, Taps], dict[int, np.ndarray]]:
    """Shape of the input, attributes, and tables of a Resample."""
    down, across = TAPS[rows], TAPS[columns]
    fixed = dict(enumerate((*down.tables(), *across.tables()), 1))
    return (2, 3, down.size, across.size), {"rows": down, "columns": across}, fixed


MAP, ROW, C = (2, 5, 4, 3), (3, 7), (5,)
PAIR = (2, 5)
BROADCAST = ((2, 5, 1, 1), (1, 5, 1, 1), C, (1,), (2, 1, 4, 3), (1, 1, 1, 1))  # what fits MAP
BIG = np.array([[3.0, -2, 5, 1, 4], [40.0, 60, 70, 50, 45]])  # sums whose variance is positive for a count of 24


def _moves() -> list[Case]:
    cases = []
    for name, (shape, dims) in VIEWS.items():
        back = tuple(int(np.prod([size for _, size, _ in digits], dtype=int)) for digits in dims)
        cases += [
            Case(f"Rearrange {name}", "Rearrange", ((shape, V),), {"dims": dims}),
            Case(f"Rearrange {name}, back", "Rearrange", ((back, V),), {"dims": inverse(dims, len(shape))}),
        ]
    for shape in ((19, 11, 3, 2), (19, 11)):
        cases += [Case(f"FilterOf {shape}", "FilterOf", ((shape, V),)), Case(f"MapOf {shape}", "MapOf", ((shape, F),))]
    for rows, columns in (("reflected", "linear"), ("linear", "padded"), ("backwards with steps", "one by one")):
        shape, attrs, fixed = tapped(rows, columns)
        operands = ((shape, V), *((table.shape, str(table.dtype)) for table in fixed.values()))
        cases.append(Case(f"Resample {rows}, {columns}", "Resample", operands, attrs, fixed))
    for axis, before, after in ((0, 1, 0), (1, 3, 2), (2, 0, 2), (3, 1, 1)):
        cases.append(Case(f"Pad {axis}", "Pad", ((MAP, V),), {"axis": axis, "before": before, "after": after}))
    for shape in ((2, 5, 1, 1), (2, 1, 4, 3), (2, 5, 4, 1), (2, 1, 1, 1)):
        cases.append(Case(f"MaxTo {shape}", "MaxTo", ((MAP, V),), {"shape": shape}))
    for shape in ((2, 5, 1, 1), (2, 1, 4, 3)):
        for kind in ("Softmax", "LogSoftmax"):
            cases.append(Case(f"{kind} {shape}", kind, ((MAP, V),), {"shape": shape}))
            cases.append(Case(f"{kind}Grad {shape}", f"{kind}Grad", ((MAP, V), (MAP, V)), {"shape": shape}))
    for shape, per in (((2, 6, 1, 1), 1), ((2, 6, 1, 1), 3), ((2, 1, 4, 3), 1)):
        whole, small, wide, count = ((2, 6, 4, 3), V), (shape, V), (shape, "float64"), {"count": 24, "per_group": per}
        maps = (whole, whole, small, small)
        summed = (wide, wide)
        positive = {1: np.full(shape, 60.0)}
        cases += [
            Case(f"Moments {shape}", "Moments", (whole,), {"shape": shape}),
            Case(f"Statistics {shape} {per}", "Statistics", summed, {**count, "epsilon": 1e-5}, positive),
            Case(f"Standardize {shape}", "Standardize", (whole, small, small, ((6,), V), ((1,), V))),
            Case(f"AffineGrad {shape}", "AffineGrad", maps, {"shape": (6,)}),
            Case(f"StandardizeMoments {shape}", "StandardizeMoments", (*maps, ((1,), V)), {"shape": shape}),
            Case(f"StandardizeMeans {shape} {per}", "StandardizeMeans", summed, count),
            Case(f"StandardizeGrad {shape}", "StandardizeGrad", (*maps, ((6,), V), small, small)),
        ]
    for other in BROADCAST:
        cases.append(Case(f"Expand {other}", "Expand", ((other, V),), {"shape": MAP}))
    steps = ("Exceeds", "Reaches", "IsGreater", "IsAtLeast", "Masked", "MaskedOut")
    for kind in ("Max", "Min", "PRelu", *steps):
        for other in (MAP, *BROADCAST[:3]):
            cases.append(Case(f"{kind} of {MAP} and {other}", kind, ((MAP, V), (other, V))))
    cases.append(Case("PReluGrad", "PReluGrad", ((MAP, V), (MAP, V), (C, V))))
    cases.append(Case("SumTo of three dimensions", "SumTo", (((2, 5, 4), V),), {"shape": (2, 1, 4)}))
    cases.append(Case("Add of three dimensions", "Add", (((2, 5, 4), V), ((2, 1, 4), V))))
    for terms in TERMS:
        a, b = product_shapes(terms, n=2, k=3, h=4, c=6, w=5)
        cases.append(Case(f"MatMul {terms}", "MatMul", ((a, V), (b, V)), {"terms": terms}))
    for terms, one in ((("nkhc", "nkcw"), (1, 1, 6, 5)), (("nkhc", "nwhc"), (1, 5, 1, 6))):
        a, _ = product_shapes(terms, n=2, k=3, h=4, c=6, w=5)
        cases.append(Case(f"MatMul {terms} with one for all", "MatMul", ((a, V), (one, V)), {"terms": terms}))
    return cases


def product_shapes(terms: tuple[str, str], **sizes: int) -> list[tuple[int, ...]]:
    """The shapes of operands with these axes."""
    return [tuple(sizes[axis] for axis in term) for term in terms]


def _others() -> list[Case]:
    step = {1: np.array([3], np.int32)}
    rate = {2: np.array([0.05], np.float32)}
    cases = [
        Case("Gemm", "Gemm", ((ROW, V), ((4, 7), F), ((4,), V))),
        Case("Gemm leaky", "Gemm", ((ROW, V), ((4, 7), F)), {"activation": "leaky_relu", "alpha": 0.2}),
        Case("GemmInputGrad", "GemmInputGrad", (((3, 4), V), ((4, 7), F)), {"input_shape": ROW}),
        Case("GemmWeightGrad", "GemmWeightGrad", ((ROW, V), ((3, 4), V)), {"kernel_shape": ()}),
        Case("ChannelSum", "ChannelSum", ((MAP, V),)),
        Case("ChannelSum of rows", "ChannelSum", ((ROW, V),)),
        Case("GlobalAveragePool", "GlobalAveragePool", ((MAP, V),)),
        Case("GlobalAveragePoolGrad", "GlobalAveragePoolGrad", (((2, 5, 1, 1), V),), {"input_shape": MAP}),
        Case("ChannelMoments", "ChannelMoments", ((MAP, V),)),
        Case("BatchStatistics", "BatchStatistics", ((PAIR, "float64"),), {**COUNT, "epsilon": 1e-5}, {0: BIG}),
        Case("FrozenStatistics", "FrozenStatistics", ((C, V), (C, V)), {"epsilon": 1e-5}, {1: np.ones(5, np.float32)}),
        Case("Normalize", "Normalize", ((MAP, V), (PAIR, V), (C, V), (C, V)), COUNT),
        Case(
            "Normalize of rows", "Normalize", (((4, 5), V), (PAIR, V), (C, V), (C, V)), {**COUNT, "activation": "relu"}
        ),
        Case("NormalizeMoments", "NormalizeMoments", ((MAP, V), (MAP, V), (PAIR, V))),
        Case("NormalizeParameterGrad", "NormalizeParameterGrad", ((PAIR, "float64"),)),
        Case(
            "NormalizeInputGrad",
            "NormalizeInputGrad",
            ((MAP, V), (MAP, V), (PAIR, V), (C, V), (PAIR, "float64")),
            COUNT,
        ),
        Case("NormalizeMoments behind relu", "NormalizeMoments", ((MAP, V), (MAP, V), (PAIR, V), (C, V), (C, V)), RELU),
        Case(
            "NormalizeInputGrad behind leaky relu",
            "NormalizeInputGrad",
            ((MAP, V), (MAP, V), (PAIR, V), (C, V), (PAIR, "float64"), (C, V)),
            {**COUNT, "activation": "leaky_relu", "alpha": 0.2},
        ),
        Case("FrozenNormalizeInputGrad", "FrozenNormalizeInputGrad", ((MAP, V), (PAIR, V), (C, V))),
        Case(
            "RunningStatistics",
            "RunningStatistics",
            ((PAIR, "float64"), (C, V), (C, V)),
            {**COUNT, "momentum": 0.9},
            {0: BIG},
        ),
        Case(
            "RunningStatistics of two batches",
            "RunningStatistics",
            ((PAIR, "float64"), (C, V), (C, V), (PAIR, "float64")),
            {**COUNT, "momentum": 0.9},
            {0: BIG, 3: BIG},
        ),
        Case("Concat channels", "Concat", (((2, 3, 4, 3), V), ((2, 5, 4, 3), V), ((2, 1, 4, 3), V)), {"axis": 1}),
        Case("Concat rows", "Concat", (((2, 3, 2, 3), V), ((2, 3, 5, 3), V)), {"axis": 2}),
        Case("Concat samples", "Concat", (((2, 3), V), ((1, 3), V)), {"axis": 0}),
        Case("Slice channels", "Slice", ((MAP, V),), {"axis": 1, "start": 1, "stop": 4}),
        Case("Slice columns", "Slice", ((MAP, V),), {"axis": 3, "start": 2, "stop": 3}),
        Case("Reshape", "Reshape", ((MAP, V),), {"shape": (2, 60)}),
        Case("Reshape of pixels", "Reshape", (((3, 5, 1, 1), V),), {"shape": (3, 5)}),
        Case("Reshape to a map", "Reshape", (((3, 12), V),), {"shape": (3, 3, 2, 2)}),
        Case("CrossEntropy", "CrossEntropy", (((4, 3), V), ((4,), "int32")), {"count": 4}),
        Case("CrossEntropy per pixel", "CrossEntropy", (((2, 3, 4, 5), V), ((2, 4, 5), "int32")), {"count": 40}),
        Case("CrossEntropyGrad", "CrossEntropyGrad", (((2, 3, 4, 5), V), ((2, 4, 5), "int32")), {"count": 40}),
        Case("CrossEntropyGrad of rows", "CrossEntropyGrad", (((4, 3), V), ((4,), "int32")), {"count": 4}),
        *(
            Case(f"{kind}{suffix}", f"{kind}{suffix}", ((MAP, V), (MAP, V)), {"count": 120})
            for kind in PAIRS
            for suffix in ("", "Grad")
        ),
        *(
            Case(f"{kind} {name}", kind, (((2, 3, 4, 5), V), ((2, 4, 5), "int32"), *more), {"count": 40, **attrs})
            for kind in ("CrossEntropy", "CrossEntropyGrad", "NegativeLogLikelihood", "NegativeLogLikelihoodGrad")
            for name, more, attrs in (
                ("smoothed", (), {"smoothing": 0.2}),
                ("weighted", (((3,), V), ((1,), V)), {"smoothing": 0.1, "ignore": 2}),
            )
        ),
        *(
            Case(
                kind,
                kind,
                (((3, 27, 4, 5), V), ((3, 7, 5), V)),
                {"count": 3, "factors": (5.0, 1.0, 0.5, 2.0), "anchors": ANCHORS},
                {1: random_boxes(np.random.default_rng(1), images=3, most=7, classes=4)},
            )
            for kind in ("YoloV2", "YoloV2Grad")
        ),
        Case("LabelWeight", "LabelWeight", (((4, 5, 6), "int32"), ((3,), V)), {"ignore": 1}),
        Case("Dropout", "Dropout", ((MAP, V), ((1,), "int32")), {"ratio": 0.4, "seed": 7, "site": 2}, step),
        Case("Dropout of rows", "Dropout", ((ROW, V), ((1,), "int32")), {"ratio": 0.7, "seed": 0, "site": 0}, step),
    ]
    for kind, operands, attrs in (
        ("Relu", 1, {}),
        ("LeakyRelu", 1, {"alpha": 0.1}),
        ("ReluGrad", 2, {}),
        ("LeakyReluGrad", 2, {"alpha": -0.3}),
        ("Add", 2, {}),
        ("Scale", 1, {"factor": -1.5}),
        ("Identity", 1, {}),
    ):
        for shape in (MAP, ROW, C):
            cases.append(Case(f"{kind} of rank {len(shape)}", kind, ((shape, V),) * operands, attrs))
    for kind in FUNCTIONS:
        attrs = FUNCTION_ATTRS.get(kind, {})
        positive = {i: np.linspace(0.5, 3, 120, dtype=np.float32).reshape(MAP) for i in range(3) if kind in POSITIVE}
        operands = 1 + len(set(re.findall(r"x[12]", ROWS[f"{kind}Grad"].expression)))
        cases += [
            Case(kind, kind, ((MAP, V),), attrs, {0: positive[0]} if positive else {}),
            Case(f"{kind}Grad", f"{kind}Grad", ((MAP, V),) * operands, attrs, {1: positive[1]} if positive else {}),
        ]
    for other in (MAP, *BROADCAST):
        product = {} if other == MAP else {"shape": other}
        cases += [Case(f"{kind} of {MAP} and {other}", kind, ((MAP, V), (other, V))) for kind in ("Add", "Sub", "Mul")]
        cases.append(
            Case(
                f"Div by {other}",
                "Div",
                ((MAP, V), (other, V)),
                {},
                {1: 2 + np.arange(np.prod(other)).reshape(other).astype(np.float32)},
            )
        )
        if product:
            cases += [
                Case(f"SumTo {other}", "SumTo", ((MAP, V),), product),
                Case(f"SumTo {other} of a product", "SumTo", ((MAP, V), (MAP, V)), product),
                Case(f"SumTo {other} of a broadcast product", "SumTo", ((MAP, V), (C, V)), product),
            ]
    cases += [
        Case("Sub of a vector and a map", "Sub", ((C, V), (MAP, V))),
        Case("Mul of a gate per channel and one per pixel", "Mul", (((2, 5, 1, 1), V), ((2, 1, 4, 3), V))),
        Case("Mul of rows and a vector", "Mul", ((ROW, V), ((7,), V))),
        Case("SumTo of rows", "SumTo", ((ROW, V),), {"shape": (7,)}),
        Case("Shift", "Shift", ((MAP, V),), {"offset": 0.5}),
        Case("ClipScale", "ClipScale", (((1,), V),), {"limit": 0.5}, {0: np.array([4], np.float32)}),
    ]
    for shape, what in (((5, 3, 2, 2), F), ((4, 7), F), (C, V)):
        attrs = {"momentum": 0.9, "weight_decay": 0.01}
        adam = {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-3, "ema": 0.5}
        rmsprop = {"alpha": 0.9, "epsilon": 1e-3}
        positive = np.ones(shape, np.float32)
        state = ((shape, what), (shape, what), ((1,), V))
        cases += [
            Case(f"SGD of rank {len(shape)}", "SGD", state, {"weight_decay": 0.01}, rate),
            Case(f"SGD of rank {len(shape)} with momentum", "SGD", (*state, (shape, what)), attrs, rate),
            Case(
                f"Adam of rank {len(shape)} with an average",
                "Adam",
                (*state, *[(shape, what)] * 3, ((1,), V), ((1,), V)),
                adam,
                {**rate, 4: positive},
            ),
            Case(f"Accumulate of rank {len(shape)}", "Accumulate", state, {"share": 0.5}, {2: np.ones(1, np.float32)}),
            Case(f"RMSprop of rank {len(shape)}", "RMSprop", (*state, (shape, what)), rmsprop, {**rate, 3: positive}),
        ]
    return cases


CASES = [*convolutions(), *pools(), *_moves(), *_others()]
