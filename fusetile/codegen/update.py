"""The weight update: an optimizer's assignments in one pass, in place, in any layout of the parameter.

Products and sums are never contracted, so that every CPU computes the same bits. The kernel that makes the gradient of
a fully connected layer does the same arithmetic (see `updating`).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusetile.box import volume
from fusetile.codegen.calls import Lowered, Ref, ref, vectors
from fusetile.codegen.job import Job
from fusetile.codegen.loss import mean_of_partials
from fusetile.codegen.reblock import conform
from fusetile.codegen.strided import LANES, nest_of, strided_call, strided_kernel
from fusetile.errors import PlanError
from fusetile.graph import Op
from fusetile.ops.update import OPERATORS, RULES, assignments, controls_of, number_in, operand_names, states_of
from fusetile.program import Buffer

# TVM's LLVM fuses whatever product it sees go into a sum; it does not see one through integers. `zero` is 0.
_ROUNDED = 'T.reinterpret("float32", T.bitwise_xor(T.reinterpret("int32", {}), zero))'

_FLAGS = ("momentum", "nesterov", "weight_decay", "decoupled", "clipped", "ema")  # what changes the assignments


@dataclass(slots=True)
class _Translator:
    """Expressions -> vector statements that fill t0, t1, ...; numbers become the float arguments a0, a1, ..."""

    attrs: Mapping[str, Any]
    values: dict[str, str]
    statements: list[str] = field(default_factory=list)
    floats: dict[str, tuple[str, float]] = field(default_factory=dict)

    def assign(self, name: str, expression: str) -> None:
        """From here on `name` has the value of the expression."""
        self.values[name] = self._keep(self._text(ast.parse(expression, mode="eval").body))

    def _text(self, node: ast.expr) -> str:
        number = number_in(node, self.attrs, self.values)
        if number is not None:
            return self.floats.setdefault(ast.unparse(node), (f"a{len(self.floats)}", number))[0]
        match node:
            case ast.Name(id=name):
                return self.values[name]
            case ast.BinOp(left, operator, right):
                text = f"({self._text(left)} {OPERATORS[type(operator)][0]} {self._text(right)})"
                return self._keep(_ROUNDED.format(text)) if isinstance(operator, ast.Mult) else text
            case ast.Call(ast.Name("sqrt"), [argument]):
                return f"T.sqrt({self._text(argument)})"
        raise PlanError(f"no kernel for {ast.unparse(node)!r}")

    def _keep(self, text: str) -> str:
        name = f"t{len(self.statements)}[v]"
        self.statements.append(f"{name} = {text}")
        return name


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What an update does to an element, for any kernel that goes over elements in vectors of lanes v: statements about
    {g} and the `changed` arrays {w} and states, which also use the arrays `controls` of one element, the float
    arguments `floats`, the int argument `zero` and scratch vectors t0, t1, ..., of which there are `scratch`."""

    name: str
    changed: tuple[str, ...]
    controls: tuple[str, ...]
    floats: tuple[str, ...]
    scratch: int
    statements: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Updating:
    """An update for a kernel that makes a weight's gradient: its arithmetic and the values of its floats, and where the
    states, which lie like the weight, and the controls are."""

    arithmetic: Arithmetic
    floats: tuple[float, ...]
    states: tuple[Ref, ...]
    controls: tuple[Ref, ...]


def arithmetic(op: Op) -> tuple[Arithmetic, tuple[float, ...]]:
    """The arithmetic of an update, and the values of its floats."""
    changed = ("w", *states_of(op.kind, op.attrs))
    controls = (RULES[op.kind].rate, *controls_of(op.kind, op.attrs))
    translate = _Translator(
        op.attrs, {**{name: f"{{{name}}}" for name in (*changed, "g")}, **{n: f"{n}[0]" for n in controls}}
    )
    for name, expression in assignments(op.kind, op.attrs):
        translate.assign(name, expression)
    stores = [f"{{{name}}} = {translate.values[name]}" for name in changed]
    flags = [flag for flag in _FLAGS if op.attrs.get(flag)]
    floats, values = zip(*translate.floats.values(), strict=True) if translate.floats else ((), ())
    statements = (*translate.statements, *stores)
    name = "_".join((op.kind.lower(), *flags))
    return Arithmetic(name, changed, controls, floats, len(translate.statements), statements), values


def control_refs(op: Op, inputs: Sequence[Buffer]) -> tuple[Ref, ...]:
    """Where the controls of an update are, in the order of its arithmetic. `inputs` are without the gradient."""
    names = [name for name in operand_names(op.kind, op.attrs) if name != "g"]
    return tuple(ref(inputs[names.index(name)]) for name in (RULES[op.kind].rate, *controls_of(op.kind, op.attrs)))


def lower_update(job: Job) -> Lowered:
    """One pass over the shard: the weight, its gradient and its states."""
    written = job.written()
    weight, _, *others = job.inputs
    before, [moved] = conform(job.op, [job.operand(1)], job.output.block)
    does, values = arithmetic(job.op)
    kernel = strided_kernel(
        does.name,
        operands=dict.fromkeys((*does.changed, "g"), "float32"),
        constants=dict.fromkeys(does.controls, "float32"),
        statements=does.statements,
        more_ints=("zero",),
        floats=does.floats,
        scratch={f"t{i}": "float32" for i in range(does.scratch)},
    )
    call = strided_call(
        kernel,
        [*((buffer, written) for buffer in job.outputs), moved],
        constants=control_refs(job.op, [weight, *others]),
        more_ints=(0,),
        floats=values,
    )
    return Lowered((*before.calls, call), before.scratch)


def lower_gradient_norm(job: Job) -> Lowered:
    """The squares of all shards, in float64: a sum per lane and unit of work of each, added up in order."""
    shards = [(buffer, need) for buffer, need in job.operands if volume(need)]
    kernel = strided_kernel(
        "squares",
        operands={"G": "float32"},
        constants={"PARTIAL": "float64"},
        statements=['g[v] = T.Cast("float64", {G})', "total[v] = total[v] + g[v] * g[v]"],
        scratch={"g": "float64", "total": "float64"},
        before_unit=vectors(["total[v] = T.float64(0)"], LANES),
        after_unit=vectors([f"PARTIAL[u * {LANES} + v] = total[v]"], LANES),
    )
    sizes = [nest_of([shard]).units * LANES for shard in shards]
    partial = Buffer(f"{job.op.name}.partial", ((0, max(1, sum(sizes))),), "float64")
    starts = [Ref(partial.name, 8 * sum(sizes[:i])) for i in range(len(sizes))]
    calls = [strided_call(kernel, [shard], constants=[start]) for shard, start in zip(shards, starts, strict=True)]
    total = mean_of_partials(ref(partial), sum(sizes), 1, job.output, job.written())
    return Lowered((*calls, total), (partial,))
