"""Add the loss and the backward ops: reverse-mode differentiation of the whole graph, once, before it is cut.

    x -> Conv(w) -> y          x -> Conv(w) -> y -> CrossEntropy(target) -> loss
                                                 -> CrossEntropyGrad -> grad.y
                               ConvWeightGrad(x, grad.y) -> grad.w

Every op kind's gradient rule is in its row of the op table. Where a tensor is read several times its gradients are
added.
Source: Griewank and Walther, Evaluating Derivatives, chapter 3 (the reverse mode).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusetile.errors import UserError
from fusetile.graph import BACKWARD, Graph, Parameter
from fusetile.ops import row
from fusetile.ops.loss import CLASS_LOSSES, LOSSES

MODEL = "model"
"""The name of the loss that is part of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassOptions:
    """What counts how much in cross-entropy and nll. `ignore`: the label of spots that do not count; `weights`: one per
    class; `smoothing`: the part of a label that is spread over all classes (cross-entropy only)."""

    ignore: int | None = None
    weights: tuple[float, ...] = ()
    smoothing: float = 0.0


def differentiate(graph: Graph, *, loss: str, classes: ClassOptions | None = None) -> Graph:
    """`loss`: a name in `LOSSES`, applied to every output with its own target; several are added up. Or "model": the
    first output is the loss, and the others do not matter.

    Targets are named `y`, or `y0`, `y1`, ... in the order of the outputs. Raises UserError where there is nothing to
    train or the loss does not fit an output.
    """
    graph = graph.copy()
    if loss not in (*LOSSES, MODEL):
        raise UserError(f"unknown loss {loss!r}: choose one of {', '.join(sorted((*LOSSES, MODEL)))}")
    if not any(parameter.trainable for parameter in graph.parameters.values()):
        raise UserError(f"{graph.name}: no float32 initializer is the weight of a layer, so there is nothing to train")
    classes = classes or ClassOptions()
    if classes != ClassOptions() and loss not in CLASS_LOSSES:
        raise UserError(
            f"--ignore-index, --class-weights and --label-smoothing don't fit --loss {loss}: it has no classes"
        )
    if classes.smoothing and loss != "cross-entropy":
        raise UserError(f"--label-smoothing needs --loss cross-entropy, not {loss}")
    seed = ""
    if loss == MODEL:
        seed = _take_loss(graph)
    else:
        parts = [_add_loss(graph, i, LOSSES[loss], classes) for i in range(len(graph.outputs))]
        graph.loss = parts[0]
        for part in parts[1:]:
            (graph.loss,) = graph.add("Add", [graph.loss, part], stem="loss.sum", origin="the sum of the losses")
    _add_gradients(graph, seed or graph.loss)  # no rule of a loss reads its gradient, which is 1
    return graph


def _take_loss(graph: Graph) -> str:
    """The model's first output is the loss; returns a tensor that holds its gradient, 1."""
    graph.loss, shape = graph.outputs[0], graph.tensors[graph.outputs[0]].shape
    if math.prod(shape) != 1:
        raise UserError(f"--loss model: the first output, {graph.loss!r}, must be one number; it has shape {shape}")
    graph.outputs = graph.outputs[:1]
    return graph.add_parameter(graph.fresh(f"grad.{graph.loss}"), Parameter(np.ones(shape, np.float32), False))


def _add_loss(graph: Graph, i: int, kind: str, classes: ClassOptions) -> str:
    """The loss of output `i`, with its target."""
    output, key = graph.outputs[i], "y" if len(graph.outputs) == 1 else f"y{i}"
    target, origin = graph.fresh(key), f"the loss of {graph.outputs[i]!r}"
    shape, inputs = graph.tensors[output].shape, [output, target]
    attrs: dict[str, Any] = {}
    if kind in CLASS_LOSSES.values():
        if len(shape) not in (2, 4):
            raise UserError(f"a loss of classes needs an output [N,C] or [N,C,H,W]; {output!r} has shape {shape}")
        graph.add_tensor(target, (shape[0], *shape[2:]), "int32")
        if classes.smoothing:
            attrs["smoothing"] = classes.smoothing
        if classes.ignore is not None:
            attrs["ignore"] = classes.ignore
        if classes.weights or attrs.get("ignore") is not None:
            inputs += _weighing(graph, target, classes, shape[1], attrs, origin)
    else:
        graph.add_tensor(target, shape)
    graph.targets[target] = key
    attrs["count"] = math.prod(graph.tensors[target].shape)
    return graph.add(kind, inputs, attrs=attrs, stem="loss", origin=origin)[0]


def _weighing(
    graph: Graph, target: str, classes: ClassOptions, count: int, attrs: Mapping[str, Any], origin: str
) -> list[str]:
    """The weights of the classes, and the weight of all labels of the batch."""
    weights = np.array(classes.weights or np.ones(count), np.float32)
    if len(weights) != count:
        raise UserError(f"--class-weights: {len(weights)} numbers for the {count} classes of {origin.split()[-1]}")
    name = graph.add_parameter(graph.fresh("class_weights"), Parameter(weights, trainable=False))
    ignored = {key: attrs[key] for key in ("ignore",) if key in attrs}
    return [name, *graph.add("LabelWeight", [target, name], attrs=ignored, stem=f"{target}.weight", origin=origin)]


def _add_gradients(graph: Graph, seed: str) -> None:
    wanted, producers, readers = _depends_on_trained(graph), graph.producers(), graph.consumers()
    partial: dict[str, list[str]] = {graph.loss: [seed]}

    def gradient(name: str) -> str | None:
        parts = partial.get(name, [])
        while len(parts) > 1:
            stem, origin = f"grad.{name}.sum", f"the gradient of {name!r}"
            layer = (producers[name] if name in producers else readers[name][0]).name
            (both,) = graph.add("Add", parts[:2], stem=stem, phase=BACKWARD, origin=origin, layer=layer)
            parts = [both, *parts[2:]]
        return parts[0] if parts else None

    for op in reversed(list(graph.topological())):
        grads = [gradient(name) for name in op.outputs]
        if grads[0] is None or not wanted.intersection(op.inputs):
            continue
        vjp = row(op.kind).vjp
        if vjp is None:
            raise UserError(f"{op.origin or op.name}: {op.kind} has no gradient")
        before = len(graph.ops)
        partials = vjp(graph, op, grads)
        for new in list(graph.ops.values())[before:]:
            graph.replace_op(new, layer=op.name)
        for name, grad in zip(op.inputs, partials, strict=True):
            if grad is not None and name in wanted:
                partial.setdefault(name, []).append(grad)
    for name, parameter in graph.parameters.items():
        found = gradient(name) if parameter.trainable else None
        if found:
            graph.gradients[name] = found


def _depends_on_trained(graph: Graph) -> set[str]:
    wanted = {name for name, parameter in graph.parameters.items() if parameter.trainable}
    for op in graph.topological():
        if wanted.intersection(op.inputs):
            wanted.update(op.outputs)
    return wanted
