"""Optimizers: how a parameter and its state change, element by element, in place.

Operands: the parameter w, its gradient g, the learning rate, the states, and the other controls, of one element each.
What happens to an element is a list of assignments, which numpy executes here and code generation translates: PyTorch's
rules for SGD, Adam, AdamW and RMSprop.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusetile.box import Box, Interval, volume
from fusetile.errors import PlanError
from fusetile.graph import Op, Tensor
from fusetile.ops.base import (
    All,
    Along,
    Array,
    Attrs,
    Axis,
    Domain,
    Row,
    Spec,
    element_axes,
    register,
    same_spec,
)
from fusetile.ops.functions import compute
from fusetile.ops.pointwise import elementwise_domain

Assignments = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Rule:
    """`states` and `controls` that it has besides the first control, `rate`, by their names in the assignments: those
    depend on the attributes. Controls are what `Graph.controls` calls roles."""

    states: Callable[[Attrs], tuple[str, ...]]
    controls: tuple[str, ...]
    assignments: Callable[[Attrs], Assignments]
    rate: str = "learning_rate"


def _sgd(attrs: Attrs) -> Assignments:
    step = "velocity" if attrs.get("momentum") else "g"
    lines = [("velocity", "momentum * velocity + g")] if attrs.get("momentum") else []
    if attrs.get("nesterov"):
        lines, step = [*lines, ("g", "g + momentum * velocity")], "g"
    return [*lines, ("w", f"w - learning_rate * {step}")]


def _adam(attrs: Attrs) -> Assignments:
    return [
        ("mean", "mean + (1 - beta1) * (g - mean)"),
        ("square", "beta2 * square + (1 - beta2) * (g * g)"),
        ("w", "w - corrected_rate * (mean / (sqrt(square) * correction + epsilon))"),
    ]


def _rmsprop(attrs: Attrs) -> Assignments:
    lines = [("square", "alpha * square + (1 - alpha) * (g * g)"), ("g", "g / (sqrt(square) + epsilon)")]
    if attrs.get("momentum"):
        return [*lines, ("velocity", "momentum * velocity + g"), ("w", "w - learning_rate * velocity")]
    return [*lines, ("w", "w - learning_rate * g")]


def _velocity(attrs: Attrs) -> tuple[str, ...]:
    return ("velocity",) if attrs.get("momentum") else ()


RULES: dict[str, Rule] = {
    "SGD": Rule(_velocity, (), _sgd),
    "Adam": Rule(lambda attrs: ("mean", "square"), ("corrected_rate", "correction"), _adam),
    "RMSprop": Rule(lambda attrs: ("square", *_velocity(attrs)), (), _rmsprop),
    "Accumulate": Rule(lambda attrs: (), (), lambda attrs: [("w", "kept * w + share * g")], "kept"),
}
"""The last is no optimizer: it adds a batch's gradient to the sum w of a step's."""


def states_of(kind: str, attrs: Attrs) -> tuple[str, ...]:
    """The states of an optimizer, in the order of its operands; `average` is that of the weights (attribute ema)."""
    return (*RULES[kind].states(attrs), *(("average",) if attrs.get("ema") else ()))


def controls_of(kind: str, attrs: Attrs) -> tuple[str, ...]:
    """The operands behind the states; `scale` comes from clipping (attribute clipped)."""
    return (*RULES[kind].controls, *(("scale",) if attrs.get("clipped") else ()))


def assignments(kind: str, attrs: Attrs) -> Assignments:
    """All that happens to an element. Decoupled weight decay is AdamW's."""
    lines: Assignments = [("g", "scale * g")] if attrs.get("clipped") else []
    if attrs.get("weight_decay"):
        decoupled = ("w", "w - learning_rate * (weight_decay * w)")
        lines.append(decoupled if attrs.get("decoupled") else ("g", "g + weight_decay * w"))
    lines += RULES[kind].assignments(attrs)
    return lines + ([("average", "average + (1 - ema) * (w - average)")] if attrs.get("ema") else [])


def operand_names(kind: str, attrs: Attrs) -> tuple[str, ...]:
    """The names that assignments use for the op's inputs."""
    return ("w", "g", RULES[kind].rate, *states_of(kind, attrs), *controls_of(kind, attrs))


def _shape(kind: str) -> Callable[[Attrs, Sequence[Tensor]], list[Spec]]:
    def shape(attrs: Attrs, inputs: Sequence[Tensor]) -> list[Spec]:
        return [Spec(inputs[0].shape, inputs[0].dtype, inputs[0].kind)] * (1 + len(states_of(kind, attrs)))

    return shape


