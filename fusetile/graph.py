"""The graph: ops, tensors and parameters of a training step.

`Graph` holds ops in a topological order of its own making. Edges are derived from tensor names; operand order lives
in `Op.inputs`. Passes never change a graph that they were given: they `copy()` it first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import TopologicalSorter
from heapq import heappop, heappush
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fusetile.errors import PlanError

if TYPE_CHECKING:
    from fusetile.ops import Domain

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
PHASES = (FORWARD, BACKWARD, UPDATE)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A value: static shape (rank 0 to 4), numpy dtype name, and kind: a `filter` is stored as convolution weights."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    kind: Literal["map", "filter"] = "map"


@dataclass(frozen=True, slots=True)
class Op:
    """One application of a row of the op table. `origin` is the ONNX node it came from, for messages; `layer` the
    forward op whose split over the devices it follows (its own name in the forward phase)."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    phase: str = FORWARD
    origin: str = ""
    layer: str = ""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor that lives across steps: a weight, a BatchNorm statistic, or state of the optimizer.

    `value` is the initial value in the graph's shape. `onnx_name` is the initializer it came from ("" for optimizer
    state); `transposed` says that the initializer is stored with its two axes swapped (Gemm with transB = 0).
    `average_of` is the weight whose running average this is. What is not `lasting` means nothing between two steps.
    """

    value: np.ndarray
    trainable: bool
    onnx_name: str = ""
    transposed: bool = False
    average_of: str = ""
    lasting: bool = True


@dataclass(frozen=True, slots=True)
class LossTerm:
    """The loss of one output: a mean over the batch; over what the labels of the batch weigh (`weight`), if they are
    weighed. `op` compares the output (its first input) with the target (its second): the metrics do the same. Both may
    be "". It has been multiplied by `factor`."""

    loss: str
    weight: str = ""
    op: str = ""
    factor: float = 1.0


class Graph:
    """Ops over named tensors. Fed each step: `inputs`; `targets` (tensor -> its key in the data: y, or y0, y1, ...);
    `controls` (tensor -> what it holds: "step", or a role in `rates`, shape (1,)). `outputs` are the model's,
    `parameters` persist, `next_value` maps a parameter to the tensor that becomes its value for the next step,
    `gradients` maps a trained parameter to its gradient tensor, `loss` names the loss (shape (1,)), the sum of `terms`.
    `logged`: what else the lowest rank reads at the end. `repeats`: ops
    of the backward pass that only compute a forward op again -> that op. `notes`: lines for the user."""

    def __init__(self, name: str = "model") -> None:
        self.name = name
        self.tensors: dict[str, Tensor] = {}
        self.ops: dict[str, Op] = {}
        self.inputs: list[str] = []
        self.targets: dict[str, str] = {}
        self.controls: dict[str, str] = {}
        self.outputs: list[str] = []
        self.parameters: dict[str, Parameter] = {}
        self.next_value: dict[str, str] = {}
        self.gradients: dict[str, str] = {}
        self.loss: str = ""
        self.terms: list[LossTerm] = []
        self.logged: list[str] = []
        self.domains: dict[str, tuple[Op, Domain]] = {}  # iteration domains that were asked for, by op
        self.repeats: dict[str, str] = {}
        self.notes: list[str] = []
        self._fresh = 0

    # -- building ---------------------------------------------------------------------------------------------------

    def copy(self) -> Graph:
        """A graph of its own that shares the (immutable) ops, tensors and arrays."""
        other = Graph(self.name)
        for key, value in vars(self).items():
            setattr(other, key, value.copy() if isinstance(value, dict | list) else value)
        return other

    def fresh(self, stem: str) -> str:
        """An unused tensor and op name that starts with `stem`."""
        name = stem
        while name in self.tensors or name in self.ops:
            self._fresh += 1
            name = f"{stem}.{self._fresh}"
        return name

    def add_tensor(
        self, name: str, shape: Sequence[int], dtype: str = "float32", kind: Literal["map", "filter"] = "map"
    ) -> str:
        """Declare a tensor; returns its name."""
        if name in self.tensors:
            raise PlanError(f"tensor {name!r} is declared twice")
        self.tensors[name] = Tensor(name, tuple(int(size) for size in shape), dtype, kind)
        return name

    def add_parameter(self, name: str, parameter: Parameter, *, kind: Literal["map", "filter"] | None = None) -> str:
        """Declare a tensor that persists, with its initial value; what has two dimensions is a filter unless told
        otherwise."""
        kind = kind or ("filter" if parameter.value.ndim >= 2 else "map")
        self.add_tensor(name, parameter.value.shape, str(parameter.value.dtype), kind)
        self.parameters[name] = parameter
        return name

    def add(
        self,
        kind: str,
        inputs: Sequence[str],
        *,
        attrs: Mapping[str, Any] | None = None,
        outputs: Sequence[str] | None = None,
        stem: str = "",
        phase: str = FORWARD,
        origin: str = "",
        layer: str = "",
    ) -> tuple[str, ...]:
        """Append an op; its outputs' shapes come from the op table. Returns the names of the outputs."""
        from fusetile.ops import row  # the table needs Op and Tensor from here

        attrs = MappingProxyType(dict(attrs or {}))
        stem = stem or (f"{inputs[0]}.{kind}" if inputs else kind)
        specs = row(kind).shape(attrs, [self.tensors[name] for name in inputs])
        if outputs is None:
            outputs = [self.fresh(stem if i == 0 else f"{stem}.out{i}") for i in range(len(specs))]
        for name, spec in zip(outputs, specs, strict=True):
            self.add_tensor(name, spec.shape, spec.dtype, spec.kind)
        name = self._op_name(outputs[0])
        op = Op(name, kind, tuple(inputs), tuple(outputs), attrs, phase, origin, layer or name)
        self.ops[op.name] = op
        return op.outputs

    def _op_name(self, stem: str) -> str:
        name = stem
        while name in self.ops:
            self._fresh += 1
            name = f"{stem}.{self._fresh}"
        return name

    def replace_op(self, op: Op, **changes: Any) -> Op:
        """Replace an op by a changed one of the same name."""
        new = replace(op, **changes)
        self.ops[op.name] = new
        return new

    def remove(self, op: Op) -> None:
        """Remove an op and its output tensors; nothing may read them any more."""
        del self.ops[op.name]
        for name in op.outputs:
            del self.tensors[name]

    def rename_reads(self, old: str, new: str) -> None:
        """Let everything that reads `old` read `new` instead."""
        for op in list(self.ops.values()):
            if old in op.inputs:
                self.replace_op(op, inputs=tuple(new if name == old else name for name in op.inputs))
        self.outputs = [new if name == old else name for name in self.outputs]
        self.next_value = {key: new if name == old else name for key, name in self.next_value.items()}
        self.gradients = {key: new if name == old else name for key, name in self.gradients.items()}
        self.loss = new if self.loss == old else self.loss

    def fed(self) -> set[str]:
        """Tensors that the runtime fills before each step: every device has them as far as it needs them."""
        return {*self.inputs, *self.targets, *self.controls}

    # -- looking ----------------------------------------------------------------------------------------------------

    def producers(self) -> dict[str, Op]:
        """Tensor name -> the op that writes it (inputs and parameters have none)."""
        return {name: op for op in self.ops.values() for name in op.outputs}

    def consumers(self) -> dict[str, list[Op]]:
        """Tensor name -> the ops that read it, each once, in op order."""
        readers: dict[str, list[Op]] = {name: [] for name in self.tensors}
        for op in self.ops.values():
            for name in dict.fromkeys(op.inputs):
                readers[name].append(op)
        return readers

    def edges(self) -> Iterator[tuple[str, str, str]]:
        """(producer, reader, tensor) by names, in the order of the readers."""
        producers = self.producers()
        for op in self.ops.values():
            for name in dict.fromkeys(op.inputs):
                if name in producers:
                    yield producers[name].name, op.name, name

    def topological(self) -> Iterator[Op]:
        """Ops, producers first; ties by the order in which they were added. Raises graphlib.CycleError."""
        sorter = TopologicalSorter[str](dict.fromkeys(self.ops, ()))
        for producer, reader, _ in self.edges():
            sorter.add(reader, producer)
        sorter.prepare()
        names, ready = list(self.ops), list[int]()
        rank = {name: i for i, name in enumerate(names)}
        while sorter.is_active():
            for name in sorter.get_ready():
                heappush(ready, rank[name])
            name = names[heappop(ready)]
            yield self.ops[name]
            sorter.done(name)

    def sorted(self) -> Graph:
        """A copy whose ops are in topological order."""
        other = self.copy()
        other.ops = {op.name: op for op in self.topological()}
        return other

    def kept(self) -> set[str]:
        """Tensors that must exist whether or not an op reads them."""
        ends = [self.loss] if self.loss else []
        return {*self.outputs, *self.next_value.values(), *self.gradients.values(), *self.logged, *ends}

    def compared(self) -> set[str]:
        """Of a validation, whose terms are logged: tensors that metrics are made of, at the end."""
        ops = [self.ops[term.op] for term in self.terms if term.op and term.loss in self.logged]
        return {name for op in ops for name in op.inputs[:2]}

    def shapes(self, names: Iterable[str]) -> list[tuple[int, ...]]:
        """Shapes of several tensors."""
        return [self.tensors[name].shape for name in names]
