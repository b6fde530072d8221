"""Add an update op per trained parameter, with its state as further parameters.

w, grad.w          SGD(w, grad.w, learning_rate, w.velocity) -> w.new, w.velocity.new
"""

from __future__ import annotations

import numpy as np

from fusetile.graph import UPDATE, Graph, Parameter


def add_optimizer(graph: Graph, *, momentum: float, weight_decay: float) -> Graph:
    """SGD as PyTorch defines it; without momentum there is no state."""
    graph = graph.copy()
    if not graph.gradients:
        return graph
    rate = graph.add_tensor(graph.fresh("learning_rate"), (1,))
    graph.controls[rate] = "learning_rate"
    attrs = {"momentum": momentum, "weight_decay": weight_decay}
    for name, gradient in graph.gradients.items():
        inputs, value = [name, gradient, rate], graph.parameters[name].value
        if momentum:
            inputs.append(graph.add_parameter(f"{name}.velocity", Parameter(np.zeros_like(value), trainable=False)))
        outputs = [graph.fresh(f"{old}.new") for old in (name, *inputs[3:])]
        graph.add("SGD", inputs, attrs=attrs, outputs=outputs, phase=UPDATE, origin=f"update of {name!r}")
        graph.next_value.update(zip((name, *inputs[3:]), outputs, strict=True))
    return graph