def _domain(kind: str) -> Callable[[Attrs, Sequence[Tensor], Sequence[Tensor]], Domain]:
    def domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
        axes, access = element_axes(outputs[0])
        alone = {RULES[kind].rate, *controls_of(kind, attrs)}
        reads = tuple((All(1),) if name in alone else access for name in operand_names(kind, attrs))
        return Domain(axes, reads, tuple(access for _ in outputs))

    return domain


def _reference(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    real = inputs[0].dtype.type
    names = operand_names(op.kind, op.attrs)
    values = dict(zip(names, inputs, strict=True))
    values |= {name: real(values[name][0]) for name in (RULES[op.kind].rate, *controls_of(op.kind, op.attrs))}
    for name, expression in assignments(op.kind, op.attrs):
        values[name] = _evaluate(ast.parse(expression, mode="eval").body, op.attrs, values, real)
    return [values[name] for name in ("w", *states_of(op.kind, op.attrs))]


OPERATORS: dict[type[ast.operator], tuple[str, Callable[[Array, Array], Array]]] = {
    ast.Add: ("+", np.add),
    ast.Sub: ("-", np.subtract),
    ast.Mult: ("*", np.multiply),
    ast.Div: ("/", np.divide),
}


def number_in(node: ast.expr, attrs: Attrs, operands: Collection[str]) -> float | None:
    """The value of a part of an expression that has no operand in it, in double precision."""
    if any(isinstance(part, ast.Name) and part.id in operands for part in ast.walk(node)):
        return None
    return float(eval(compile(ast.Expression(node), "<rule>", "eval"), {"__builtins__": {}}, dict(attrs)))


def _evaluate(node: ast.expr, attrs: Attrs, values: Mapping[str, Array], real: Callable[[float], Array]) -> Array:
    """Every operation is rounded, as in the kernels."""
    number = number_in(node, attrs, values)
    if number is not None:
        return real(number)
    match node:
        case ast.Name(id=name):
            return values[name]
        case ast.BinOp(left, operator, right):
            _, function = OPERATORS[type(operator)]
            return function(_evaluate(left, attrs, values, real), _evaluate(right, attrs, values, real))
        case ast.Call(ast.Name("sqrt"), [argument]):
            return np.sqrt(_evaluate(argument, attrs, values, real))
    raise PlanError(f"no value for {ast.unparse(node)!r}")


for _kind in RULES:
    # the weight, then up to three states
    _in_place = ((0, 0), (1, 3), (2, 4), (3, 5))
    register(Row(_kind, _shape(_kind), _domain(_kind), _reference, kernel="update", in_place=_in_place))


# -- clipping --------------------------------------------------------------------------------------------------------
# Every device adds up its shards of all gradients. The op's axes are those of one gradient after the other; each has
# one index more than the gradient, at which there is nothing of it: where a device has no shard.


def _norm_domain(attrs: Attrs, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Domain:
    axes: list[Axis] = []
    reads = []
    for number, gradient in enumerate(inputs):
        own, access = element_axes(gradient)
        renamed = {axis.name: f"{axis.name}{number}" for axis in own}
        axes += [Axis(renamed[axis.name], axis.size + 1, "reduction") for axis in own]
        reads.append(tuple(Along(renamed[d.axis], d.size) if isinstance(d, Along) else d for d in access))
    return Domain(tuple(axes), tuple(reads), ((All(1),),))


def shards_box(gradients: Sequence[Tensor], shards: Sequence[Box]) -> Box:
    """The box of GradientNorm's iterations that has a shard of every gradient, empty ones included."""
    box: list[Interval] = []
    for gradient, shard in zip(gradients, shards, strict=True):
        axes, _ = element_axes(gradient)
        there = volume(shard) > 0
        box += shard[: len(axes)] if there else [(axis.size, axis.size + 1) for axis in axes]
    return tuple(box)


def _norm(op: Op, domain: Domain, box: Box, inputs: Sequence[Array]) -> list[Array]:
    """The sum of squares; its root is taken where all of it is there."""
    return [np.asarray([sum(np.square(g.astype(np.float64)).sum() for g in inputs)], inputs[0].dtype)]


CLIP_SCALE = "min(limit / (sqrt(x0) + 0.000001), 1)"

register(
    Row(
        "GradientNorm",
        lambda attrs, inputs: [Spec((1,))],
        _norm_domain,
        _norm,
        flops=lambda attrs, inputs: 0.0,  # its iterations are no measure of its work
        kernel="gradient_norm",
    )
)
register(
    Row(
        "ClipScale",
        same_spec,
        elementwise_domain,
        lambda op, domain, box, inputs: [compute(CLIP_SCALE, op.attrs, inputs)],
        kernel="elementwise",
        expression=CLIP_SCALE,
    )
)
