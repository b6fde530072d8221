"""Ops that a row describes by an expression over the elements x0, x1, ... of its inputs and the attributes."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from fusetile.box import Box
from fusetile.codegen.calls import Lowered
from fusetile.codegen.reblock import conform
from fusetile.codegen.strided import strided_call, strided_kernel
from fusetile.codegen.targets import Target
from fusetile.errors import PlanError
from fusetile.graph import Op
from fusetile.ops import Domain, row
from fusetile.program import Buffer

_COMPARE = {ast.Gt: ">", ast.Lt: "<", ast.GtE: ">=", ast.LtE: "<="}
_ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


class _Translator:
    """Expression -> TVMScript. Parts without an element are evaluated here and become float arguments of the kernel."""

    def __init__(self, attrs: Mapping[str, Any]) -> None:
        self.attrs = attrs
        self.floats: list[float] = []

    def __call__(self, node: ast.expr) -> str:
        if not any(isinstance(part, ast.Name) and part.id not in self.attrs for part in ast.walk(node)):
            self.floats.append(float(eval(compile(ast.Expression(node), "<row>", "eval"), {}, dict(self.attrs))))
            return f"a{len(self.floats) - 1}"
        match node:
            case ast.Name(id=name):
                return f"{{{name}}}"
            case ast.BinOp(left, operator, right):
                return f"({self(left)} {_ARITHMETIC[type(operator)]} {self(right)})"
            case ast.Compare(left, [operator], [right]):
                return f"({self(left)} {_COMPARE[type(operator)]} {self(right)})"
            case ast.Call(ast.Name(id="select"), [condition, yes, no]):
                return f"T.Select({self(condition)}, {self(yes)}, {self(no)})"
            case ast.Call(ast.Name(id="max"), [a, b]):
                one, two = self(a), self(b)
                return f"T.Select({one} < {two}, {two}, {one})"  # a NaN in the first operand stays
        raise PlanError(f"no kernel for the expression {ast.unparse(node)!r}")


def lower_elementwise(
    op: Op, domain: Domain, box: Box, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, target: Target
) -> Lowered:
    """One pass over the box; 0 must map to 0, so that pad lanes stay zero."""
    translate = _Translator(op.attrs)
    tree = ast.parse(row(op.kind).expression, mode="eval")
    names = {part.id for part in ast.walk(tree) if isinstance(part, ast.Name)}
    used = [i for i in range(len(inputs)) if f"x{i}" in names]
    text = translate(tree.body)
    kernel = strided_kernel(
        f"elementwise_{op.kind.lower()}",
        operands={**{f"x{i}": inputs[i].dtype for i in used}, "y": outputs[0].dtype},
        statements=[f"{{y}} = {text}"],
        floats=[f"a{i}" for i in range(len(translate.floats))],
    )
    written = domain.output(box)
    before, operands = conform(op, [(inputs[i], domain.need(box, i)) for i in used], outputs[0].block)
    call = strided_call(kernel, [*operands, (outputs[0], written)], floats=translate.floats)
    return Lowered((*before.calls, call), before.scratch)
