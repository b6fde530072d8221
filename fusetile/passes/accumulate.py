"""Let a step have several batches, whose gradients are added up before the optimizer takes their mean.

SGD(w, grad.w, ...)          Accumulate(sum, grad.w, kept) -> sum.new;  SGD(w, sum.new, ...)

`kept` is 0 in the first batch of a step, else 1. The sums lie where the updates are, so that each device adds up its
own shards. All batches of a step but the last run a routine of their own, without the optimizer: `micro`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fusetile.graph import UPDATE, Graph, Parameter
from fusetile.plan import Plan

SUM, RUNNING = "Accumulate", "RunningStatistics"


def accumulate(graph: Graph, batches: int) -> Graph:
    """`graph` has its optimizer already."""
    if batches == 1 or not graph.gradients:
        return graph
    graph = graph.copy()
    kept = graph.add_tensor(graph.fresh("kept"), (1,))
    graph.controls[kept] = "kept"
    for name, gradient in graph.gradients.items():
        value = np.zeros_like(graph.parameters[name].value)
        zeros = Parameter(value, trainable=False, lasting=False)
        total = graph.add_parameter(graph.fresh(f"{name}.sum"), zeros, kind=graph.tensors[name].kind)
        new = graph.fresh(f"{total}.new")
        takers = [op for op in graph.ops.values() if op.phase == UPDATE and gradient in op.inputs]
        attrs, origin = {"share": 1 / batches}, f"gradients of {name!r}"
        graph.add(SUM, [total, gradient, kept], attrs=attrs, outputs=[new], phase=UPDATE, origin=origin)
        for op in takers:
            graph.replace_op(op, inputs=tuple(new if read == gradient else read for read in op.inputs))
        graph.next_value[total] = new
        graph.gradients[name] = new
    return graph.sorted()


def place_sums(graph: Graph, plan: Plan) -> Plan:
    """The plan of a graph without sums, for one that has them."""
    more = {}
    for name, gradient in graph.gradients.items():
        op = graph.producers()[gradient]
        if op.kind == SUM:
            more[op.name] = plan.placements[graph.producers()[graph.next_value[name]].name]
    return replace(plan, placements={**plan.placements, **more})


def micro(graph: Graph) -> Graph:
    """The routine of the batches before a step's last: gradients are added up, running statistics go on."""
    graph = graph.copy()
    for op in list(graph.ops.values()):
        if op.phase == UPDATE and op.kind not in (SUM, RUNNING):
            graph.remove(op)
    graph.next_value = {name: new for name, new in graph.next_value.items() if new in graph.tensors}
    graph.gradients = {}
    return graph
