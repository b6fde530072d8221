"""The walk over an ONNX model: inputs and batch, the rule of each node, outputs."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import inliner, numpy_helper

from fusetile.errors import UnsupportedOp, UserError
from fusetile.graph import Graph
from fusetile.onnx_import import files, folding
from fusetile.onnx_import.affine import join_affine
from fusetile.onnx_import.contents import COMPOSED, Node, decomposed, input_dims
from fusetile.onnx_import.importer import Importer
from fusetile.onnx_import.notes import notes_of
from fusetile.onnx_import.rules import RULES
from fusetile.onnx_import.rules.unpool import follow
from fusetile.onnx_import.unshare import unshare


def import_onnx(
    path: str | Path,
    *,
    batch: int | None = None,
    bn: Literal["train", "frozen"] = "train",
    dropout: float | None = None,
    seed: int = 0,
    loss: str | Path | None = None,
) -> Graph:
    """The forward graph of an ONNX file, with the running statistics' updates of its BatchNormalizations.

    batch    binds the first dimension of every input, also where the model has another number there. By default the
             model's own number, or 1 if it is dynamic.
    bn       "train": statistics of the batch, and running statistics by ONNX's rule; "frozen": the stored statistics.
             The nodes' own training_mode does not matter.
    dropout  overrides the ratio of every Dropout. Dropout always drops, whatever training_mode says.
    seed     of the dropout masks; their step counter is the control tensor "step".
    loss     an ONNX file that follows the model: its first output is the graph's only one (see appended.py).

    Tensors keep their ONNX names; `notes` say what an export for inference lacks and which weights it had merged.
    Raises UserError if the file can't be read, is no valid model, or has a dynamic dimension other than the batch;
    UnsupportedOp, naming all nodes concerned, if an op can't be trained.
    """
    where = str(path)
    original = files.read_model(path)
    model = unshare(original)
    if model.functions:
        model = inliner.inline_local_functions(model)
    if any(node.op_type in COMPOSED for node in model.graph.node):
        model = decomposed(model)
    opset = files.opset_of(model, where)
    importer = Importer(model, where=where, opset=opset, bn=bn, dropout=dropout, seed=seed)
    refuse_unsupported(importer)
    files.check_model(model, where)
    bind_inputs(importer, batch)
    translate(importer)
    trained = {parameter.onnx_name for parameter in importer.graph.parameters.values() if parameter.trainable}
    merged = trained - {tensor.name for tensor in original.graph.initializer}
    importer.graph.notes = notes_of(model.graph, where=where, bn=bn, merged=merged)
    if loss is not None:
        from fusetile.onnx_import.appended import append_loss  # which needs this file

        append_loss(importer, loss)
    join_affine(importer.graph)
    return importer.graph


def refuse_unsupported(importer: Importer) -> None:
    """Raise UnsupportedOp that names every op without a rule, if there is one."""
    refused: dict[str, list[str]] = {}
    for node in importer.nodes:
        standard = node.domain in ("", "ai.onnx")
        if not all(name in importer.constant for name in node.output if name) and not (
            standard and (node.op_type in RULES or (node.op_type == "If" and node.input[0] in importer.constant))
        ):
            label = node.op_type if standard else f"{node.domain}::{node.op_type}"
            refused.setdefault(label, []).append(repr(node.name or node.output[0]))
    if refused:
        noise = "; make that noise an input of the model"
        lines = [
            f"{label} ({'node' if len(names) == 1 else 'nodes'} {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
            f"{noise * label.startswith('RandomNormal')})"
            for label, names in sorted(refused.items())
        ]
        raise UnsupportedOp(
            f"{importer.where}: can't train {'; '.join(lines)}. Supported ops: {', '.join(sorted(RULES))}, and "
            "Constant and arithmetic on constants and shapes"
        )


def bind_inputs(importer: Importer, batch: int | None) -> None:
    """Declare the data inputs, their first dimension bound to the batch."""
    inputs = [value for value in importer.proto.input if value.name not in importer.initializers]
    if not inputs or not importer.proto.output:
        raise UserError(f"{importer.where}: the model has no {'outputs' if inputs else 'inputs for data'}")
    shapes = {value.name: input_dims(value, importer.labels, importer.where) for value in inputs}
    baked = {name: shape[0] for name, shape in shapes.items() if shape[0] is not None}
    if len(set(baked.values())) > 1:
        raise UserError(
            f"{importer.where}: the first dimension must be the batch, but the inputs differ in it: {baked}"
        )
    importer.baked_batch = next(iter(baked.values()), None)
    importer.batch = batch if batch is not None else importer.baked_batch or 1
    if importer.batch < 1:
        raise UserError(f"the batch size must be at least 1, not {importer.batch}")
    for name, shape in shapes.items():
        sizes = [importer.batch, *(size for size in shape[1:] if size is not None)]
        dtype = "int32" if name in importer.labels else "float32"
        importer.graph.inputs.append(importer.graph.add_tensor(name, sizes, dtype))


def translate(importer: Importer) -> None:
    """Translate the nodes, in their (topological) order, and name the outputs."""
    _walk(importer, importer.nodes)
    for value in importer.proto.output:
        importer.graph.outputs.append(_output(importer, value.name))


def _walk(importer: Importer, nodes: Sequence[onnx.NodeProto]) -> None:
    for proto in nodes:
        node = Node.of(proto, importer.opset)
        if all(name in importer.constant for name in proto.output if name):
            _fold(importer, proto, node)
        elif node.kind == "If":
            _choose(importer, node)
        elif any(importer.resolved(name) in importer.places for name in node.inputs):
            follow(importer, node, proto)
        elif node.kind not in RULES:
            raise importer.refuse(node, "the op is not supported")
        elif any(node.outputs):
            RULES[node.kind](importer, node)


def _choose(importer: Importer, node: Node) -> None:
    """The branch of an If whose condition is known, in its place."""
    chosen = bool(importer.constant_input(node, 0, "condition").reshape(()))
    branch: onnx.GraphProto = node.attrs["then_branch" if chosen else "else_branch"]
    importer.initializers |= {tensor.name: numpy_helper.to_array(tensor) for tensor in branch.initializer}
    importer.find_constants(branch.node)
    importer.uses.update(name for inner in branch.node for name in inner.input)
    _walk(importer, branch.node)
    for output, inner in zip(node.outputs, branch.output, strict=True):
        importer.alias[output] = inner.name


def _fold(importer: Importer, proto: onnx.NodeProto, node: Node) -> None:
    known = ChainMap(importer.values, importer.initializers)
    values = {name: known[name] for name in node.inputs if name in known}
    if (described := folding.SHAPE_ONLY.get(node.kind)) is not None and node.inputs[described] not in values:
        name = node.inputs[described]
        values[name] = np.broadcast_to(np.float32(0), importer.known_shape(name))
    importer.values |= folding.evaluate(proto, importer.opset, values, origin=f"{importer.where}: {node.origin}")


def _output(importer: Importer, name: str) -> str:
    """An output keeps its name."""
    source = importer.resolved(name)
    node = Node("Identity", (name,), (name,), {}, f"output {name!r}", importer.opset)
    if source in importer.views:
        view = importer.views[source]
        if len(view.dims) > 4:  # raw heads of detectors: kept with the last dimensions as one
            flat = view.reshaped((*view.shape[:3], prod(view.shape[3:])))
            assert flat is not None  # neighbours can always be put together
            view = flat
        source = importer.tensor(node, view, name) if view.dims else view.base  # a scalar has dimensions of 1 there
    if source in importer.places:
        raise importer.refuse(node, "it is the indices of a MaxPool; only unpooling by them is supported")
    if source not in importer.graph.tensors or source in importer.graph.parameters:
        raise UserError(f"{importer.where}: output {name!r} does not depend on the model's inputs")
    if source != name:
        importer.graph.add("Identity", [source], outputs=[name], origin=node.origin)
    return name
