"""Functions of one element, from one table: what is computed, and the derivative.

A line of the table makes two rows: the op itself, and its gradient dx = dy * derivative. Expressions are read by numpy
here and by code generation; names are x, y = f(x) and the op's attributes. Of x and y, the gradient keeps what its
expression mentions: y where that is enough, because the next layer keeps it anyway.

    exp, log, sqrt, tanh, erf, abs, min, max as usual
    log1p(a)                                 only for 0 <= a <= 1
    select(condition, a, b)                  a where the condition holds
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusetile.box import Box
from fusetile.graph import BACKWARD, Graph, Op
from fusetile.ops.base import Array, Attrs, Domain, Reference, Row, Vjp, register, same_spec
from fusetile.ops.pointwise import elementwise_domain

_SOFTPLUS = "(max(x, 0) + log1p(exp(-abs(x))))"
# (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), and tanh(log(1 + w)) = (w + 2) w / ((w + 2) w + 2): 1 - tanh^2 would cancel
_GATE = "(1 / (1 + exp(-1.5957691216057308 * (x + 0.044715 * x * x * x))))"
_MISH = "((exp(min(x, 20)) + 2) * exp(min(x, 20)) / ((exp(min(x, 20)) + 2) * exp(min(x, 20)) + 2))"

# kind -> f(x), f'(x). At the bounds of Clip the derivative is 0, as that of PyTorch's ReLU6 and Hardtanh.
FUNCTIONS: dict[str, tuple[str, str]] = {
    "Abs": ("abs(x)", "select(x > 0, 1, select(x < 0, -1, 0))"),
    "Celu": ("select(x > 0, x, alpha * (exp(min(x, 0) / alpha) - 1))", "select(x > 0, 1, exp(min(x, 0) / alpha))"),
    "Clip": ("min(max(x, low), high)", "select(y > low, select(y < high, 1, 0), 0)"),
    "Elu": ("select(x > 0, x, alpha * (exp(min(x, 0)) - 1))", "select(x > 0, 1, alpha * exp(min(x, 0)))"),
    "Erf": ("erf(x)", "1.1283791670955126 * exp(-(x * x))"),
    "Exp": ("exp(x)", "y"),
    "Gelu": (
        "0.5 * x * (1 + erf(0.7071067811865476 * x))",
        "0.5 * (1 + erf(0.7071067811865476 * x)) + 0.3989422804014327 * x * exp(-0.5 * x * x)",
    ),
    "GeluTanh": (
        f"x * {_GATE}",
        f"{_GATE} * (1 + x * (1 - {_GATE}) * 1.5957691216057308 * (1 + 0.134145 * x * x))",
    ),
    "HardSigmoid": ("min(max(alpha * x + beta, 0), 1)", "select(y > 0, select(y < 1, alpha, 0), 0)"),
    "HardSwish": ("x * min(max(x / 6 + 0.5, 0), 1)", "select(x > -3, select(x < 3, x / 3 + 0.5, 1), 0)"),
    "Log": ("log(x)", "1 / x"),
    "Mish": (f"x * {_MISH}", f"{_MISH} + x * (1 - {_MISH} * {_MISH}) / (1 + exp(-x))"),
    "Power": ("exp(exponent * log(x))", "exponent * exp((exponent - 1) * log(x))"),
    "Reciprocal": ("1 / x", "-(y * y)"),
    "Selu": (
        "gamma * select(x > 0, x, alpha * (exp(min(x, 0)) - 1))",
        "gamma * select(x > 0, 1, alpha * exp(min(x, 0)))",
    ),
    "Sigmoid": ("1 / (1 + exp(-x))", "y * (1 - y)"),
    "Silu": ("x / (1 + exp(-x))", "(1 + x * (1 - 1 / (1 + exp(-x)))) / (1 + exp(-x))"),
    "Softplus": (_SOFTPLUS, "1 / (1 + exp(-x))"),
    "Softsign": ("x / (1 + abs(x))", "1 / ((1 + abs(x)) * (1 + abs(x)))"),
    "Sqrt": ("sqrt(x)", "0.5 / y"),
    "Tanh": ("tanh(x)", "1 - y * y"),
}

_NUMPY: dict[str, Any] = {
    "abs": np.abs,
    "erf": np.vectorize(math.erf, otypes=["float64"]),
    "exp": np.exp,
    "log": np.log,
    "log1p": np.log1p,
    "max": np.maximum,
    "min": np.minimum,
    "select": np.where,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
}


def compute(expression: str, attrs: Attrs, inputs: Sequence[Array]) -> Array:
    """The value of a row's expression in the elements x0, x1, ..., in the inputs' type."""
    names = {**_NUMPY, **attrs, **{f"x{i}": value for i, value in enumerate(inputs)}}
    code = compile(ast.parse(expression, mode="eval"), "<row>", "eval")
    with np.errstate(all="ignore"):  # exp of a large number is infinite, as it should be
        return np.asarray(eval(code, {"__builtins__": {}}, names), inputs[0].dtype)


def _numbered(expression: str, operands: Sequence[str]) -> str:
    for i, name in enumerate(operands):
        expression = re.sub(rf"\b{name}\b", f"x{i}", expression)
    return expression


def _reference(expression: str) -> Reference:
    def reference(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
        return [compute(expression, op.attrs, inputs)]

    return reference


def _vjp(kept: Sequence[str]) -> Vjp:
    def vjp(graph: Graph, op: Op, grads: Sequence[str | None]) -> list[str | None]:
        dy = grads[0]
        assert dy is not None
        operands = [dy, *({"x": op.inputs[0], "y": op.outputs[0]}[name] for name in kept)]
        stem = f"grad.{op.inputs[0]}"
        return [
            *graph.add(f"{op.kind}Grad", operands, attrs=op.attrs, stem=stem, phase=BACKWARD, origin=op.origin),
        ]

    return vjp


# -- fused into a normalization --------------------------------------------------------------------------------------

_ONLY_ALONE = ("Log", "Power", "Reciprocal", "Sqrt")
"""Their derivative at 0 may be infinite, and 0 is what lanes hold that fill up a block."""

_Y = re.compile(r"\by\b")
FUSED_NAMES = {kind: kind.lower() for kind in FUNCTIONS if kind not in _ONLY_ALONE}


def _in_dy_and_x(function: str, derivative: str) -> str:
    """dx as an expression in dy and x."""
    return f"dy * ({re.sub(_Y, f'({function})', derivative)})"


# the name that fusion gives to an activation -> f(x), and dx of dy and x
_FUSED = {
    "relu": ("max(x, 0)", "select(x > 0, dy, 0)"),
    "leaky_relu": ("select(x > 0, x, alpha * x)", "select(x > 0, dy, alpha * dy)"),
    **{name: (FUNCTIONS[kind][0], _in_dy_and_x(*FUNCTIONS[kind])) for kind, name in FUSED_NAMES.items()},
}


def fused_expression(activation: str) -> str:
    """An activation as an expression in x0; none is the identity."""
    return _numbered(_FUSED[activation][0], ["x"]) if activation else "x0"


def fused_gradient(activation: str) -> str:
    """The gradient of an activation's input as an expression in x0, that of its output, and x1, its input."""
    return _numbered(_FUSED[activation][1], ["dy", "x"]) if activation else "x0"


for _kind, (_function, _derivative) in FUNCTIONS.items():
    _kept = [name for name in "xy" if re.search(rf"\b{name}\b", _derivative)]
    _forward, _gradient = _numbered(_function, "x"), _numbered(f"dy * ({_derivative})", ["dy", *_kept])
    register(
        Row(
            _kind,
            same_spec,
            elementwise_domain,
            _reference(_forward),
            _vjp(_kept),
            kernel="elementwise",
            expression=_forward,
        )
    )
    register(
        Row(
            f"{_kind}Grad",
            same_spec,
            elementwise_domain,
            _reference(_gradient),
            kernel="elementwise",
            expression=_gradient,
        )
    )
