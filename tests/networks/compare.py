"""One training step of an exported network against PyTorch: imported, partitioned, and compiled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from fusetile.graph import Graph
from fusetile.onnx_import import import_onnx
from fusetile.reference import evaluate
from tests.networks import NETWORKS, export, made
from tests.training import in_float64, planned, run_plan, training_graph, worst

BATCH = 2


@dataclass(frozen=True)
class Step:
    """The graph as imported, and its training graph in float32 and in float64, what is fed, and PyTorch's loss and
    gradients by tensor name."""

    imported: Graph
    loss: str
    graph: Graph
    exact: Graph
    fed: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]


def step_of(name: str, exporter: str, folder: Path, opset: int | None = None) -> Step:
    """Export, import, differentiate; and the same step by PyTorch in float64."""
    network, module = NETWORKS[name], made(name)
    path = folder / f"{name}.{exporter}.onnx"
    export(module, network.inputs, path, exporter, opset)
    imported = import_onnx(path, batch=BATCH)
    graph = training_graph(imported, loss=network.loss)
    rng = np.random.default_rng(7)
    fed = {key: rng.standard_normal(graph.tensors[key].shape).astype(np.float32) for key in graph.inputs}
    for key, output in zip(graph.targets, graph.outputs, strict=True):
        tensor = graph.tensors[key]
        if tensor.dtype == "int32":
            fed[key] = rng.integers(0, graph.tensors[output].shape[1], tensor.shape, dtype=np.int32)
        else:
            fed[key] = rng.standard_normal(tensor.shape).astype(np.float32)
    controls = {"step": np.array([1], np.int32), "learning_rate": np.array([0.05], np.float32)}
    fed |= {key: controls[role] for key, role in graph.controls.items()}
    return Step(
        imported, network.loss, graph, in_float64(graph), fed, _by_torch(module.double(), graph, fed, network.loss)
    )


def _by_torch(module: torch.nn.Module, graph: Graph, fed: dict[str, np.ndarray], loss: str) -> dict[str, np.ndarray]:
    outputs = module(*(torch.tensor(fed[name].astype(np.float64)) for name in graph.inputs))
    outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
    total = torch.zeros((), dtype=torch.float64)
    for output, key in zip(outputs, graph.targets, strict=True):
        target = torch.tensor(fed[key].astype(np.int64 if loss == "cross-entropy" else np.float64))
        total = total + (functional.cross_entropy if loss == "cross-entropy" else functional.mse_loss)(output, target)
    total.backward()
    left = {name: p.grad.numpy() for name, p in module.named_parameters() if p.grad is not None}
    found = {graph.loss: np.array([total.item()])}
    for name, gradient in graph.gradients.items():
        onnx_name = graph.parameters[name].onnx_name
        value = left.pop(onnx_name)
        if graph.parameters[name].transposed:
            value = value.swapaxes(0, 1)
        found[gradient] = value.reshape(graph.tensors[name].shape)
    assert not left, f"PyTorch trains {sorted(left)}, which the graph does not"
    return found


def error_of(step: Step) -> tuple[float, str]:
    """The undivided graph in float64 against PyTorch."""
    values = evaluate(step.exact, step.fed, exact=True)
    return worst({name: values[name] for name in step.expected}, step.expected)


def plan_error(step: Step, plan: str, nodes: int) -> tuple[float, str]:
    """A plan on the plan executor, in float64, against PyTorch."""
    fed = {key: value.astype(np.float64) if value.dtype == np.float32 else value for key, value in step.fed.items()}
    found = run_plan(step.exact, *planned(step.exact, plan, nodes), fed)
    return worst({name: found[name] for name in step.expected}, step.expected)


def kernel_error(step: Step, plan: str, nodes: int, folder: Path) -> tuple[float, float, str]:
    """Compiled and run with the real kernels, all nodes in this process; against PyTorch: (error, limit, where). The
    limit is three times what float32 itself loses, or 1e-3."""
    from fusetile.cluster import local_cluster
    from fusetile.options import Training
    from fusetile.pipeline import compile_graph
    from fusetile.trace import Trace
    from tests.local_cluster import LocalCluster

    model = folder / "empty.onnx"
    model.write_bytes(b"")  # only its hash is used
    training = Training(loss=step.loss, batch=BATCH, learning_rate=0.05, momentum=0.9, weight_decay=1e-3, plan=plan)
    where = {"model": model, "cluster": local_cluster(nodes), "training": training}
    build = compile_graph(step.imported, build=folder / "build", trace=Trace(), **where)
    cluster, graph = LocalCluster(build), step.graph
    keys = graph.targets | graph.controls
    found = {graph.loss: np.array([cluster.step({keys.get(name, name): value for name, value in step.fed.items()})])}
    found |= {graph.gradients[name]: value for name, value in cluster.gradients.items()}
    values = evaluate(graph, step.fed)
    rounding, _ = worst({name: values[name] for name in step.expected}, step.expected)
    error, place = worst({name: found[name] for name in step.expected}, step.expected)
    return error, max(1e-3, 3 * rounding), place
