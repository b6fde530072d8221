"""Add the loss and the backward ops: reverse-mode differentiation of the whole graph, once, before it is cut.

    x -> Conv(w) -> y          x -> Conv(w) -> y -> CrossEntropy(target) -> loss
                                                 -> CrossEntropyGrad -> grad.y
                               ConvWeightGrad(x, grad.y) -> grad.w

Every op kind's gradient rule is in its row of the op table. Where a tensor is read several times its gradients are
added.
Source: Griewank and Walther, Evaluating Derivatives, chapter 3 (the reverse mode).
"""

from __future__ import annotations

from fusetile.errors import UserError
from fusetile.graph import BACKWARD, Graph
from fusetile.ops import row
from fusetile.ops.loss import LOSSES


def differentiate(graph: Graph, *, loss: str) -> Graph:
    """`loss`: a name in `LOSSES`, applied to every output with its own target; several are added up.

    Targets are named `y`, or `y0`, `y1`, ... in the order of the outputs. Raises UserError where there is nothing to
    train or the loss does not fit an output.
    """
    graph = graph.copy()
    if loss not in LOSSES:
        raise UserError(f"unknown loss {loss!r}: choose one of {', '.join(sorted(LOSSES))}")
    if not any(parameter.trainable for parameter in graph.parameters.values()):
        raise UserError(f"{graph.name}: no float32 initializer is the weight of a layer, so there is nothing to train")
    graph.loss = _add_loss(graph, LOSSES[loss])
    _add_gradients(graph)
    return graph


def _add_loss(graph: Graph, kind: str) -> str:
    parts: list[str] = []
    for i, output in enumerate(graph.outputs):
        shape = graph.tensors[output].shape
        target = graph.fresh("y" if len(graph.outputs) == 1 else f"y{i}")
        key = "y" if len(graph.outputs) == 1 else f"y{i}"
        if kind == "CrossEntropy":
            if len(shape) not in (2, 4):
                raise UserError(f"cross-entropy needs an output [N,C] or [N,C,H,W]; {output!r} has shape {shape}")
            graph.add_tensor(target, (shape[0], *shape[2:]), "int32")
            count = graph.tensors[target].shape
        else:
            graph.add_tensor(target, shape)
            count = shape
        graph.targets[target] = key
        size = 1
        for extent in count:
            size *= extent
        parts += graph.add(kind, [output, target], attrs={"count": size}, stem="loss", origin=f"the loss of {output!r}")
    total = parts[0]
    for part in parts[1:]:
        (total,) = graph.add("Add", [total, part], stem="loss.sum", origin="the sum of the losses")
    return total


def _add_gradients(graph: Graph) -> None:
    wanted, producers, readers = _depends_on_trained(graph), graph.producers(), graph.consumers()
    partial: dict[str, list[str]] = {graph.loss: [graph.loss]}  # the gradient of the loss is 1; no rule reads it

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
