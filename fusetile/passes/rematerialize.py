"""Compute cheap activations again in the backward pass instead of keeping them.

    z -> Normalize -> y -> Conv2            z -> Normalize -> y -> Conv2
    ConvWeightGrad2(y, dy2)                 Normalize -> y.again;  ConvWeightGrad2(y.again, dy2)
    NormalizeMoments(dy, z)                 NormalizeMoments(dy, z)

Normalization's own gradient needs its input z anyway: with that, y costs one pass over memory, and of two maps per
layer only one is kept. Source: Chen, Xu, Zhang, Guestrin, Training Deep Nets with Sublinear Memory Cost
(arXiv 1604.06174).
"""

from __future__ import annotations

from dataclasses import replace

from fusetile.graph import BACKWARD, FORWARD, Graph, Op

_CHEAP = ("Normalize",)


def rematerialize(graph: Graph) -> Graph:
    """The same values from a graph whose forward maps live shorter; ops stay in topological order."""
    graph = graph.sorted()
    readers = graph.consumers()
    again: dict[str, Op] = {}  # name of the first backward reader -> the op to be repeated before it
    for op in list(graph.ops.values()):
        later = [reader for reader in readers[op.outputs[0]] if reader.phase == BACKWARD]
        if op.kind not in _CHEAP or op.phase != FORWARD or not later:
            continue
        kept = [reader for reader in readers[op.inputs[0]] if reader.phase == BACKWARD]
        if not kept:
            continue
        copy = _repeated(graph, op)
        again[later[0].name] = copy
        for reader in later:
            current = graph.ops[reader.name]
            inputs = tuple(copy.outputs[0] if name == op.outputs[0] else name for name in current.inputs)
            graph.replace_op(current, inputs=inputs)
    ordered: dict[str, Op] = {}
    for name, op in graph.ops.items():
        if name in again:
            ordered[again[name].name] = again[name]
        ordered[name] = op
    graph.ops = ordered
    return graph


def _repeated(graph: Graph, op: Op) -> Op:
    """A copy of an op with an output of its own, as a part of the backward pass."""
    known = graph.tensors[op.outputs[0]]
    name = graph.add_tensor(graph.fresh(f"{known.name}.again"), known.shape, known.dtype, known.kind)
    return replace(op, name=name, outputs=(name,), phase=BACKWARD)
