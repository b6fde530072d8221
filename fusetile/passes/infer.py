"""The forward pass as a trained model is used: for validation.

    ChannelMoments -> BatchStatistics -> stats       FrozenStatistics(running mean, variance) -> stats
    Dropout -> y                                     Identity -> y
    w, whose running average is kept                 the average

Ops keep their names, and with them their places in the training's plan. The loss is no tensor of its own any more: its
terms are logged one by one, because what they are means over differs.
"""

from __future__ import annotations

from types import MappingProxyType

from fusetile.graph import Graph


def infer(graph: Graph, *, trained: Graph) -> Graph:
    """`graph` has a loss and no gradients; `trained` is what the training made of it: it says of which weights there
    are averages."""
    graph = graph.sorted()
    running = {sums: op.inputs[1:3] for op in graph.ops.values() for sums in _sums(op.kind, op.inputs)}
    for op in list(graph.ops.values()):
        if op.kind == "BatchStatistics":
            attrs = MappingProxyType({"epsilon": op.attrs["epsilon"]})
            graph.replace_op(op, kind="FrozenStatistics", inputs=running[op.inputs[0]], attrs=attrs)
        elif op.kind == "Dropout":
            graph.replace_op(op, kind="Identity", inputs=op.inputs[:1], attrs=MappingProxyType({}))
    graph.next_value, graph.loss = {}, ""
    graph.logged = [name for term in graph.terms for name in (term.loss, term.weight) if name]
    for name, parameter in trained.parameters.items():
        if parameter.average_of in graph.parameters:
            graph.add_parameter(name, parameter, kind=trained.tensors[name].kind)
            graph.rename_reads(parameter.average_of, name)
    return graph


def _sums(kind: str, inputs: tuple[str, ...]) -> tuple[str, ...]:
    """The batch statistics that an update of running ones reads; its other inputs are those."""
    return (inputs[0], *inputs[3:]) if kind == "RunningStatistics" else ()
