"""Networks as PyTorch exports them: one training step equals PyTorch's, as imported and on several nodes.

`python -m benchmarks.coverage` goes through all networks, plans and both exporters, and runs the kernels.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from tests.networks import NETWORKS
from tests.networks.compare import error_of, plan_error, step_of

TOLERANCE = 1e-6  # numbers in the files are float32, the rest is float64

PLANS = {
    "convnext": ("grid:2x2", 4),
    "feature_pyramid": ("channel", 3),
    "group_normalized": ("random:2", 4),
    "shufflenet": ("grid:2x2", 4),
    "siamese": ("batch", 2),
    "ssd": ("random:1", 3),
    "swin": ("random:1", 4),
    "style_transfer": ("grid:3x2", 6),
    "unet": ("grid:2x1", 2),
    "weight_standardized": ("channel", 3),
    "yolo_11_attention": ("random:3", 4),
    "yolo_v5": ("channel", 4),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_step_is_pytorchs(name: str, tmp_path: Path) -> None:
    step = step_of(name, "legacy", tmp_path)
    for error, where in (error_of(step), plan_error(step, *PLANS[name])):
        assert error < TOLERANCE, f"{where} is off by {error}"


@pytest.mark.parametrize("name", ["segnet", "vision_transformer", "yolo_v8"])
def test_exports_of_the_newer_exporter(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    step = step_of(name, "dynamo", tmp_path)
    error, where = error_of(step)
    assert error < TOLERANCE, f"{where} is off by {error}"


def test_every_loss_is_used() -> None:
    assert {network.loss for network in NETWORKS.values()} == {"cross-entropy", "mse"} and len(NETWORKS) == 59
