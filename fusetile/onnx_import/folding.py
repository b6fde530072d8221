"""Shape arithmetic: which values of a model are constant once the shapes are known, and what they are.

    Shape(x) -> Gather(., 0) -> Concat(., [-1])     ==>     [4, -1]

A value is constant if it comes from Constant nodes, integer initializers and scalars only, or is a Shape. Initializers
of floats are weights, and nothing that depends on them is constant. But PyTorch's newer exporter, which numbers what it
has computed itself, keeps what it puts into a mask of zeros, such as that of shifted windows, as an initializer val_7.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper

from fusetile.errors import UnsupportedOp

Array = np.ndarray
# op -> the input of which only shape and dtype matter, never the value
SHAPE_ONLY = {"Shape": 0, "Size": 0, "CastLike": 1}
SCATTERS = ("ScatterElements", "ScatterND")
COMPUTED = re.compile(r"val_\d+")
RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")


def is_weight(array: Array) -> bool:
    """Whether an initializer may be something to train."""
    return array.ndim > 0 and array.dtype.kind not in "iubOSU"


def constant_outputs(nodes: Sequence[onnx.NodeProto], initializers: Mapping[str, Array]) -> set[str]:
    """Names of all values that do not depend on the data or on weights, shapes taken as known."""
    constant = {name for name, array in initializers.items() if not is_weight(array)}
    for node in nodes:
        if node.domain not in ("", "ai.onnx") or node.op_type in RANDOM or _has_subgraph(node):
            continue
        ignored = SHAPE_ONLY.get(node.op_type)
        put_in = {name for name in node.input if node.op_type in SCATTERS and COMPUTED.fullmatch(name)}
        known = constant | (put_in & initializers.keys()) if put_in else constant
        if all(name in known for i, name in enumerate(node.input) if name and i != ignored):
            constant.update(name for name in node.output if name)
    return constant


def evaluate(node: onnx.NodeProto, opset: int, values: Mapping[str, Array], *, origin: str) -> dict[str, Array]:
    """Outputs of one node whose inputs are known. Raises UnsupportedOp if it can't be computed."""
    from onnx.reference import ReferenceEvaluator  # takes long to import, and few models need it

    inputs = list(dict.fromkeys(name for name in node.input if name))
    outputs = [name for name in node.output if name]
    infos = [[helper.make_empty_tensor_value_info(name) for name in names] for names in (inputs, outputs)]
    graph = helper.make_graph([node], "constant", *infos)
    try:
        results = ReferenceEvaluator(graph, opsets={"": opset}).run(None, {name: values[name] for name in inputs})
    except Exception as error:
        raise UnsupportedOp(f"{origin}: its value can't be computed while compiling: {error}") from error
    return {name: np.asarray(result) for name, result in zip(outputs, results, strict=True)}


def _has_subgraph(node: onnx.NodeProto) -> bool:
    return any(
        attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute
    )
