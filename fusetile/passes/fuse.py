"""Fuse an activation into the convolution, fully connected layer or normalization before it: one kernel does both.

    Conv -> z -> Relu -> y        Conv(activation=relu) -> y

Only where nothing else reads z: the gradient of Relu and LeakyRelu reads y.
"""

from __future__ import annotations

from types import MappingProxyType

from fusetile.graph import FORWARD, Graph

_HOSTS = ("Conv", "Gemm", "Normalize")
_ACTIVATIONS = {"Relu": "relu", "LeakyRelu": "leaky_relu"}


def fuse(graph: Graph) -> Graph:
    """The same graph with fewer ops; names of remaining tensors stay."""
    graph = graph.sorted()
    readers, producers, kept = graph.consumers(), graph.producers(), graph.kept()
    for op in list(graph.ops.values()):
        if op.kind not in _ACTIVATIONS or op.phase != FORWARD:
            continue
        host = producers.get(op.inputs[0])
        if host is None or host.kind not in _HOSTS or len(readers[op.inputs[0]]) > 1 or op.inputs[0] in kept:
            continue
        attrs = {**host.attrs, "activation": _ACTIVATIONS[op.kind], "alpha": op.attrs.get("alpha", 0.0)}
        del graph.ops[op.name], graph.tensors[op.inputs[0]]
        fused = graph.replace_op(host, outputs=op.outputs, attrs=MappingProxyType(attrs))
        producers[op.outputs[0]] = fused
        for follower in [other for other in graph.ops.values() if other.layer == op.name]:
            graph.replace_op(follower, layer=host.name)
    return graph.sorted()
