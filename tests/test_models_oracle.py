"""Real networks, reduced, from ONNX: one step of every plan equals PyTorch's, in float64.

All is float64 on both sides: then neither rounding nor a ReLU or a maximum that rounding tips over blurs the
comparison, and one tolerance does for all networks and plans. Kernels and float32 have tests of their own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import pytest

from fusetile.cluster import Cluster
from fusetile.graph import Graph
from fusetile.onnx_import import import_onnx
from fusetile.passes.add_optimizer import Optimizer
from fusetile.reference import evaluate
from models import darknet19, densenet121, lenet, mobilenetv2, resnet18, resnet50, unet, vgg16, vgg_small, yolov2
from tests.graphs import feeds
from tests.onnx_tools import save
from tests.training import GRIDS, in_float64, mixed_cluster, planned, run_plan, training_graph, worst

HAS_TORCH = importlib.util.find_spec("torch") is not None
TOLERANCE = 1e-9
OPTIMIZER = {"momentum": 0.9, "weight_decay": 1e-3}

MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "lenet": (lambda: lenet.build(size=14, width=0.5, classes=5), "cross-entropy"),
    "vgg_small": (lambda: vgg_small.build(size=17, width=0.25, classes=3), "cross-entropy"),
    "resnet18": (lambda: resnet18.build(size=33, width=0.15, classes=4), "cross-entropy"),
    "yolov2": (lambda: yolov2.build(size=48, width=1 / 24), "mse"),
    "yolov2 with classes": (lambda: yolov2.build(size=34, width=1 / 32, layers=8, classes=3), "cross-entropy"),
}
LARGER: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "vgg16": (lambda: vgg16.build(size=33, width=1 / 32, classes=4, dropout=0), "cross-entropy"),
    "darknet19": (lambda: darknet19.build(size=64, width=1 / 32, classes=4), "cross-entropy"),
    "resnet50": (lambda: resnet50.build(size=33, width=0.1, classes=4), "cross-entropy"),
    "densenet121": (lambda: densenet121.build(size=64, width=1 / 16, classes=4), "cross-entropy"),
    "mobilenetv2": (lambda: mobilenetv2.build(size=33, width=0.05, classes=4), "cross-entropy"),
    "unet": (lambda: unet.build(size=32, width=1 / 32, classes=3), "cross-entropy"),
    "yolov2 whole": (lambda: yolov2.build(size=64, width=1 / 32, layers=31, classes=2), "mse"),
    "unet with resize": (lambda: unet.build(size=32, width=1 / 32, up="resize"), "cross-entropy"),
}


@dataclass(frozen=True)
class Known:
    """A training graph in float64, what is fed, and what a step must give, by tensor name."""

    graph: Graph
    fed: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]


@cache
def known(name: str, batch: int) -> Known:
    """By PyTorch where it is installed, else by the undivided reference (which has a test of its own below)."""
    build, loss = (MODELS | LARGER)[name]
    proto = build()
    with TemporaryDirectory() as folder:
        imported = import_onnx(save(proto, Path(folder)), batch=batch)
    graph = in_float64(training_graph(imported, loss=loss, optimizer=Optimizer(**OPTIMIZER)))
    fed = {key: v.astype(np.float64) if v.dtype == np.float32 else v for key, v in feeds(graph).items()}
    values = evaluate(graph, fed)
    wanted = (graph.loss, *graph.gradients.values(), *graph.next_value.values())
    expected = {key: values[key] for key in wanted}
    if HAS_TORCH:
        expected |= by_torch(proto, graph, fed, loss)
    return Known(graph, fed, expected)


def by_torch(proto: onnx.ModelProto, graph: Graph, fed: dict[str, np.ndarray], loss: str) -> dict[str, np.ndarray]:
    """PyTorch's results under the graph's tensor names; it must have all but the velocities."""
    from tests.torch_oracle import torch_step

    (x,), (target,) = graph.inputs, graph.targets
    (rate,) = (fed[name] for name, role in graph.controls.items() if role == "learning_rate")
    result = torch_step(proto, fed[x], fed[target], loss=loss, learning_rate=float(rate[0]), **OPTIMIZER)
    by_name = {p.onnx_name: key for key, p in graph.parameters.items() if p.onnx_name}
    assert set(by_name) == set(result.updated) and not any(p.transposed for p in graph.parameters.values())
    found = {graph.loss: np.array([result.loss])}
    found |= {graph.gradients[by_name[name]]: gradient for name, gradient in result.gradients.items()}
    found |= {graph.next_value[by_name[name]]: value for name, value in result.updated.items()}
    assert set(graph.gradients.values()) <= set(found)
    return found


def check(case: Known, plan: str, cluster: int | Cluster, **options: Any) -> None:
    error, where = worst(run_plan(case.graph, *planned(case.graph, plan, cluster, **options), case.fed), case.expected)
    assert error < TOLERANCE, f"{plan} {options}: {where} is off by {error}"


@pytest.mark.parametrize(
    ("name", "batch"), [*((name, batch) for name in MODELS for batch in (1, 2, 4)), *((name, 2) for name in LARGER)]
)
def test_the_undivided_reference(name: str, batch: int) -> None:
    case = known(name, batch)
    values = evaluate(case.graph, case.fed)
    error, where = worst({key: values[key] for key in case.expected}, case.expected)
    assert error < TOLERANCE, f"{where} is off by {error}"


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_every_plan(name: str, batch: int, nodes: int) -> None:
    """A search takes as long as all other plans together: for one size of batch, and few and many nodes."""
    case = known(name, batch)
    searched = "auto" if batch == 2 and nodes in (2, 6) else "mixed"
    for plan in ("single",) if nodes == 1 else ("batch", "channel", searched, f"random:{batch}", *GRIDS[nodes]):
        check(case, plan, nodes)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["batch", "channel", "grid:3x1"])
@pytest.mark.parametrize("name", ["mobilenetv2", "unet", "unet with resize", "yolov2 whole"])
def test_plans_of_larger_networks(name: str, plan: str) -> None:
    check(known(name, 2), plan, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_halos_recomputed_and_unequal_devices(name: str) -> None:
    case = known(name, 2)
    for halo in ("exchange", "recompute"):
        check(case, "grid:2x2", 4, halo=halo)
    for plan in ("grid:3x1", "channel", "auto"):
        check(case, plan, mixed_cluster("pi4", "pi3", "pi5"))


@pytest.mark.parametrize("name", ["lenet", "vgg_small", "yolov2 with classes"])
def test_finite_differences(name: str) -> None:
    """Needs no PyTorch: the loss changes along random directions as the gradients say."""
    case = known(name, 2)
    graph, rng = case.graph, np.random.default_rng(0)
    for parameter, gradient in list(graph.gradients.items())[:: max(1, len(graph.gradients) // 8)]:
        value = graph.parameters[parameter].value
        direction = rng.standard_normal(value.shape)
        step = 1e-7
        plus, minus = (
            evaluate(graph, {**case.fed, parameter: value + sign * step * direction})[graph.loss][0] for sign in (1, -1)
        )
        expected = (case.expected[gradient] * direction).sum()
        assert (plus - minus) / (2 * step) == pytest.approx(expected, rel=1e-4, abs=1e-6), parameter


def test_a_wrong_gradient_is_seen() -> None:
    """BatchNorm's gradient over one sample more than there are."""
    case = known("yolov2 with classes", 1)
    wrong = case.graph.copy()
    op = next(op for op in wrong.ops.values() if op.kind == "NormalizeInputGrad")
    wrong.replace_op(op, attrs=MappingProxyType({**op.attrs, "count": op.attrs["count"] + 1}))
    with pytest.raises(AssertionError, match="off by"):
        check(Known(wrong, case.fed, case.expected), "grid:2x1", 2)
