"""Real exports of PyTorch, where it is installed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fusetile.onnx_import import import_onnx
from fusetile.passes.differentiate import Criterion, differentiate
from fusetile.reference import evaluate
from tests.onnx_import.checks import check, kinds

pytest.importorskip("torch")
import torch
from torch import nn


class Residual(nn.Module):
    """A branch, a shortcut, a concat, every pool, a view that reads the batch, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 5, stride=2, padding=(1, 2)), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(8)
        self.linear1, self.drop, self.linear2 = nn.Linear(16, 12), nn.Dropout(0.3), nn.Linear(12, 5, bias=False)

    def forward(self, x: Any) -> Any:
        functional = nn.functional
        x = functional.max_pool2d(functional.leaky_relu(self.bn1(self.conv1(x)), 0.2), 3, 2, 1, ceil_mode=True)
        y = torch.relu(x + self.bn2(self.conv2(x)))
        y = functional.avg_pool2d(torch.cat([y, x], 1), 3, 2, 1, count_include_pad=False)
        y = functional.adaptive_avg_pool2d(y, 1)
        return self.linear2(self.drop(torch.relu(self.linear1(y.view(y.size(0), -1)))))


def export(path: Path, *, training: bool, dynamo: bool) -> Any:
    torch.manual_seed(0)
    network = Residual().train(training)
    options: dict[str, Any] = {"dynamo": dynamo, "input_names": ["x"]}
    if dynamo:
        pytest.importorskip("onnxscript")
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch", min=1)},)
        options["optimize"] = not training  # the optimizer folds BatchNormalization into convolutions
    else:
        options["dynamic_axes"] = {"x": {0: "batch"}}
        options["training"] = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL
        options["do_constant_folding"] = not training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (torch.zeros(2, 3, 21, 18),), str(path), **options)
    return network


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_export_in_inference_gives_what_onnx_runtime_gives(training: bool, dynamo: bool, tmp_path: Path) -> None:
    path = tmp_path / "exported.onnx"
    export(path, training=training, dynamo=dynamo)
    check(onnx.load(path), tmp_path, batch=3)


@pytest.mark.parametrize("dynamo", [False, True])
def test_training_export_gives_what_torch_gives_in_training(dynamo: bool, tmp_path: Path) -> None:
    path = tmp_path / "exported.onnx"
    network = export(path, training=True, dynamo=dynamo)
    graph = import_onnx(path, batch=4, dropout=0.0)
    assert kinds(graph).count("RunningStatistics") == 2
    trained = sorted(p.value.size for p in graph.parameters.values() if p.trainable)
    assert trained == sorted(p.numel() for p in network.parameters())
    torch.manual_seed(1)
    network.drop.p = 0.0
    x = torch.randn(4, 3, 21, 18)
    expected = network(x).detach().numpy()
    values = evaluate(graph, {"x": x.numpy()})
    np.testing.assert_allclose(values[graph.outputs[0]], expected, rtol=1e-4, atol=1e-5)
    mean = [
        values[new] for old, new in graph.next_value.items() if old.endswith(("bn1.running_mean", "0.running_mean"))
    ]
    np.testing.assert_allclose(mean[0], network.bn1.running_mean.numpy(), rtol=1e-4, atol=1e-6)


def test_gradients_under_the_names_of_the_model(tmp_path: Path) -> None:
    path = tmp_path / "exported.onnx"
    network = export(path, training=True, dynamo=False).double()
    graph = differentiate(import_onnx(path, batch=4, dropout=0.0), Criterion(loss="cross-entropy"))
    network.drop.p = 0.0
    x, target = torch.randn(4, 3, 21, 18, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 4, 1, 1])
    nn.functional.cross_entropy(network(x.double()), target).backward()
    values = evaluate(graph, {"x": x.numpy(), "y": target.numpy().astype(np.int32)}, exact=True)
    found = {graph.parameters[name].onnx_name: values[gradient] for name, gradient in graph.gradients.items()}
    for name, parameter in network.named_parameters():
        expected = parameter.grad.numpy()
        # the weights and epsilon of the file are float32
        np.testing.assert_allclose(found.pop(name), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max() + 1e-12)
    assert not found


def test_dropout_of_a_training_export_drops(tmp_path: Path) -> None:
    path = tmp_path / "exported.onnx"
    export(path, training=True, dynamo=False)
    (dropout,) = (op for op in import_onnx(path).ops.values() if op.kind == "Dropout")
    assert dropout.attrs["ratio"] == pytest.approx(0.3)
