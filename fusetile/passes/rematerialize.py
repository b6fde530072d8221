"""Compute forward maps again in the backward pass instead of keeping them.

    z -> Normalize -> y -> Conv2            z -> Normalize -> y -> Conv2
    ConvWeightGrad2(y, dy2)                 Normalize -> y.again;  ConvWeightGrad2(y.again, dy2)
    NormalizeMoments(dy, z)                 NormalizeMoments(dy, z)

Which maps is a choice; a map that is computed again from one that is computed again makes a run of layers. `cheap` is
where the choice begins: a normalization's own gradient needs its input z anyway, and with that y costs one pass over
memory. What more to choose where memory lacks, `economize` knows. Copies stand directly before their first reader.
Parameters change only after all that reads them, dropout's masks are a function of the step, and running statistics
are updated from the forward pass alone: the values are the same bits.

Source: Chen, Xu, Zhang, Guestrin, Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from fusetile.graph import BACKWARD, Graph, Op
from fusetile.plan import Plan


def rematerialize(graph: Graph, again: Collection[str]) -> Graph:
    """The same values from a graph in which backward ops read copies of the forward tensors `again`. Ops stay in
    topological order."""
    graph = graph.sorted()
    producers = graph.producers()
    ordered: dict[str, Op] = {}
    copies: dict[str, Op] = {}  # by name of the op that is repeated

    def read(name: str) -> str:
        op = producers.get(name)
        if op is None or name not in again:
            return name
        if op.name not in copies:
            copies[op.name] = copy = _copy(graph, op, tuple(map(read, op.inputs)))
            ordered[copy.name] = copy
            graph.repeats[copy.name] = op.name
        return copies[op.name].outputs[op.outputs.index(name)]

    for op in graph.ops.values():
        inputs = tuple(map(read, op.inputs)) if op.phase == BACKWARD else op.inputs
        ordered[op.name] = replace(op, inputs=inputs)
    graph.ops = ordered
    return graph


def _copy(graph: Graph, op: Op, inputs: tuple[str, ...]) -> Op:
    outputs = []
    for name in op.outputs:
        known = graph.tensors[name]
        outputs.append(graph.add_tensor(graph.fresh(f"{name}.again"), known.shape, known.dtype, known.kind))
    return replace(op, name=outputs[0], inputs=inputs, outputs=tuple(outputs), phase=BACKWARD)


def cheap(graph: Graph) -> frozenset[str]:
    """Outputs of normalizations whose inputs the backward pass keeps anyway."""
    readers = graph.consumers()
    return frozenset(
        op.outputs[0]
        for op in graph.ops.values()
        if op.kind in ("Normalize", "Standardize") and any(reader.phase == BACKWARD for reader in readers[op.inputs[0]])
    )


def place_copies(graph: Graph, plan: Plan) -> Plan:
    """A plan for a graph with more copies than it was made for: each is where its original is."""
    more = {copy: plan.placements[op] for copy, op in graph.repeats.items() if copy not in plan.placements}
    return replace(plan, placements={**plan.placements, **more})
