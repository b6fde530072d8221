"""ONNX models in a few lines, and ONNX Runtime as the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str | None]


def node(kind: str, inputs: str, outputs: str, name: str = "", **attrs: Any) -> onnx.NodeProto:
    """A node; operands are separated by spaces, `_` is an optional one left out."""
    names = [["" if name == "_" else name for name in operands.split()] for operands in (inputs, outputs)]
    return helper.make_node(kind, *names, name=name, **attrs)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    outputs: Sequence[str] = ("y",),
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    opset: int = 17,
    input_type: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model; the shapes of its outputs are inferred where that is possible."""
    versions = {"": opset} | {proto.domain: 1 for proto in nodes if proto.domain}
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, input_type, list(shape)) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid(*version) for version in versions.items()])
    proto.ir_version = 8
    inferred = onnx.shape_inference.infer_shapes(proto)
    for declared, found in zip(proto.graph.output, inferred.graph.output, strict=True):
        declared.CopyFrom(found)
        declared.type.tensor_type.shape.SetInParent()
    return proto


def save(proto: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    """Write without checking."""
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Seeded float32 values."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def for_inference(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every training form of BatchNormalization and Dropout turned into the inference form."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for proto_node in copy.graph.node:
        if proto_node.op_type == "BatchNormalization":
            kept = [attribute for attribute in proto_node.attribute if attribute.name != "training_mode"]
            del proto_node.attribute[:]
            proto_node.attribute.extend(kept)
            del proto_node.output[1:]
        elif proto_node.op_type == "Dropout":
            proto_node.op_type = "Identity"
            del proto_node.attribute[:], proto_node.input[1:], proto_node.output[1:]
    return copy


def run_ort(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs by ONNX Runtime, without its graph optimizations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))
