"""Activations that fusion gave to a normalization, as statements of its kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusetile.codegen.elementwise import translate
from fusetile.ops.functions import compute, fused_expression, fused_gradient


@dataclass(frozen=True, slots=True)
class Activation:
    """`statements` fill the vectors `scratch`; then `value` is the result, for lane v. The kernel's name ends in
    `suffix`, and it has the arguments `floats`."""

    suffix: str
    statements: tuple[str, ...]
    value: str
    floats: Mapping[str, float]

    @property
    def scratch(self) -> tuple[str, ...]:
        """One vector per statement."""
        return tuple(f"t{i}" for i in range(len(self.statements)))


def activation(attrs: Mapping[str, Any], x: str) -> Activation:
    """Of the element `x`."""
    return _made(attrs, fused_expression(attrs.get("activation", "")), {"x0": x})


def activation_gradient(attrs: Mapping[str, Any], dy: str, x: str) -> Activation:
    """What the activation makes of the gradient `dy` where its input was `x`."""
    return _made(attrs, fused_gradient(attrs.get("activation", "")), {"x0": dy, "x1": x})


def keeps_zero(attrs: Mapping[str, Any]) -> bool:
    """Whether the activation of 0 is 0."""
    zero = np.zeros(1, np.float32)
    return bool(compute(fused_expression(attrs.get("activation", "")), attrs, [zero])[0] == 0)


def _made(attrs: Mapping[str, Any], expression: str, elements: Mapping[str, str]) -> Activation:
    statements, value, floats = translate(expression, attrs)
    name = attrs.get("activation", "")
    lines = tuple(line.format_map(elements) for line in statements)
    return Activation(f"_{name}" if name else "", lines, value.format_map(elements), floats)
