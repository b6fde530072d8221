"""Let a normalization do the scale and the bias that follow it.

    Standardize(x, mean, inverse, 1, 0) -> Mul(., w) -> Add(., b)     ==>     Standardize(x, mean, inverse, w, b)

Exporters write a layer's weights into the node, behind it, or behind a reshape.
"""

from __future__ import annotations

from fusetile.graph import Graph, Op

_PLACES = {"Mul": 3, "Add": 4}  # which operand it becomes


def join_affine(graph: Graph) -> None:
    """Changes the graph, whose ops are in topological order, and stay so."""
    readers = graph.consumers()
    for op in [op for op in graph.ops.values() if op.kind == "Standardize"]:
        inputs, chain = list(op.inputs), list[Op]()
        y = op.outputs[0]
        while (after := _joinable(graph, readers[y], y, inputs)) is not None:
            (inputs[_PLACES[after.kind]],) = (name for name in after.inputs if name != y)
            chain.append(after)
            y = after.outputs[0]
        if chain:
            for gone in (op, *chain):
                graph.remove(gone)
            graph.add(op.kind, inputs, attrs=op.attrs, outputs=[y], origin=op.origin)
    graph.ops = graph.sorted().ops


def _joinable(graph: Graph, readers: list[Op], y: str, inputs: list[str]) -> Op | None:
    """The only reader of y, if it is a scale or a bias that broadcasts over y, and has its place free."""
    if len(readers) != 1 or readers[0].kind not in _PLACES or y in graph.outputs:
        return None
    (after,) = readers
    shape = graph.tensors[y].shape
    others = [graph.tensors[name].shape for name in after.inputs if name != y]
    broadcast = len(others) == 1 and others[0] != shape and graph.tensors[after.outputs[0]].shape == shape
    free = _is_constant(graph, inputs[4], 0.0) and (after.kind == "Add" or _is_constant(graph, inputs[3], 1.0))
    return after if broadcast and free else None


def _is_constant(graph: Graph, name: str, number: float) -> bool:
    parameter = graph.parameters.get(name)
    return (
        parameter is not None
        and not parameter.trainable
        and parameter.value.shape == (1,)
        and float(parameter.value[0]) == number
    )
