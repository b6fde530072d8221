"""The TVMScript of a kernel -> TVM's function, made by Python itself.

TVM's parser looks at every expression node by node, which takes as long as all that comes after it. Here the statements
are rewritten to calls of the builder that the parser uses too, and Python runs them:

    for i in T.serial(n):              with _loop(T.serial(n), "i") as i_1:
        v: T.int32 = x[i]      ->          v_2 = _scalar("v", T.int32, x_0[i_1])
        y[i] = v                           T.buffer_store(y_0, v_2, i_1)

Only what kernels consist of is understood. Names are numbered because they end with their block, unlike Python's.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.buffer import is_buffer_var
from tvm.tirx.script import builder as T


def function_of(source: str) -> Any:
    """The function `kernel` of a source; raises SyntaxError if it has statements that are not for kernels, or what
    Python or TVM's builder raise for what makes no sense."""
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.FunctionDef)
    tree = ast.Module([_Writer().function(definition)], [])
    names = {"T": T, "_buffer": _buffer, "_scalar": _scalar, "_loop": _loop, "_branches": _branches}
    exec(compile(ast.fix_missing_locations(tree), "<kernel>", "exec"), names)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(definition.name)
        names[definition.name]()
    return builder.get()


def _buffer(name: str, value: Any) -> Any:
    if not is_buffer_var(value):
        raise TypeError(f"{name} has no type, and is no buffer")
    IRBuilder.name(name, value)
    return value


def _scalar(name: str, dtype: Any, value: Any) -> Any:
    scalar = T.local_scalar(str(dtype().ty)).scalar
    IRBuilder.name(name, scalar.source)
    T.buffer_store(scalar.source, value, [0])
    return scalar


@contextmanager
def _loop(frame: Any, *names: str) -> Iterator[Any]:
    """A loop's body; gives its variable, or all of a grid."""
    with frame as made:
        variables = [made] if len(names) == 1 else list(made)
        for name, variable in zip(names, variables, strict=True):
            IRBuilder.name(name, variable)
        yield made


def _branches(condition: Any, both: bool) -> Iterator[bool]:
    """Which branches of a statement there are, each to be written while it is the current one: the only one that is
    ever taken, if Python knows, else the first, and the second if there are `both`."""
    if isinstance(condition, bool):
        yield condition
        return
    with T.If(condition):
        with T.Then():
            yield True
        if both:
            with T.Else():
                yield False


class _Writer(ast.NodeTransformer):
    """Writes the Python that builds a kernel; as a transformer it rewrites expressions."""

    def __init__(self) -> None:
        self.count = 0
        self.blocks: list[dict[str, str]] = []  # per open block its names, as they are written

    def function(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.blocks.append({})
        arguments = [
            self._assign(each, each.arg, _call(_builder("arg"), ast.Constant(each.arg), _call(each.annotation)))
            for each in node.args.args
            if each.annotation
        ]
        nothing = ast.arguments([], [], None, [], [], None, [])
        return ast.FunctionDef(node.name, nothing, [*arguments, *self._block(node.body)], [])

    def visit_Name(self, node: ast.Name) -> ast.expr:
        for names in reversed(self.blocks):
            if node.id in names:
                return ast.copy_location(ast.Name(names[node.id], ast.Load()), node)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        joined = _builder("And" if isinstance(node.op, ast.And) else "Or")
        result, *others = (self.visit(value) for value in node.values)
        for other in others:
            result = _call(joined, result, other)
        return result

    def _block(self, statements: Sequence[ast.stmt], names: dict[str, str] | None = None) -> list[ast.stmt]:
        self.blocks.append(names or {})
        written = [ast.copy_location(self._statement(statement), statement) for statement in statements]
        self.blocks.pop()
        return written

    def _statement(self, node: ast.stmt) -> ast.stmt:
        match node:
            case ast.For(target=target, iter=frame, body=body):
                return self._for(_names(target), self.visit(frame), body)
            case ast.If(test=test, body=body, orelse=orelse):
                return self._if(self.visit(test), body, orelse)
            case ast.AnnAssign(target=ast.Name(id=name), annotation=dtype, value=ast.expr() as value):
                return self._assign(node, name, _call(_name("_scalar"), ast.Constant(name), dtype, self.visit(value)))
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                return self._assign(node, name, _call(_name("_buffer"), ast.Constant(name), self.visit(value)))
            case ast.Assign(targets=[ast.Subscript(value=buffer, slice=index)], value=value):
                stored = (self.visit(each) for each in (buffer, value, index))
                return ast.Expr(_call(_builder("buffer_store"), *stored))
            case ast.Expr(value=value):
                return ast.Expr(self.visit(value))
        raise SyntaxError(f"line {node.lineno} is no statement of a kernel: {ast.unparse(node)}")

    def _for(self, names: Sequence[str], frame: ast.expr, body: Sequence[ast.stmt]) -> ast.With:
        numbered = {name: self._numbered(name) for name in names}
        variables: list[ast.expr] = [ast.Name(written, ast.Store()) for written in numbered.values()]
        target = variables[0] if len(variables) == 1 else ast.Tuple(variables, ast.Store())
        loop = _call(_name("_loop"), frame, *map(ast.Constant, names))
        return ast.With([ast.withitem(loop, target)], self._block(body, numbered))

    def _if(self, test: ast.expr, body: Sequence[ast.stmt], orelse: Sequence[ast.stmt]) -> ast.For:
        branch = self._numbered("branch")
        choice = ast.If(_name(branch), self._block(body), self._block(orelse))
        branches = _call(_name("_branches"), test, ast.Constant(bool(orelse)))
        return ast.For(ast.Name(branch, ast.Store()), branches, [choice], [])

    def _assign(self, node: ast.AST, name: str, value: ast.expr) -> ast.stmt:
        self.blocks[-1][name] = self._numbered(name)
        return ast.copy_location(ast.Assign([ast.Name(self.blocks[-1][name], ast.Store())], value), node)

    def _numbered(self, name: str) -> str:
        self.count += 1
        return f"{name}_{self.count}"


def _names(target: ast.expr) -> list[str]:
    """Of a loop's variables."""
    return [name.id for name in ast.walk(target) if isinstance(name, ast.Name)]


def _name(name: str) -> ast.expr:
    return ast.Name(name, ast.Load())


def _builder(name: str) -> ast.expr:
    return ast.Attribute(_name("T"), name, ast.Load())


def _call(function: ast.expr, *arguments: ast.expr) -> ast.expr:
    return ast.Call(function, list(arguments), [])
