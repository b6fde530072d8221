"""The imported graph, evaluated in numpy, against ONNX Runtime; what tests of rules share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from fusetile.graph import Graph
from fusetile.onnx_import import import_onnx
from fusetile.reference import evaluate
from tests.onnx_tools import for_inference, normal, run_ort, save

X = {"x": ("N", 3, 9, 11)}


def check(proto: onnx.ModelProto, folder: Path, *, batch: int = 2) -> Graph:
    """Import and compare all outputs with ONNX Runtime's; BatchNormalization is frozen, nothing is dropped."""
    graph = import_onnx(save(proto, folder), batch=batch, bn="frozen", dropout=0.0)
    fed = {name: normal(*graph.tensors[name].shape, seed=7) for name in graph.inputs}
    values, expected = evaluate(graph, fed), run_ort(for_inference(proto), fed)
    assert graph.outputs == list(expected)
    for name, y in expected.items():
        assert values[name].shape == y.shape
        np.testing.assert_allclose(values[name], y, rtol=1e-4, atol=1e-5, err_msg=name)
    return graph


def kinds(graph: Graph) -> list[str]:
    return [op.kind for op in graph.ops.values()]
