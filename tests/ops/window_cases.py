"""Cases of ops with windows, convolutions and pools: odd sizes, strides, pads, dilations."""

from __future__ import annotations

from typing import Any

from tests.ops.case import COUNT, RELU, Case, F, V


def window(
    stride: int | tuple[int, int] = 1, pads: tuple[int, ...] = (0, 0, 0, 0), dilation: int | tuple[int, int] = 1
) -> dict[str, Any]:
    strides = stride if isinstance(stride, tuple) else (stride, stride)
    dilations = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    return {"strides": strides, "dilations": dilations, "pads": pads}


# name -> (x, w, attributes)
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1x1": ((2, 3, 5, 4), (4, 3, 1, 1), window()),
    "3x3": ((2, 3, 7, 6), (4, 3, 3, 3), window(pads=(1, 1, 1, 1))),
    "strided, asymmetric": ((1, 2, 9, 8), (3, 2, 3, 2), window((2, 3), (0, 1, 2, 1))),
    "stride beyond the window": ((2, 2, 10, 7), (3, 2, 2, 1), window(3, (1, 0, 0, 0))),
    "dilated": ((1, 2, 10, 11), (3, 2, 3, 2), window(1, (2, 1, 2, 3), (2, 3))),
    "dilated and strided": ((1, 2, 11, 9), (2, 2, 2, 3), window((2, 1), (1, 2, 1, 2), (3, 2))),
    "wide pads": ((1, 1, 3, 3), (2, 1, 3, 3), window(1, (2, 2, 2, 2))),
    "one pixel": ((2, 3, 1, 1), (4, 3, 1, 1), window()),
    "depthwise": ((2, 5, 6, 7), (5, 1, 3, 3), window(1, (1, 1, 1, 1)) | {"groups": 5}),
    "depthwise, strided": ((1, 3, 8, 7), (3, 1, 3, 2), window((2, 3), (0, 1, 2, 1), (2, 1)) | {"groups": 3}),
    "depthwise, two outputs per channel": ((2, 3, 5, 4), (6, 1, 3, 3), window(2, (1, 1, 1, 1)) | {"groups": 3}),
    "in groups": ((2, 6, 5, 4), (9, 2, 3, 3), window(1, (1, 0, 1, 2)) | {"groups": 3}),
}
POOLS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "2x2": ((2, 3, 6, 8), {"kernel": (2, 2), **window(2)}),
    "odd size": ((1, 2, 7, 5), {"kernel": (2, 2), **window(2)}),
    "overlapping": ((1, 2, 9, 7), {"kernel": (3, 3), **window(2, (1, 1, 1, 1))}),
    "asymmetric": ((2, 1, 8, 9), {"kernel": (3, 2), **window((2, 3), (1, 0, 2, 1))}),
    "stride 1": ((1, 2, 5, 6), {"kernel": (2, 3), **window(1, (0, 1, 1, 1))}),
    "stride beyond the window": ((1, 1, 10, 11), {"kernel": (2, 2), **window(3)}),
}
CEIL = ((1, 2, 8, 9), {"kernel": (3, 2), **window((2, 2), (0, 1, 0, 0)), "ceil_mode": True})
CEIL_DROPPED = ((1, 1, 5, 6), {"kernel": (2, 2), **window((3, 2), (0, 0, 1, 1)), "ceil_mode": True})
DILATED = ((1, 2, 9, 8), {"kernel": (2, 3), **window(2, (1, 2, 1, 1), (3, 2))})
MAXIMA = {**POOLS, "ceil": CEIL, "ceil, last window dropped": CEIL_DROPPED, "dilated": DILATED}


def convolutions() -> list[Case]:
    cases = []
    for name, (x, w, attrs) in CONVOLUTIONS.items():
        sizes = [
            (size + attrs["pads"][i] + attrs["pads"][i + 2] - attrs["dilations"][i] * (taps - 1) - 1)
            // attrs["strides"][i]
            + 1
            for i, (size, taps) in enumerate(zip(x[2:], w[2:], strict=True))
        ]
        y = (x[0], w[0], *sizes)
        cases += [
            Case(f"Conv {name}", "Conv", ((x, V), (w, F), ((w[0],), V)), attrs),
            Case(f"Conv {name} relu", "Conv", ((x, V), (w, F)), {**attrs, "activation": "relu", "alpha": 0.0}),
            Case(f"ConvInputGrad {name}", "ConvInputGrad", ((y, V), (w, F)), {**attrs, "input_shape": x}),
            Case(f"ConvWeightGrad {name}", "ConvWeightGrad", ((x, V), (y, V)), {**attrs, "kernel_shape": w[2:]}),
        ]
    return cases


def pools() -> list[Case]:
    maxima = {**POOLS, "ceil": CEIL, "ceil, last window dropped": CEIL_DROPPED}
    averages = {name: case for name, case in maxima.items() if name != "dilated"}
    maxima["dilated"] = ((1, 2, 9, 8), {"kernel": (2, 3), **window(2, (1, 2, 1, 1), (3, 2))})
    cases = []
    for name, (x, attrs) in maxima.items():
        attrs = {"ceil_mode": False, **attrs}
        case = Case(f"MaxPool {name}", "MaxPool", ((x, V),), attrs)
        graph, op, _ = case.build()
        y, grad = graph.tensors[op.outputs[0]].shape, {**attrs, "input_shape": x}
        cases += [
            case,
            Case(f"MaxPoolGrad {name}", "MaxPoolGrad", ((y, V), (y, "uint8")), grad),
            Case(f"MaxPoolPick {name}", "MaxPoolPick", ((x, V), (y, "uint8")), attrs),
        ]
        maps, pair, vector = ((y, V), (y, "uint8"), (x, V)), ((2, x[1]), V), ((x[1],), V)
        sums, grad = ((2, x[1]), "float64"), {**grad, **COUNT, **RELU}
        cases += [
            Case(f"PooledNormalizeMoments {name}", "PooledNormalizeMoments", (*maps, pair, vector, vector), grad),
            Case(
                f"PooledNormalizeInputGrad {name}",
                "PooledNormalizeInputGrad",
                (*maps, pair, vector, sums, vector),
                grad,
            ),
        ]
    for name, (x, attrs) in averages.items():
        for include in (False, True):
            attrs = {"ceil_mode": False, **attrs, "count_include_pad": include}
            label = f"{name}{', pads counted' if include else ''}"
            case = Case(f"AveragePool {label}", "AveragePool", ((x, V),), attrs)
            graph, op, _ = case.build()
            y = graph.tensors[op.outputs[0]].shape
            cases += [case, Case(f"AveragePoolGrad {label}", "AveragePoolGrad", ((y, V),), {**attrs, "input_shape": x})]
    return cases
