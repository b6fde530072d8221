"""The network's own name of a weight, by what PyTorch's newer exporter notes at each node.

By default that exporter merges initializers whose numbers are equal, under the name of the first. In a fresh network
all scales of the same width are one and all biases zero; but each node still says what it was made from:

    LayerNormalization(x, ln_1.weight, ln_1.bias)    %p_ln_1_weight, %p_ln_1_bias       they are its own
    LayerNormalization(y, ln_1.weight, ln_1.bias)    %p_ln_2_weight, %p_ln_2_bias       ln_2.weight, ln_2.bias

Two nodes that were made from one parameter share it, whatever its numbers are.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection

import onnx

FLOAT = onnx.TensorProto.FLOAT
NODE, SCOPES = "pkg.torch.onnx.fx_node", "pkg.torch.onnx.name_scopes"
_PARAMETER = re.compile(r"%[pb]_(\w+)")
_LAYERS = (
    "BatchNormalization",
    "Conv",
    "ConvTranspose",
    "Gemm",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "PRelu",
)
"""What takes a network's parameters one by one behind x, in the network's order."""


def merged_uses(graph: onnx.GraphProto) -> dict[tuple[int, int], tuple[str, str]]:
    """(node, input) -> (initializer, the name it should have), where an initializer stands for several parameters and
    this use is of another one than it is named after."""
    initializers = {tensor.name for tensor in graph.initializer if tensor.dims and tensor.data_type == FLOAT}
    made_from: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)
    for number, node in enumerate(graph.node):
        parameters = _parameters(node)
        for i, name in enumerate(node.input):
            if parameters and name in initializers:
                made_from[name][number, i] = _nth(node.op_type, i, parameters)
    known = {_flat(name): name for name in initializers}
    paths = _paths(graph)
    found = {}
    for name, uses in made_from.items():
        if len(set(uses.values()) - {""}) > 1:
            own = _flat(name) in uses.values()
            for use, parameter in uses.items():
                if parameter not in ("", _flat(name)):
                    found[use] = (
                        name,
                        known.get(parameter) or _named(parameter, paths) if own else f"{name}.{parameter}",
                    )
    return found


def _parameters(node: onnx.NodeProto) -> list[str]:
    """The network's parameters that a node was made from, with _ in place of dots."""
    return _PARAMETER.findall(_noted(node, NODE))


def _noted(node: onnx.NodeProto, key: str) -> str:
    return next((entry.value for entry in node.metadata_props if entry.key == key), "")


def _nth(op: str, i: int, parameters: list[str]) -> str:
    """The parameter that input `i` is, "" if it is none. A linear layer becomes MatMul and Add."""
    if op in _LAYERS:
        return parameters[i - 1] if 1 <= i <= len(parameters) else ""
    return parameters[-1 if op == "Add" else 0]


def _flat(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _paths(graph: onnx.GraphProto) -> list[str]:
    """The modules that names of parameters, and notes of nodes, tell of; the longest first."""
    names = [tensor.name for tensor in graph.initializer]
    found = {name[:at] for name in names for at, letter in enumerate(name) if letter == "."}
    found.update(path for node in graph.node for path in re.findall(r"'([\w.]+)'", _noted(node, SCOPES)))
    return sorted(found, key=len, reverse=True)


def _named(parameter: str, paths: Collection[str]) -> str:
    """A parameter with its dots, as far as other names tell where they are."""
    for path in paths:
        if parameter.startswith(f"{_flat(path)}_"):
            return f"{path}.{parameter[len(path) + 1 :]}"
    return parameter
