"""Fuse an activation into the convolution, fully connected layer or normalization before it: one kernel does both.

    Conv -> z -> Relu -> y                      Conv(activation=relu) -> y
    ReluGrad(dy, y) -> dz                       NormalizeMoments(dy, x, ..., activation=relu)
    NormalizeMoments(dz, x, ...)                NormalizeInputGrad(dy, x, ..., activation=relu)
    NormalizeInputGrad(dz, x, ...)

Forward only where nothing else reads z: the gradient of Relu and LeakyRelu reads y. Backward the normalization's
gradient ops find the sign of y by themselves.
"""

from __future__ import annotations

from types import MappingProxyType

from fusetile.graph import FORWARD, Graph

_HOSTS = ("Conv", "Gemm", "Normalize")
_ACTIVATIONS = {"Relu": "relu", "LeakyRelu": "leaky_relu"}
_GRADIENTS = ("ReluGrad", "LeakyReluGrad")


def fuse(graph: Graph) -> Graph:
    """The same graph with fewer ops; names of remaining tensors stay."""
    graph = graph.sorted()
    _fuse_forward(graph)
    _fuse_backward(graph)
    return graph.sorted()


def _fuse_forward(graph: Graph) -> None:
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


def _fuse_backward(graph: Graph) -> None:
    readers, producers, kept = graph.consumers(), graph.producers(), graph.kept()
    for op in list(graph.ops.values()):
        host = producers.get(op.inputs[1]) if op.kind in _GRADIENTS else None
        if host is None or host.kind != "Normalize" or not host.attrs.get("activation") or op.outputs[0] in kept:
            continue
        following = readers[op.outputs[0]]
        if {reader.kind for reader in following} != {"NormalizeMoments", "NormalizeInputGrad"}:
            continue
        _, _, gamma, beta = host.inputs
        activation = {key: host.attrs[key] for key in ("activation", "alpha")}
        for reader in following:
            affine = [gamma, beta] if reader.kind == "NormalizeMoments" else [beta]
            inputs = (op.inputs[0], *reader.inputs[1:], *affine)
            graph.replace_op(reader, inputs=inputs, attrs=MappingProxyType({**reader.attrs, **activation}))
        graph.remove(op)
