"""Let a step have several batches, whose gradients are added up before the optimizer takes their mean.

SGD(w, grad.w, ...)          Accumulate(sum, grad.w, kept) -> sum.new;  SGD(w, sum.new, ...)

`kept` is 0 in the first batch of a step, else 1. All batches of a step but the last run a routine of their own, without
the optimizer: `micro`. Where devices have contributions to a gradient, each adds up its own: only the sums travel, once
per step. Where memory does not allow for that the sums lie where the updates are, in shards, and every batch's
contributions travel there.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fusetile.box import volume
from fusetile.graph import UPDATE, Graph, Parameter
from fusetile.ops import domain_of
from fusetile.plan import Placement, Plan

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


def place_sums(graph: Graph, plan: Plan, *, apart: bool) -> Plan:
    """The plan of a graph without sums, for one that has them. `apart`: every device adds up its own contributions."""
    more, producers = {}, graph.producers()
    for name, gradient in graph.gradients.items():
        op = producers[gradient]
        if op.kind == SUM:
            maker = producers[op.inputs[1]]
            own, domain = plan.placements[maker.name].own, domain_of(graph, maker)
            if apart and any(volume(box) and domain.is_partial(box) for box in own):
                axes, output = len(domain_of(graph, op).axes), maker.outputs.index(op.inputs[1])
                boxes = tuple(domain.output(box, output)[:axes] for box in own)
                more[op.name] = Placement(boxes, boxes, partial=True)
            else:
                more[op.name] = plan.placements[producers[graph.next_value[name]].name]
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
