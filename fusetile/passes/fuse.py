"""Fuse an activation into the convolution, fully connected layer or normalization before it: one kernel does both.

    Conv -> z -> Relu -> y                      Conv(activation=relu) -> y
    ReluGrad(dy, y) -> dz                       NormalizeMoments(dy, x, ..., activation=relu)
    NormalizeMoments(dz, x, ...)                NormalizeInputGrad(dy, x, ..., activation=relu)
    NormalizeInputGrad(dz, x, ...)

    MaxPoolGrad(dp, argmax) -> dy               PooledNormalizeMoments(dp, argmax, x, ...)
    NormalizeMoments(dy, x, ...)                PooledNormalizeInputGrad(dp, argmax, x, ...)
    NormalizeInputGrad(dy, x, ...)

Only where nothing else reads z, or dy. Convolutions take Relu and LeakyRelu, whose gradient reads y; a normalization
takes nearly any function of one element, because its gradient ops compute z again. A pool's gradient is four times its
output's, in a network's largest maps; what it is read for can put it together from that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from fusetile.graph import BACKWARD, FORWARD, Graph, Op
from fusetile.ops.functions import FUSED_NAMES

_RECTIFIERS = {"Relu": "relu", "LeakyRelu": "leaky_relu"}
_NAMES: dict[str, dict[str, str]] = {
    "Conv": _RECTIFIERS,
    "Gemm": _RECTIFIERS,
    "Normalize": {**_RECTIFIERS, **FUSED_NAMES},
}
"""Host -> what can be fused into it, and its name there."""


def fuse(graph: Graph) -> Graph:
    """The same graph with fewer ops; names of remaining tensors stay."""
    graph = graph.sorted()
    for op in list(graph.ops.values()):
        if op.phase == FORWARD and op.kind in _NAMES["Normalize"]:
            _fuse(graph, op)
    for op in list(graph.ops.values()):
        if op.phase == BACKWARD and op.kind == "MaxPoolGrad":
            _fuse_pool(graph, op)
    return graph.sorted()


def _fuse(graph: Graph, op: Op) -> None:
    """Fuse one op, if it is an activation that can be."""
    readers, kept = graph.consumers(), graph.kept()
    (z,), (y, *_) = op.inputs, op.outputs
    host = graph.producers().get(z)
    if host is None or op.kind not in _NAMES.get(host.kind, {}) or z in kept:
        return
    activation = {**op.attrs, "activation": _NAMES[host.kind][op.kind], "alpha": op.attrs.get("alpha", 0.0)}
    gradient = next((r for r in (*readers[y], *readers[z]) if r.kind == f"{op.kind}Grad" and _is_of(r, z, y)), None)
    following = _behind(readers, gradient, kept) if gradient and host.kind == "Normalize" else []
    if any(reader is not op and not (following and reader is gradient) for reader in readers[z]):
        return
    if gradient and following:
        _, _, gamma, beta = host.inputs
        for reader in following:
            affine = [gamma, beta] if reader.kind == "NormalizeMoments" else [beta]
            inputs = (gradient.inputs[0], *reader.inputs[1:], *affine)
            graph.replace_op(reader, inputs=inputs, attrs=MappingProxyType({**reader.attrs, **activation}))
        graph.remove(gradient)
    del graph.ops[op.name], graph.tensors[z]
    graph.replace_op(host, outputs=op.outputs, attrs=MappingProxyType({**host.attrs, **activation}))
    for follower in [other for other in graph.ops.values() if other.layer == op.name]:
        graph.replace_op(follower, layer=host.name)


def _fuse_pool(graph: Graph, op: Op) -> None:
    """Fuse a pool's gradient into those of the normalization before it, if nothing else reads it."""
    behind = _behind(graph.consumers(), op, graph.kept())
    for reader in behind:
        attrs = MappingProxyType({**reader.attrs, **op.attrs})
        inputs = (*op.inputs, *reader.inputs[1:])
        graph.replace_op(reader, kind=f"Pooled{reader.kind}", inputs=inputs, attrs=attrs)
    if behind:
        graph.remove(op)


def _is_of(gradient: Op, z: str, y: str) -> bool:
    """Whether a gradient op is that of the activation from z to y."""
    return set(gradient.inputs[1:]) <= {z, y}


def _behind(readers: Mapping[str, Sequence[Op]], gradient: Op, kept: set[str]) -> list[Op]:
    """A normalization's gradient ops, if only they read an activation's gradient."""
    (dz,) = gradient.outputs
    kinds = {reader.kind for reader in readers[dz]}
    return list(readers[dz]) if kinds == {"NormalizeMoments", "NormalizeInputGrad"} and dz not in kept else []
