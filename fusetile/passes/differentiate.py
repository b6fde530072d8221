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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusetile.errors import UserError
from fusetile.graph import BACKWARD, Graph, LossTerm, Parameter
from fusetile.ops import row
from fusetile.ops.loss import CLASS_LOSSES, LOSSES
from fusetile.yolo import LOSS as YOLO

DICE, MODEL = "dice", "model"
"""Losses that are no op of their own: one is made of several, one is part of the model."""
ANCHORS = (1.3221, 1.73145, 3.19275, 4.00944, 5.05587, 8.09892, 9.47112, 4.84053, 11.2364, 10.0071)
"""Widths and heights in cells: darknet's yolov2-voc.cfg, clusters of the boxes of Pascal VOC in a grid of 13x13."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassOptions:
    """What counts how much in cross-entropy and nll. `ignore`: the label of spots that do not count; `weights`: one per
    class; `smoothing`: the part of a label that is spread over all classes (cross-entropy only)."""

    ignore: int | None = None
    weights: tuple[float, ...] = ()
    smoothing: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxOptions:
    """What yolov2 goes by. `anchors`: w0, h0, w1, h1, ... in cells; `factors` of the terms coord, object, noobject and
    class, by default those of arXiv 1506.02640; `most`: how many true boxes an image has room for."""

    anchors: tuple[float, ...] = ANCHORS
    factors: tuple[float, ...] = (5.0, 1.0, 0.5, 1.0)
    most: int = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """What is minimised. `loss`: a name in `LOSSES`, "dice" or "yolov2", applied to every output with its own target;
    several are added up, times their `weights` if there are some. Or "model": the first output is the loss, and the
    others do not matter."""

    loss: str
    classes: ClassOptions = ClassOptions()
    boxes: BoxOptions = BoxOptions()
    weights: tuple[float, ...] = ()

    def check(self, outputs: int) -> None:
        """Raises UserError for what does not go together, or does not fit a model with so many outputs."""
        loss, classes = self.loss, self.classes
        if loss not in (names := sorted((*LOSSES, DICE, YOLO, MODEL))):
            raise UserError(f"unknown loss {loss!r}: choose one of {', '.join(names)}")
        if classes != ClassOptions() and loss not in CLASS_LOSSES:
            raise UserError(
                f"--ignore-index, --class-weights and --label-smoothing don't fit --loss {loss}: it has no classes"
            )
        if classes.smoothing and loss != "cross-entropy":
            raise UserError(f"--label-smoothing needs --loss cross-entropy, not {loss}")
        if self.boxes != BoxOptions() and loss != YOLO:
            raise UserError(f"--anchors, --lambdas and --max-boxes don't fit --loss {loss}: it has no boxes")
        if self.weights and (loss == MODEL or len(self.weights) != outputs):
            losses = "a loss that is in the model" if loss == MODEL else f"the losses of {outputs} output(s)"
            raise UserError(f"--loss-weights: {len(self.weights)} numbers for {losses}")


def differentiate(graph: Graph, criterion: Criterion) -> Graph:
    """The graph with its loss (see `add_loss`) and gradients. Raises UserError where there is nothing to train or the
    loss does not fit an output."""
    if not any(parameter.trainable for parameter in graph.parameters.values()):
        raise UserError(f"{graph.name}: no float32 initializer is the weight of a layer, so there is nothing to train")
    graph = add_loss(graph, criterion)
    seeded = criterion.loss in (DICE, MODEL) or criterion.weights
    _add_gradients(graph, _seed(graph) if seeded else graph.loss)
    return graph


def add_loss(graph: Graph, criterion: Criterion) -> Graph:
    """The graph with its loss. Targets are named `y`, or `y0`, `y1`, ... in the order of the outputs. Raises UserError
    if the loss does not fit an output."""
    criterion.check(len(graph.outputs))
    graph = graph.copy()
    if criterion.loss == MODEL:
        graph.outputs = graph.outputs[:1]
        graph.loss, shape = graph.outputs[0], graph.tensors[graph.outputs[0]].shape
        if math.prod(shape) != 1:
            raise UserError(f"--loss model: the first output, {graph.loss!r}, must be one number; it has shape {shape}")
        graph.terms = [LossTerm(graph.loss)]
        return graph
    add: Callable[[int], LossTerm] = {
        DICE: lambda i: _add_dice(graph, i),
        YOLO: lambda i: _add_yolo(graph, i, criterion.boxes),
    }.get(criterion.loss, lambda i: _add_loss(graph, i, LOSSES[criterion.loss], criterion.classes))
    graph.terms = [add(i) for i in range(len(graph.outputs))]
    for i, weight in enumerate(criterion.weights):
        (scaled,) = graph.add("Scale", [graph.terms[i].loss], attrs={"factor": weight}, origin="the weight of a loss")
        graph.terms[i] = replace(graph.terms[i], loss=scaled, factor=weight)
    graph.loss = graph.terms[0].loss
    for term in graph.terms[1:]:
        (graph.loss,) = graph.add("Add", [graph.loss, term.loss], stem="loss.sum", origin="the sum of the losses")
    return graph


def _seed(graph: Graph) -> str:
    """A tensor that holds the gradient of the loss, 1. The rules of `LOSSES` do without."""
    one = np.ones(graph.tensors[graph.loss].shape, np.float32)
    return graph.add_parameter(graph.fresh(f"grad.{graph.loss}"), Parameter(one, trainable=False), kind="map")


def _add_target(graph: Graph, i: int, shape: Sequence[int], dtype: str = "float32") -> str:
    """The target of output `i`."""
    key = "y" if len(graph.outputs) == 1 else f"y{i}"
    target = graph.add_tensor(graph.fresh(key), shape, dtype)
    graph.targets[target] = key
    return target


def _add_dice(graph: Graph, i: int) -> LossTerm:
    """1 - (2 sum of p t + 1) / (sum of p + sum of t + 1), p = sigmoid(y), per channel over the whole batch; the mean
    of all channels. Source: Milletari, Navab, Ahmadi, V-Net (2016), with 1 added for classes that are nowhere."""
    output, origin = graph.outputs[i], f"the loss of {graph.outputs[i]!r}"
    shape = graph.tensors[output].shape
    if len(shape) < 2:
        raise UserError(f"--loss dice needs an output [N,C,...]; {output!r} has shape {shape}")
    target, channels = _add_target(graph, i, shape), (1, shape[1], *(1,) * (len(shape) - 2))

    def add(kind: str, inputs: Sequence[str], **attrs: Any) -> str:
        return graph.add(kind, inputs, attrs=attrs, stem=f"dice.{kind.lower()}", origin=origin)[0]

    p = add("Sigmoid", [output])
    products = add("SumTo", [p, target], shape=channels)
    common = add("Shift", [add("Scale", [products], factor=2.0)], offset=1.0)
    both = add("Add", [add("SumTo", [p], shape=channels), add("SumTo", [target], shape=channels)])
    score = add("SumTo", [add("Div", [common, add("Shift", [both], offset=1.0)])], shape=(1,))
    loss = add("Shift", [add("Scale", [score], factor=-1 / shape[1])], offset=1.0)
    return LossTerm(loss, op=graph.producers()[products].name)


def _add_yolo(graph: Graph, i: int, options: BoxOptions) -> LossTerm:
    """The loss of output `i`, with its true boxes."""
    output, origin = graph.outputs[i], f"the loss of {graph.outputs[i]!r}"
    shape = graph.tensors[output].shape
    if len(shape) != 4:
        raise UserError(
            f"--loss {YOLO} needs an output [N, anchors * (5 + classes), H, W]; {output!r} has shape {shape}"
        )
    boxes = _add_target(graph, i, (shape[0], options.most, 5))
    attrs = {"anchors": options.anchors, "factors": options.factors, "count": shape[0]}
    (loss,) = graph.add("YoloV2", [output, boxes], attrs=attrs, stem="loss", origin=origin)
    return LossTerm(loss, op=graph.producers()[loss].name)


def _add_loss(graph: Graph, i: int, kind: str, classes: ClassOptions) -> LossTerm:
    """The loss of output `i`, with its target."""
    output, origin = graph.outputs[i], f"the loss of {graph.outputs[i]!r}"
    shape = graph.tensors[output].shape
    attrs: dict[str, Any] = {}
    if kind in CLASS_LOSSES.values():
        if len(shape) not in (2, 4):
            raise UserError(f"a loss of classes needs an output [N,C] or [N,C,H,W]; {output!r} has shape {shape}")
        inputs = [output, _add_target(graph, i, (shape[0], *shape[2:]), "int32")]
        if classes.smoothing:
            attrs["smoothing"] = classes.smoothing
        if classes.ignore is not None:
            attrs["ignore"] = classes.ignore
        if classes.weights or classes.ignore is not None:
            inputs += _weighing(graph, inputs[1], classes, shape[1], attrs, origin)
    else:
        inputs = [output, _add_target(graph, i, shape)]
    attrs["count"] = math.prod(graph.tensors[inputs[1]].shape)
    (loss,) = graph.add(kind, inputs, attrs=attrs, stem="loss", origin=origin)
    return LossTerm(loss, weight=inputs[3] if len(inputs) > 2 else "", op=graph.producers()[loss].name)


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
            reader = next(op for op in readers[name] if op.outputs[0] in partial)  # others lead nowhere
            layer = producers.get(name, reader).name
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
