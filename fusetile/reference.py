"""The oracle: a graph evaluated op by op in numpy, on one device and undivided."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fusetile.box import Box, slices
from fusetile.graph import Graph, Op
from fusetile.ops import Domain, domain_of, row


def run_op(
    graph: Graph,
    op: Op,
    domain: Domain,
    box: Box,
    inputs: list[np.ndarray],
    exact: bool = False,
) -> list[np.ndarray]:
    """One op on a box of its iterations; results have the dtypes that the graph says (float64 with `exact`)."""
    results = row(op.kind).reference(op, domain, box, inputs)
    dtypes = [graph.tensors[name].dtype for name in op.outputs]
    if exact:
        dtypes = ["float64" if dtype == "float32" else dtype for dtype in dtypes]
    return [np.asarray(value, dtype) for value, dtype in zip(results, dtypes, strict=True)]


def evaluate(graph: Graph, feeds: Mapping[str, np.ndarray], *, exact: bool = False) -> dict[str, np.ndarray]:
    """Every tensor of the graph, given its inputs, targets and controls; parameters start at their initial values
    unless they are fed. With `exact`, all floats are float64."""
    values = {name: np.asarray(p.value) for name, p in graph.parameters.items()}
    values |= {name: np.asarray(value) for name, value in feeds.items()}
    if exact:
        values = {name: v.astype(np.float64) if v.dtype == np.float32 else v for name, v in values.items()}
    for op in graph.topological():
        domain = domain_of(graph, op)
        inputs = [values[name][slices(domain.need(domain.box, i))] for i, name in enumerate(op.inputs)]
        results = run_op(graph, op, domain, domain.box, inputs, exact)
        values.update(zip(op.outputs, results, strict=True))
    return values
