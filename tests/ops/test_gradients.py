"""Every row of the op table: gradients against finite differences in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fusetile.graph import Graph, Parameter
from fusetile.ops import ROWS
from fusetile.ops.functions import FUNCTIONS
from fusetile.ops.loss import LOSSES, PAIR_LOSSES
from fusetile.ops.resample import resample
from fusetile.passes.differentiate import Criterion, differentiate
from fusetile.reference import evaluate
from tests.ops.cases import FIT, FUNCTION_ATTRS, POSITIVE, TERMS, VIEWS, product_shapes, tapped
from tests.ops.window_cases import CEIL, CEIL_DROPPED, CONVOLUTIONS, MAXIMA, POOLS, window

DIFFERENTIABLE: list[tuple[str, list[tuple[tuple[int, ...], str]], dict[str, Any]]] = [
    *(("Conv", [(x, "map"), (w, "filter"), ((w[0],), "map")], attrs) for x, w, attrs in CONVOLUTIONS.values()),
    ("Gemm", [((3, 7), "map"), ((4, 7), "filter"), ((4,), "map")], {}),
    *(
        ("ConvInputGrad", [((2, 4, 3, 2), "map"), ((4, 3, 3, 2), "filter")], attrs)
        for attrs in (
            window(2, (1, 0, 1, 0)) | {"input_shape": (2, 3, 5, 4)},
            window(2, (1, 0, 1, 0)) | {"input_shape": (2, 3, 6, 5)},
            window((1, 2), (0, 1, 0, 1), (2, 1)) | {"input_shape": (2, 6, 7, 2), "groups": 2},
        )
    ),
    *(("MaxPool", [(x, "map")], {"ceil_mode": False, **attrs}) for x, attrs in MAXIMA.values()),
    *(
        ("AveragePool", [(x, "map")], {"ceil_mode": False, **attrs, "count_include_pad": include})
        for x, attrs in (*POOLS.values(), CEIL, CEIL_DROPPED)
        for include in (False, True)
    ),
    ("GlobalAveragePool", [((2, 3, 5, 4), "map")], {}),
    ("Relu", [((2, 3, 5, 4), "map")], {}),
    ("LeakyRelu", [((2, 3, 5, 4), "map")], {"alpha": 0.1}),
    ("LeakyRelu", [((3, 4), "map")], {"alpha": -0.4}),
    *((kind, [((2, 3, 5, 4), "map")], FUNCTION_ATTRS.get(kind, {})) for kind in FUNCTIONS if kind not in POSITIVE),
    *((kind, [((2, 3, 5, 4), "positive")], FUNCTION_ATTRS.get(kind, {})) for kind in POSITIVE),
    *(
        (kind, [((2, 3, 5, 4), "map"), (other, "positive" if kind == "Div" else "map")], {})
        for kind in ("Add", "Sub", "Mul", "Div", "Max", "Min", "PRelu")
        for other in (*FIT, (3,))
    ),
    *(("Expand", [(other, "map")], {"shape": (2, 3, 5, 4)}) for other in (*FIT[1:], (3,))),
    *(("SumTo", [((2, 3, 5, 4), "map")], {"shape": shape}) for shape in (*FIT[1:], (2, 1, 1, 1), (3,))),
    ("SumTo", [((2, 3, 5, 4), "map"), ((3,), "map")], {"shape": (2, 3, 1, 1)}),
    *(("MaxTo", [((2, 3, 5, 4), "map")], {"shape": shape}) for shape in ((2, 3, 1, 1), (2, 1, 5, 4), (2, 3, 5, 1))),
    *(
        (kind, [((2, 3, 5, 4), "map")], {"shape": shape})
        for kind in ("Softmax", "LogSoftmax")
        for shape in ((2, 1, 5, 4), (2, 3, 5, 1))
    ),
    *(("Rearrange", [(shape, "map")], {"dims": dims}) for shape, dims in VIEWS.values()),
    ("MapOf", [((3, 4, 2, 2), "filter")], {}),
    *(
        ("Resample", [(tapped(*names)[0], "map")], tapped(*names)[1])
        for names in (("reflected", "linear"), ("padded", "backwards with steps"))
    ),
    *(("Pad", [((2, 3, 5, 4), "map")], {"axis": axis, "before": 2, "after": 1}) for axis in (1, 2)),
    *(("Slice", [((2, 3, 5, 4), "map")], {"axis": axis, "start": 1, "stop": 3}) for axis in (1, 3)),
    *(
        ("MatMul", [(shape, "map") for shape in product_shapes(terms, n=2, k=3, h=4, c=6, w=5)], {"terms": terms})
        for terms in TERMS
    ),
    ("MatMul", [((2, 3, 4, 6), "map"), ((2, 1, 5, 6), "map")], {"terms": ("nkhc", "nkwc")}),
    ("MatMul", [((1, 3, 4, 6), "map"), ((2, 5, 1, 6), "map")], {"terms": ("nkhc", "nwhc")}),
    ("Sub", [((3,), "map"), ((2, 3, 5, 4), "map")], {}),
    ("Mul", [((2, 3, 1, 1), "map"), ((2, 1, 5, 4), "map")], {}),
    ("Shift", [((3, 4), "map")], {"offset": -2.5}),
    ("Scale", [((3, 4), "map")], {"factor": -2.5}),
    ("Identity", [((3, 4), "map")], {}),
    ("Concat", [((2, 3, 4, 3), "map"), ((2, 1, 4, 3), "map")], {"axis": 1}),
    ("Concat", [((2, 3, 4, 3), "map"), ((2, 3, 2, 3), "map")], {"axis": 2}),
    ("Reshape", [((2, 3, 4, 3), "map")], {"shape": (2, 36)}),
    ("Dropout", [((2, 3, 4, 3), "map"), ((1,), "step")], {"ratio": 0.4, "seed": 1, "site": 0}),
    ("Normalize", [((3, 4, 2, 3), "map"), ((4,), "map"), ((4,), "map")], {"count": 18}),
    ("Normalize", [((6, 4), "map"), ((4,), "map"), ((4,), "map")], {"count": 6}),
    ("Normalize", [((3, 4, 2, 3), "map"), ((4,), "map"), ((4,), "map")], {"count": 0}),
    *(
        ("Standardize", [((3, 4, 2, 3), "map"), (gamma, "map"), (beta, "map")], attrs)
        for gamma, beta, attrs in (
            ((4,), (4,), {"shape": (3, 4, 1, 1), "count": 6, "per_group": 1}),
            ((4,), (4,), {"shape": (3, 4, 1, 1), "count": 12, "per_group": 2}),
            ((1, 1, 1, 3), (1,), {"shape": (3, 4, 2, 1), "count": 3, "per_group": 1}),
        )
    ),
]


def differentiated(
    kind: str, operands: list[tuple[tuple[int, ...], str]], attrs: Mapping[str, Any], loss: str
) -> tuple[Graph, dict[str, np.ndarray]]:
    """The op, its float operands all trained, and a loss on its output; and what must be fed."""
    graph, names, rng = Graph(kind), [], np.random.default_rng(5)
    fed: dict[str, np.ndarray] = {}
    for i, (shape, what) in enumerate(operands):
        if what == "step":
            names.append(graph.add_tensor("step", shape, "int32"))
            fed["step"] = np.array([2], np.int32)
            continue
        value = rng.standard_normal(shape)
        if what == "positive":
            value, what = np.abs(value) + 0.5, "map"
        names.append(graph.add_tensor(f"p{i}", shape, kind="filter" if what == "filter" else "map"))
        graph.parameters[names[-1]] = Parameter(value, trainable=True)
    if kind == "Normalize":
        if attrs["count"]:
            (sums,) = graph.add("ChannelMoments", ["p0"])
            (stats,) = graph.add("BatchStatistics", [sums], attrs={**attrs, "epsilon": 1e-3})
        else:
            for name, value in (("mean", rng.standard_normal(4)), ("var", rng.random(4) + 1)):
                graph.add_parameter(name, Parameter(value, trainable=False))
            (stats,) = graph.add("FrozenStatistics", ["mean", "var"], attrs={"epsilon": 1e-3})
        names.insert(1, stats)
    if kind == "Standardize":
        sums = graph.add("Moments", ["p0"], attrs={"shape": attrs["shape"]}, outputs=["sum", "squares"])
        names[1:1] = graph.add("Statistics", sums, attrs={**attrs, "epsilon": 1e-3}, outputs=["mean", "inverse"])
    if kind == "Resample":
        output = resample(graph, names[0], attrs["rows"], attrs["columns"], stem="out")
    else:
        (output, *_) = graph.add(kind, names, attrs=attrs, outputs=None, stem="out")
    graph.outputs = [output]
    graph = differentiate(graph, Criterion(loss=loss))
    for name in graph.targets:
        tensor = graph.tensors[name]
        classes = graph.tensors[output].shape[1] if tensor.dtype == "int32" else 0
        fed[name] = (
            rng.integers(0, classes, tensor.shape, dtype=np.int32) if classes else rng.standard_normal(tensor.shape)
        )
    return graph, fed


def assert_gradients(graph: Graph, fed: Mapping[str, np.ndarray]) -> None:
    """Directional derivatives of the loss, for every trained tensor, in three random directions."""
    values = evaluate(graph, fed, exact=True)
    rng = np.random.default_rng(6)
    for name, gradient in graph.gradients.items():
        assert values[gradient].shape == values[name].shape
        for _ in range(3):
            direction, step = rng.standard_normal(values[name].shape), 1e-6
            plus, minus = (
                evaluate(graph, {**fed, name: values[name] + sign * step * direction}, exact=True)[graph.loss][0]
                for sign in (1, -1)
            )
            assert (plus - minus) / (2 * step) == pytest.approx(
                (values[gradient] * direction).sum(), rel=1e-5, abs=1e-8
            )


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=[f"{case[0]}-{i}" for i, case in enumerate(DIFFERENTIABLE)])
def test_gradients_are_those_of_finite_differences(case: tuple[str, list[Any], dict[str, Any]]) -> None:
    graph, fed = differentiated(*case, loss="mse")
    assert len(graph.gradients) == sum(what != "step" for _, what in case[1])
    assert_gradients(graph, fed)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4, 2)])
def test_gradients_of_cross_entropy(shape: tuple[int, ...]) -> None:
    assert_gradients(*differentiated("Identity", [(shape, "map")], {}, loss="cross-entropy"))


@pytest.mark.parametrize("loss", ["nll", *PAIR_LOSSES])
def test_gradients_of_losses(loss: str) -> None:
    assert_gradients(*differentiated("Identity", [((2, 3, 4, 2), "map")], {}, loss=loss))


def test_every_op_with_a_gradient_is_tested() -> None:
    tested = {kind for kind, _, _ in DIFFERENTIABLE} | {"BatchStatistics", "FrozenStatistics"}
    elsewhere = {"YoloV2", "MaxPoolGrad"}  # test_yolo.py, and test_max_unpool in onnx_import/test_window_rules.py
    elsewhere |= {"FilterOf"}  # a loss is of maps: test_networks.py, weight_standardized
    elsewhere |= {"IsGreater", "IsAtLeast", "Masked", "MaskedOut"}  # test_choices in onnx_import/test_masks.py
    assert tested | set(LOSSES.values()) | elsewhere == {kind for kind, row in ROWS.items() if row.vjp}


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    off = replace(ROWS["ReluGrad"], reference=lambda op, domain, box, inputs: [inputs[0] * 1.0])
    monkeypatch.setitem(ROWS, "ReluGrad", off)
    with pytest.raises(AssertionError):
        assert_gradients(*differentiated("Relu", [((3, 4), "map")], {}, loss="mse"))
