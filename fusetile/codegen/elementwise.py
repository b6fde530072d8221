"""Ops that a row describes by an expression over the elements x0, x1, ... of its inputs and the attributes."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusetile.box import Box, extents, view4
from fusetile.codegen.calls import KernelCall, Lowered, ref, vectors
from fusetile.codegen.functions import STATEMENTS
from fusetile.codegen.job import Job
from fusetile.codegen.mapped import loops_over, mapped_call, mapped_kernel
from fusetile.codegen.move import zero_pads
from fusetile.codegen.reblock import conform
from fusetile.codegen.strided import strided_call, strided_kernel
from fusetile.errors import PlanError
from fusetile.graph import Op
from fusetile.ops import row
from fusetile.ops.functions import compute
from fusetile.program import Buffer

_COMPARE = {ast.Gt: ">", ast.Lt: "<", ast.GtE: ">=", ast.LtE: "<="}
_ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
STRIDES = ("image", "block", "row", "pixel")
Operand = tuple[Buffer, Box]


@dataclass(slots=True)
class _Translator:
    """Expression -> TVMScript. Numbers stay numbers; parts with attributes but without an element are evaluated here
    and become the float arguments a0, a1, ...; functions become statements that fill temporary vectors t0, t1, ..."""

    attrs: Mapping[str, Any]
    floats: list[float] = field(default_factory=list)
    statements: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)

    def __call__(self, node: ast.expr) -> str:
        names = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
        if not any(name[0] == "x" and name[1:].isdigit() for name in names):
            value = float(eval(compile(ast.Expression(node), "<row>", "eval"), {}, dict(self.attrs)))
            return self._argument(ast.unparse(node), value) if names else f"T.float32({value!r})"
        match node:
            case ast.Name(id=name):
                return f"{{{name}}}"
            case ast.UnaryOp(ast.USub(), operand):
                return f"(T.float32(0) - {self(operand)})"
            case ast.BinOp(left, operator, right):
                return f"({self(left)} {_ARITHMETIC[type(operator)]} {self(right)})"
            case ast.Compare(left, [operator], [right]):
                return f"({self(left)} {_COMPARE[type(operator)]} {self(right)})"
            case ast.Call(ast.Name(id=name), arguments):
                return self._call(name, node, arguments)
        raise PlanError(f"no kernel for the expression {ast.unparse(node)!r}")

    def _call(self, name: str, node: ast.expr, arguments: Sequence[ast.expr]) -> str:
        match name, [self._once(argument) for argument in arguments]:
            case "select", [condition, yes, no]:
                return f"T.Select({condition}, {yes}, {no})"
            case "max", [one, two]:
                return f"T.Select({one} < {two}, {two}, {one})"  # a NaN in the first operand stays
            case "min", [one, two]:
                return f"T.Select({one} > {two}, {two}, {one})"
            case "abs", [one]:
                return f"T.Select({one} < T.float32(0), T.float32(0) - {one}, {one})"
            case "sqrt", [one]:
                return f"T.sqrt({one})"
            case name, [one] if name in STATEMENTS:
                key = ast.unparse(node)
                if key not in self.known:
                    self.known[key] = self._function(STATEMENTS[name], one)
                return self.known[key]
        raise PlanError(f"no kernel for the expression {ast.unparse(node)!r}")

    def _once(self, node: ast.expr) -> str:
        """An argument, which may be used several times, in a temporary vector if it takes work."""
        text = self(node)
        if isinstance(node, ast.Compare | ast.Name | ast.Constant) or "{" not in text:
            return text
        return self._keep(text)

    def _function(self, statements: Sequence[str], argument: str) -> str:
        kept: list[str] = []
        for statement in statements:
            kept.append(self._keep(statement.format(*kept, a=argument)))
        return kept[-1]

    def _keep(self, text: str) -> str:
        name = f"t{len(self.statements)}[v]"
        self.statements.append(f"{name} = {text}")
        return name

    def _argument(self, text: str, value: float) -> str:
        """Equal texts share an argument; equal values do not, because the kernel is the same for all values."""
        if text not in self.known:
            self.known[text] = f"a{len(self.floats)}"
            self.floats.append(value)
        return self.known[text]


def translate(expression: str, attrs: Mapping[str, Any]) -> tuple[list[str], str, dict[str, float]]:
    """A row's expression for a kernel: statements that fill vectors t0, t1, ..., the value, and the float arguments."""
    translator = _Translator(attrs)
    text = translator(ast.parse(expression, mode="eval").body)
    return translator.statements, text, {f"a{i}": value for i, value in enumerate(translator.floats)}


