"""Say which weights are trained: what is frozen gets no gradient, and nothing below the first trained one gets any.

--freeze 'features.*'        features.0.weight trainable -> features.0.weight constant
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

from fusetile.errors import UserError
from fusetile.graph import Graph


def freeze(graph: Graph, *, frozen: str = "", trained: str = "") -> Graph:
    """`frozen` and `trained`: patterns of initializers' names, separated by commas, as the shell has them. Trained are
    all that match `trained`, if it is given, and do not match `frozen`. Raises UserError for a pattern that matches no
    weight, and if nothing is left to train."""
    if not frozen and not trained:
        return graph
    graph = graph.copy()
    weights = {name: p.onnx_name for name, p in graph.parameters.items() if p.trainable}
    wanted = _matching("--train", trained, weights) if trained else set(weights)
    wanted -= _matching("--freeze", frozen, weights)
    if not wanted:
        given = [f"{flag} {value!r}" for flag, value in (("--freeze", frozen), ("--train", trained)) if value]
        raise UserError(f"nothing is left to train: {' and '.join(given)} leave none of the {len(weights)} weights")
    for name in weights:
        if name not in wanted:
            graph.parameters[name] = replace(graph.parameters[name], trainable=False)
    return graph


def _matching(flag: str, patterns: str, weights: dict[str, str]) -> set[str]:
    found: set[str] = set()
    for pattern in filter(None, patterns.split(",")):
        matches = {name for name, onnx_name in weights.items() if fnmatchcase(onnx_name, pattern)}
        if not matches:
            some = ", ".join(sorted(weights.values())[:5])
            raise UserError(f"{flag} {pattern!r} matches none of the {len(weights)} weights ({some}, ...)")
        found |= matches
    return found
