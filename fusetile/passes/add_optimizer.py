"""Add the update step: one op per trained parameter, with its state as further parameters.

w, grad.w          SGD(w, grad.w, learning_rate, w.velocity) -> w.new, w.velocity.new

With clipping, all gradients together first give one factor:

grad.w, grad.v     GradientNorm(grad.w, grad.v) -> n;  ClipScale(n) -> scale;  SGD(..., scale)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fusetile.graph import UPDATE, Graph, Parameter
from fusetile.ops.update import controls_of, states_of

Kind = Literal["sgd", "adam", "adamw", "rmsprop"]
_OPS: dict[Kind, str] = {"sgd": "SGD", "adam": "Adam", "adamw": "Adam", "rmsprop": "RMSprop"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """PyTorch's optimizers and their arguments; each reads those that it has. `clip_norm`: the gradients' largest
    norm, 0 for no limit; `ema`: how much of a weight's running average stays in each step, 0 for no average."""

    kind: Kind = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    alpha: float = 0.99
    epsilon: float = 1e-8
    clip_norm: float = 0.0
    ema: float = 0.0

    def attrs(self) -> dict[str, Any]:
        """Those of the update ops; what is off is left out."""
        own: dict[str, Any] = {"momentum": self.momentum, "weight_decay": self.weight_decay}
        if self.kind == "sgd":
            own |= {"nesterov": True} if self.nesterov else {}
        elif self.kind == "rmsprop":
            own |= {"alpha": self.alpha, "epsilon": self.epsilon}
        else:
            own = {"weight_decay": self.weight_decay, "beta1": self.betas[0], "beta2": self.betas[1]}
            own |= {"epsilon": self.epsilon} | ({"decoupled": True} if self.kind == "adamw" else {})
        return own | ({"clipped": True} if self.clip_norm else {}) | ({"ema": self.ema} if self.ema else {})


def add_optimizer(graph: Graph, optimizer: Optimizer) -> Graph:
    """Updates as PyTorch defines them; running averages start at the weights."""
    graph = graph.copy()
    if not graph.gradients:
        return graph
    kind, attrs = _OPS[optimizer.kind], optimizer.attrs()
    controls = {"learning_rate": _control(graph, "learning_rate")}
    controls |= {role: _control(graph, role) for role in controls_of(kind, attrs) if role != "scale"}
    if optimizer.clip_norm:
        controls["scale"] = _clip(graph, optimizer.clip_norm)
    for name, gradient in graph.gradients.items():
        states = [_state(graph, name, state) for state in states_of(kind, attrs)]
        behind = [controls[role] for role in controls_of(kind, attrs)]
        inputs = [name, gradient, controls["learning_rate"], *states, *behind]
        outputs = [graph.fresh(f"{old}.new") for old in (name, *states)]
        graph.add(kind, inputs, attrs=attrs, outputs=outputs, phase=UPDATE, origin=f"update of {name!r}")
        graph.next_value.update(zip((name, *states), outputs, strict=True))
    return graph


def _control(graph: Graph, role: str) -> str:
    name = graph.add_tensor(graph.fresh(role), (1,))
    graph.controls[name] = role
    return name


def _state(graph: Graph, weight: str, state: str) -> str:
    value = graph.parameters[weight].value
    if state == "average":
        average = Parameter(value.copy(), trainable=False, average_of=weight)
        return graph.add_parameter(graph.fresh(f"{weight}.average"), average, kind=graph.tensors[weight].kind)
    zeros = Parameter(np.zeros_like(value), trainable=False)
    return graph.add_parameter(graph.fresh(f"{weight}.{state}"), zeros, kind=graph.tensors[weight].kind)


def _clip(graph: Graph, limit: float) -> str:
    """The factor for all gradients."""
    origin = "gradient clipping"
    (norm,) = graph.add("GradientNorm", [*graph.gradients.values()], stem="gradient_norm", phase=UPDATE, origin=origin)
    return graph.add("ClipScale", [norm], attrs={"limit": limit}, stem="clip_scale", phase=UPDATE, origin=origin)[0]
