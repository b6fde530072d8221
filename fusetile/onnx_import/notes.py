"""What an export for inference lacks, in one line for the user, though it trains as it stands; and merged weights.

Conv(x, onnx::Conv_26, onnx::Conv_27)          PyTorch's older exporter has folded a BatchNormalization into it
Conv(x, c1.weight, c1.weight_bias)             so has the newer one, and the convolution had no bias
"""

from __future__ import annotations

from collections.abc import Collection

import onnx

_DROPS = ("Dropout", "RandomUniformLike", "RandomUniform")


def notes_of(graph: onnx.GraphProto, *, where: str, bn: str, merged: Collection[str] = ()) -> list[str]:
    """At most one line each: that BatchNormalization has been removed, or is in inference form; and that weights are
    `merged` no longer."""
    lines = _norms(graph, where=where, bn=bn)
    if merged:
        lines.append(
            f"{where}: {_count(len(merged), 'weight')}, such as {min(merged)!r}, that the exporter had merged with "
            "others of equal values are trained on their own."
        )
    return lines


def _norms(graph: onnx.GraphProto, *, where: str, bn: str) -> list[str]:
    folded = sum(_is_folded(node) for node in graph.node)
    norms = sum(_is_inference_norm(node) for node in graph.node)
    gone = not any(node.op_type in _DROPS for node in graph.node)
    if folded:
        return [
            f"{where} was exported for inference: BatchNormalization is folded into {_count(folded, 'convolution')}"
            f"{' (Dropout, if the network has any, is gone too)' * gone}; the model trains as it stands. To train them "
            "as well, export as README says under 'Your own model'."
        ]
    if norms and bn == "train":
        return [
            f"{where}: {_count(norms, 'BatchNormalization')} in inference form"
            f"{' (Dropout, if the network has any, is gone)' * gone} will train with the statistics of each batch; "
            "--bn frozen keeps the stored ones."
        ]
    return []


def _is_folded(node: onnx.NodeProto) -> bool:
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or len(node.input) < 3:
        return False
    weight, bias = node.input[1:3]
    renamed = all(name.startswith(f"onnx::{node.op_type}_") for name in (weight, bias))
    return renamed or bias == f"{weight}_bias"


def _is_inference_norm(node: onnx.NodeProto) -> bool:
    """Before opset 14, the training form has more than one output."""
    training = any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)
    return node.op_type == "BatchNormalization" and not training and len(node.output) == 1


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number > 1)}"
