"""Take apart initializers that an exporter merged because their first values are equal.

By default, PyTorch's newer exporter merges them under one name; the older one, but for training, by Identity nodes.
In a fresh network all scales and running variances are one, all biases and running means zero:

    bn1(x, one, zero, zero, one)      ==>      bn1(x, one, zero, bn1.running_mean, bn1.running_var)
    bn2(y, one, zero, zero, one)               bn2(y, bn2.weight, bn2.bias, bn2.running_mean, bn2.running_var)

    norm2.bias = Identity(norm1.bias)  ==>     an initializer norm2.bias of its own, if all its numbers are equal

Training that model as it says would tie weights that the network does not tie. What the newer exporter notes at its
nodes tells exactly (see origins.py). Else: no network ties a running statistic to anything in another role; so where
one is, values were merged, and each use gets a copy. Names that Identity nodes kept come back; but an Identity of
numbers that differ among themselves is of weights that a network ties, and stays. So does what is shared without
these signs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import onnx
from onnx import numpy_helper

from fusetile.onnx_import.origins import merged_uses

STATISTICS = (3, 4)
ROLES = {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var"}


def unshare(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, or a changed copy in which merged initializers are apart again."""
    if others := merged_uses(model.graph):
        model = _apart(model, others)
    merged = _merged_roots(model)
    if not merged and not _even(model.graph):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _drop_identities(copy.graph, everything=bool(merged))
    _copy_per_use(copy.graph, merged)
    return copy


def _apart(model: onnx.ModelProto, others: Mapping[tuple[int, int], tuple[str, str]]) -> onnx.ModelProto:
    """A copy in which (node, input) reads a copy of an initializer, by (initializer, name of the copy)."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in copy.graph.initializer}
    names = {name for node in copy.graph.node for name in (*node.input, *node.output)} | set(tensors)
    made: dict[tuple[str, str], str] = {}
    for (number, i), (name, wanted) in others.items():
        if (name, wanted) not in made:
            made[name, wanted] = _unused(wanted, names)
            _add_copy(copy.graph, tensors[name], made[name, wanted])
        copy.graph.node[number].input[i] = made[name, wanted]
    return copy


def _roots(graph: onnx.GraphProto) -> dict[str, str]:
    """Initializers, and what Identity nodes make of them -> the initializer."""
    roots = {tensor.name: tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if _copied(node) in roots:
            roots[node.output[0]] = roots[_copied(node)]
    return roots


def _merged_roots(model: onnx.ModelProto) -> set[str]:
    """The initializers that BatchNormalizations use, if one of them serves as a statistic and as something else."""
    roots = _roots(model.graph)
    roles: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for node in model.graph.node:
        if node.op_type != "Identity":
            for i, name in enumerate(node.input):
                if name in roots:
                    roles[roots[name]].add((node.op_type, i))
    norms = {name: used for name, used in roles.items() if any(op == "BatchNormalization" for op, _ in used)}
    statistics = {("BatchNormalization", i) for i in STATISTICS}
    return set(norms) if any(used & statistics and len(used) > 1 for used in norms.values()) else set()


def _even(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Initializers that Identity nodes copy and whose numbers are all the same, as they are before training."""
    wanted = {_copied(node) for node in graph.node}
    found = {}
    for tensor in graph.initializer:
        if tensor.name not in wanted:
            continue
        try:
            values = numpy_helper.to_array(tensor)
        except (ValueError, TypeError, KeyError):  # damaged: reading the initializers says so
            continue
        if values.size and (values == values.flat[0]).all():
            found[tensor.name] = tensor
    return found


def _drop_identities(graph: onnx.GraphProto, *, everything: bool) -> None:
    """Initializers in the place of Identity nodes that copy one, or one whose numbers are all the same."""
    tensors = {tensor.name: tensor for tensor in graph.initializer} if everything else _even(graph)
    outputs = {output.name for output in graph.output}
    for node in list(graph.node):
        if _copied(node) in tensors and node.output[0] not in outputs:
            tensors[node.output[0]] = _add_copy(graph, tensors[_copied(node)], node.output[0])
            graph.node.remove(node)


def _copy_per_use(graph: onnx.GraphProto, merged: set[str]) -> None:
    """The first use of an initializer keeps it; every other gets a copy, named after its node."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    names = {name for node in graph.node for name in (*node.input, *node.output)} | set(tensors)
    seen: set[str] = set()
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name not in merged:
                continue
            if name in seen:
                role = ROLES.get(i, f"input{i}") if node.op_type == "BatchNormalization" else f"input{i}"
                node.input[i] = _unused(f"{node.name or node.output[0]}.{role}", names)
                _add_copy(graph, tensors[name], node.input[i])
            seen.add(name)


def _copied(node: onnx.NodeProto) -> str:
    """What an Identity node copies."""
    return node.input[0] if node.op_type == "Identity" and len(node.input) == len(node.output) == 1 else ""


def _add_copy(graph: onnx.GraphProto, tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    copy = graph.initializer.add()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def _unused(stem: str, names: set[str]) -> str:
    name, number = stem, 1
    while name in names:
        name, number = f"{stem}.{number}", number + 1
    names.add(name)
    return name
