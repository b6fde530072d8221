"""A loss that is an ONNX file of its own: its nodes behind those of the network.

model.onnx: x -> ... -> logits        loss.onnx: (prediction, target) -> ... -> loss
prediction is logits, and target comes from the data
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import onnx
from onnx import compose, inliner

from fusetile.errors import UserError
from fusetile.onnx_import import files
from fusetile.onnx_import.contents import input_dims, type_name
from fusetile.onnx_import.importer import Importer
from fusetile.onnx_import.walk import refuse_unsupported, translate


def append_loss(network: Importer, path: str | Path) -> None:
    """Let the first output of the model in `path` be the only output of an imported network's graph. What the model
    holds of weights is not trained, and of what it draws at random nothing is dropped.

    An input that has the name of one of the network's outputs, and fits its shape, is that output; if there is none,
    the first inputs are the outputs, in order. Another one with the name of an input of the network is that. The rest
    are targets. Raises UserError where something does not fit.
    """
    where, graph = str(path), network.graph
    model = files.read_model(path)
    if model.functions:
        model = inliner.inline_local_functions(model)
    if not model.graph.output:
        raise UserError(f"{where}: the model has no outputs, so there is no loss")
    del model.graph.output[1:]
    prefix = "loss/"
    while any(name.startswith(prefix) for name in (*graph.tensors, *network.reserved)):
        prefix = f"_{prefix}"
    compose.add_prefix(model, prefix, rename_nodes=False, inplace=True)
    importer = Importer(model, where=where, opset=files.opset_of(model, where), bn="frozen", dropout=0.0, seed=0)
    refuse_unsupported(importer)
    files.check_model(model, where)
    importer.graph, importer.batch = graph, network.batch
    importer.views, importer.alias = dict(network.views), dict(network.alias)
    before = set(graph.parameters)
    _bind(importer, network, prefix)
    graph.outputs = []
    translate(importer)
    (loss,) = graph.outputs
    if prod(graph.tensors[loss].shape) != 1:
        shape = importer.known_shape(loss)
        raise UserError(f"{where}: the loss, its first output {loss[len(prefix) :]!r}, must be one number, not {shape}")
    for name in set(graph.parameters) - before:
        graph.parameters[name] = replace(graph.parameters[name], trainable=False)


def _bind(importer: Importer, network: Importer, prefix: str) -> None:
    """Say what every input is, also to the user."""
    inputs = {
        value.name[len(prefix) :]: value for value in importer.proto.input if value.name not in importer.initializers
    }
    outputs, graph = [value.name for value in network.proto.output], network.graph
    known = {name: name for name, value in inputs.items() if name in outputs and _fits(value, network, name)}
    if not known:
        if len(inputs) < len(outputs):
            raise UserError(
                f"{importer.where} has {len(inputs)} inputs, and the network {len(outputs)} outputs: it needs an input "
                f"for each of them, in order, or inputs with the names of some ({', '.join(outputs)})"
            )
        known = dict(zip(inputs, outputs, strict=False))
    known |= {
        name: name
        for name, value in inputs.items()
        if name not in known and name in graph.inputs and _fits(value, network, name)
    }
    for name, value in inputs.items():
        if name not in known:
            dims = input_dims(value, importer.labels, importer.where, ranks=(2, 3, 4))
            dtype = "int32" if value.name in importer.labels else "float32"
            shape = [importer.batch, *(size for size in dims[1:] if size is not None)]
            graph.targets[graph.add_tensor(value.name, shape, dtype)] = name
        elif not _fits(value, network, known[name]):
            raise UserError(
                f"{importer.where}: its input {name!r} is to be {known[name]!r} of the network, which is float32 of "
                f"shape {network.known_shape(known[name])}; it wants {_described(value)}"
            )
        else:
            importer.alias[value.name] = known[name]
    importer.baked_batch = next((dim for value in inputs.values() if (dim := _dims(value)[:1])), [0])[0] or None
    targets = ", ".join(repr(name) for name in inputs if name not in known) or "nothing"
    bound = ", ".join(f"{name!r} is {source!r} of the network" for name, source in known.items())
    graph.notes.append(f"{importer.where}: {bound}; from the data comes {targets}.")


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    """Sizes, 0 where they may be any."""
    return [max(dim.dim_value, 0) for dim in value.type.tensor_type.shape.dim]


def _fits(value: onnx.ValueInfoProto, network: Importer, name: str) -> bool:
    """Whether an input may be this tensor of the network, whatever the batch."""
    if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        return False
    if not value.type.tensor_type.HasField("shape"):
        return True
    dims, shape = _dims(value), network.known_shape(name)
    return len(dims) == len(shape) and all(dim in (0, size) for dim, size in zip(dims[1:], shape[1:], strict=True))


def _described(value: onnx.ValueInfoProto) -> str:
    sizes = ["batch", *(str(dim or "any") for dim in _dims(value)[1:])]
    return f"{type_name(value.type.tensor_type.elem_type)} of shape ({', '.join(sizes)})"
