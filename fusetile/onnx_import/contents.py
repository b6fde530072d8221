"""What there is in an ONNX model: nodes, inputs, initializers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper

from fusetile.errors import UserError
from fusetile.onnx_import import folding

Array = np.ndarray
COMPOSED = ("Attention", "RMSNormalization", "Swish")
"""What newer opsets define by other ops, and the import takes apart into these."""
_INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
_LABELLED = ("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss")


@dataclass(frozen=True, slots=True)
class Node:
    """An ONNX node as a rule sees it; `inputs[i]` is "" where an optional input is left out."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    origin: str
    opset: int

    def has(self, i: int) -> bool:
        """Whether input `i` is given."""
        return i < len(self.inputs) and self.inputs[i] != ""

    @classmethod
    def of(cls, proto: onnx.NodeProto, opset: int) -> Node:
        """The node of a model with this opset."""
        attrs = {attribute.name: helper.get_attribute_value(attribute) for attribute in proto.attribute}
        attrs = {
            key: value.decode(errors="replace") if isinstance(value, bytes) else value for key, value in attrs.items()
        }
        origin = f"{proto.op_type} node {(proto.name or proto.output[0])!r}"
        return cls(proto.op_type, tuple(proto.input), tuple(proto.output), attrs, origin, opset)


def decomposed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with ops that ONNX defines by others taken apart; how depends on the types of their operands."""
    described = onnx.shape_inference.infer_shapes(model)
    known = (helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in described.graph.initializer)
    described.graph.value_info.extend(known)
    return inliner.inline_selected_functions(described, [("", op) for op in COMPOSED], inline_schema_functions=True)


def live_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes on which an output depends, in the graph's order."""
    wanted = {output.name for output in graph.output}
    live = []
    for node in reversed(graph.node):
        if wanted.intersection(name for name in node.output if name):
            wanted.update(node.input)
            for branch in (attribute.g for attribute in node.attribute if attribute.HasField("g")):
                wanted.update(name for inner in branch.node for name in inner.input)
            live.append(node)
    return live[::-1]


def labels_of(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    """What losses of classes read as labels, and nothing else reads but their shape."""
    reads = [
        (name, node.op_type in _LABELLED and i == 1)
        for node in nodes
        for i, name in enumerate(node.input)
        if folding.SHAPE_ONLY.get(node.op_type) != i
    ]
    return {name for name, labels in reads if labels} - {name for name, labels in reads if not labels}


def initializers_of(graph: onnx.GraphProto, where: str) -> dict[str, Array]:
    """The values of all initializers. Raises UserError for one that can't be read."""
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise UserError(f"{where}: initializer {name!r} is sparse; export the model with dense weights")
    arrays = {}
    for tensor in graph.initializer:
        try:
            arrays[tensor.name] = numpy_helper.to_array(tensor)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{where}: initializer {tensor.name!r} is damaged ({error}); copy or export the model again"
            ) from None
    return arrays


def type_name(number: int) -> str:
    """An element type of ONNX in words."""
    known = number in onnx.TensorProto.DataType.values()
    return onnx.TensorProto.DataType.Name(number).lower() if known else f"of the unknown type {number}"


def input_dims(
    value: onnx.ValueInfoProto, labels: Collection[str], where: str, *, ranks: tuple[int, ...] = (2, 4)
) -> list[int | None]:
    """Sizes of an input, None for a dynamic batch. `ranks`: what it may have of dimensions if it has no labels."""
    tensor = value.type.tensor_type
    place = f"{where}: input {value.name!r}"
    labelled = value.name in labels
    if tensor.elem_type not in (_INTEGERS if labelled else (onnx.TensorProto.FLOAT,)):
        kind = type_name(tensor.elem_type)
        if labelled:
            raise UserError(
                f"{place} is {kind}; the labels of a loss of classes are int64 or int32. For class probabilities "
                "write the loss out: -(targets * log_softmax(y, 1)).sum(1).mean()"
            )
        raise UserError(f"{place} is {kind}; fusetile's inputs are float32: export the model in float32")
    dims = [dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim]
    if len(dims) not in ((1, 3) if labelled else ranks):
        raise UserError(f"{place} has {len(dims)} dimensions; supported are [N, C, H, W] and [N, C]")
    dynamic = [
        f"{(tensor.shape.dim[i].dim_param or '?')!r} (dimension {i})" for i in range(1, len(dims)) if not dims[i]
    ]
    if dynamic:
        raise UserError(
            f"{place} has the dynamic dimensions {', '.join(dynamic)}; only the batch may be dynamic: export with "
            "fixed sizes, or fix them with `python -m onnxruntime.tools.make_dynamic_shape_fixed`"
        )
    return dims
