"""Remove what nobody needs: Identity ops, and ops none of whose outputs are read or kept.

x -> Identity -> y -> Conv        x -> Conv
grad of the first layer's input   (gone: nothing trains below it)
"""

from __future__ import annotations

from fusetile.graph import Graph, Op


def prune(graph: Graph) -> Graph:
    """The same parameters' updates, loss and outputs from fewer ops; the result is in topological order."""
    graph = graph.sorted()
    for op in list(graph.ops.values()):
        current = graph.ops[op.name]
        if current.kind == "Identity" and current.outputs[0] not in graph.kept():
            graph.rename_reads(current.outputs[0], current.inputs[0])
            _hand_over(graph, current)
    readers, kept = graph.consumers(), graph.kept()
    for op in reversed(list(graph.ops.values())):
        if not any(readers[name] or name in kept for name in op.outputs):
            graph.remove(op)
            for name in op.inputs:
                readers[name] = [reader for reader in readers[name] if reader.name != op.name]
    read = {name for op in graph.ops.values() for name in op.inputs}
    for name in list(graph.parameters):
        if name not in read and name not in graph.next_value:
            del graph.parameters[name], graph.tensors[name]
    return graph


def _hand_over(graph: Graph, removed: Op) -> None:
    """What followed the layer of an op that goes follows the one before it instead, or, behind a parameter, after."""
    x = removed.inputs[0]
    heir = graph.producers().get(x) or next(op for op in graph.consumers()[x] if op.name != removed.name)
    for follower in [op for op in graph.ops.values() if op.layer == removed.name and op.name != removed.name]:
        graph.replace_op(follower, layer=heir.layer)
