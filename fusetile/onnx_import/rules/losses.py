"""Losses of classes inside a model, whose labels are one of its inputs: for training with the model's own loss."""

from __future__ import annotations

from math import prod

import numpy as np

from fusetile.graph import Parameter
from fusetile.onnx_import.contents import Node
from fusetile.onnx_import.importer import Importer
from fusetile.onnx_import.rules.common import Rule, finish


def of_classes(kind: str) -> Rule:
    """NegativeLogLikelihoodLoss and SoftmaxCrossEntropyLoss: means, or the plain sum, over all labels."""

    def rule(importer: Importer, node: Node) -> None:
        scores, labels = importer.data(node), importer.data(node, 1)
        importer.require_unused(node, node.outputs[1:])
        if labels not in importer.graph.fed():
            raise importer.refuse(node, f"its labels {node.inputs[1]!r} must be an input of the model")
        classes, reduction = importer.shape(scores)[1], str(node.attrs.get("reduction", "mean"))
        attrs = {"count": prod(importer.shape(labels)) if reduction == "mean" else 1}
        ignored = {"ignore": int(node.attrs["ignore_index"])} if "ignore_index" in node.attrs else {}
        weighted = node.has(2) or bool(ignored)
        if reduction not in ("mean", "sum") or (reduction == "sum" and weighted):
            raise importer.refuse(node, f"reduction {reduction!r} is not supported here; only means are")
        inputs = [scores, labels]
        if node.has(2):
            inputs.append(importer.parameter(node, 2, shape=(classes,), trainable=False))
        elif weighted:
            ones = Parameter(np.ones(classes, np.float32), trainable=False)
            inputs.append(importer.graph.add_parameter(importer.fresh("class_weights"), ones))
        if weighted:
            inputs.append(importer.step(node, "label_weight", "LabelWeight", [labels, inputs[2]], ignored))
        finish(importer, node, kind, inputs, attrs | ignored, dims=())

    return rule
