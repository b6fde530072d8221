"""Networks as PyTorch exports them: one training step equals PyTorch's, each on some number of nodes by some plan.

`python -m benchmarks.coverage` goes through all numbers of nodes, plans and both exporters, and runs the kernels.
"""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import pytest

pytest.importorskip("torch")

from tests.networks import NETWORKS
from tests.networks.compare import error_of, plan_error, step_of

TOLERANCE = 1e-6  # numbers in the files are float32, the rest is float64

PLANS = [*((2, "grid:1x2"), (3, "grid:3x1"), (4, "grid:2x2"), (6, "grid:3x2"), (2, "batch"), (3, "channel"))]
PLANS += [(nodes, f"random:{seed}") for seed, nodes in enumerate((2, 3, 4, 4, 6, 6))]


@pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if "legacy" in network.exporters])
def test_a_step_in_some_plan_is_pytorchs(name: str, tmp_path: Path) -> None:
    nodes, plan = PLANS[crc32(name.encode()) % len(PLANS)]
    error, where = plan_error(step_of(name, "legacy", tmp_path), plan, nodes)
    assert error < TOLERANCE, f"{plan} on {nodes} nodes: {where} is off by {error}"


@pytest.mark.parametrize("name", ["segnet", "yolo_v8"])
def test_exports_of_the_newer_exporter(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    step = step_of(name, "dynamo", tmp_path)
    error, where = error_of(step)
    assert error < TOLERANCE, f"{where} is off by {error}"


def test_every_loss_is_used() -> None:
    assert {network.loss for network in NETWORKS.values()} == {"cross-entropy", "mse"} and len(NETWORKS) == 68