def lower_elementwise(job: Job) -> Lowered:
    """One pass over the box, and one over its pad lanes if the expression does not keep them zero."""
    expression = row(job.op.kind).expression
    statements, text, floats = translate(expression, job.op.attrs)
    names = {part.id for part in ast.walk(ast.parse(expression)) if isinstance(part, ast.Name)}
    used = [i for i in range(len(job.inputs)) if f"x{i}" in names]
    written = job.written()
    before, operands = with_lanes(job.op, [job.operand(i) for i in used], job.output)
    kernel = _Kernel(
        f"elementwise_{job.op.kind.lower()}",
        (*statements, f"{{y}} = {text}"),
        {f"t{i}": "float32" for i in range(len(statements))},
        floats,
    )
    whole = {f"x{i}": operand for i, operand in zip(used, operands, strict=True) if _is_whole(operand, written)}
    spread = {f"x{i}": operand for i, operand in zip(used, operands, strict=True) if f"x{i}" not in whole}
    whole["y"] = job.result()
    call = _broadcast(kernel, whole, spread) if spread else _strided(kernel, whole)
    shared = [f"x{i}" in spread and not has_lanes(spread[f"x{i}"], written) for i in range(len(job.inputs))]
    clears = zero_pads(job.output, written) if _fills_pads(job.op, shared) else ()
    return Lowered((*before.calls, call, *clears), before.scratch)


@dataclass(frozen=True, slots=True)
class _Kernel:
    name: str
    statements: tuple[str, ...]
    scratch: Mapping[str, str]
    floats: Mapping[str, float]


def _strided(kernel: _Kernel, operands: Mapping[str, Operand]) -> KernelCall:
    made = strided_kernel(
        kernel.name,
        operands={key: buffer.dtype for key, (buffer, _) in operands.items()},
        statements=kernel.statements,
        floats=list(kernel.floats),
        scratch=kernel.scratch,
    )
    return strided_call(made, list(operands.values()), floats=list(kernel.floats.values()))


def _broadcast(kernel: _Kernel, whole: Mapping[str, Operand], spread: Mapping[str, Operand]) -> KernelCall:
    """A call for operands of which those in `spread` stay the same along some axes."""
    output, written = whole["y"]
    block, name, statements = output.block[1], kernel.name, list(kernel.statements)
    ints: dict[str, int] = {}
    for key, operand in spread.items():
        axes = varying(operand, written)
        ints |= broadcast_strides(key, operand, written)
        element = broadcast_element(key, "nkhw", axes)
        statements = [statement.replace(f"{{{key}}}", element) for statement in statements]
        name += f"_{key}_{axes or 'one'}"
    made = mapped_kernel(
        name,
        block=block,
        maps={key: buffer.dtype for key, (buffer, _) in whole.items()},
        pointers={key: buffer.dtype for key, (buffer, _) in spread.items()},
        ints=list(ints),
        floats=list(kernel.floats),
        scratch=kernel.scratch,
        pixel=vectors(statements, block),
    )
    return mapped_call(
        made,
        loops_over(written, block),
        list(whole.values()),
        pointers=[ref(buffer, need) for buffer, need in spread.values()],
        ints=tuple(ints.values()),
        floats=tuple(kernel.floats.values()),
    )


def _fills_pads(op: Op, shared: Sequence[bool]) -> bool:
    """Whether the expression makes anything but zero of inputs that are zero, or, where all lanes share one element,
    any number."""
    for numbers in ([0.0] * len(shared), [1.0 + 0.37 * i for i in range(len(shared))]):
        inputs = [
            np.full(1, number if alone else 0.0, np.float32) for number, alone in zip(numbers, shared, strict=True)
        ]
        if compute(row(op.kind).expression, op.attrs, inputs)[0] != 0:  # or NaN
            return True
    return False


# -- operands that are broadcast --------------------------------------------------------------------------------------


def with_lanes(op: Op, operands: Sequence[Operand], like: Buffer) -> tuple[Lowered, list[Operand]]:
    """The operands in the blocks of another buffer, but for those whose one channel all lanes share."""
    blocked = [operand for operand in operands if extents(view4(operand[1]))[1] > 1]
    before, conformed = conform(op, blocked, like.block)
    made = iter(conformed)
    return before, [next(made) if extents(view4(need))[1] > 1 else (buffer, need) for buffer, need in operands]


def _is_whole(operand: Operand, full: Box) -> bool:
    return extents(view4(operand[1])) == extents(view4(full))


def has_lanes(operand: Operand, full: Box) -> bool:
    """Whether the lanes of an operand are channels; else all lanes share its first."""
    return extents(view4(operand[1]))[1] == extents(view4(full))[1]


def varying(operand: Operand, full: Box) -> str:
    """The axes of the box `full` along which an operand does not stay the same: some of n, k, h, w."""
    sizes, wanted = extents(view4(operand[1])), extents(view4(full))
    return "".join(axis for axis, size, other in zip("nkhw", sizes, wanted, strict=True) if size == other)


def broadcast_strides(key: str, operand: Operand, full: Box) -> dict[str, int]:
    """An operand's strides, along the axes on which it varies, in a kernel over the box `full`."""
    axes = varying(operand, full)
    names = zip("nkhw", STRIDES, operand[0].strides, strict=True)
    return {f"{key}_{name}": stride for axis, name, stride in names if axis in axes}


def broadcast_element(key: str, indices: Sequence[str], axes: str = "nkhw") -> str:
    """The element of an operand that varies along `axes`, at image, channel block, row and column `indices`; at lane v
    if its lanes are channels."""
    places = zip("nkhw", indices, STRIDES, strict=True)
    terms = [f"({index}) * {key}_{name}" for axis, index, name in places if axis in axes]
    return f"{key}[{' + '.join([*terms, *(['v'] if 'k' in axes else [])]) or '0'}]"
