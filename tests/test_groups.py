"""What plan.json says of groups: how they are split, and which bytes are borders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusetile.cluster import local_cluster
from fusetile.explain import read_plan
from fusetile.options import Training
from fusetile.pipeline import compile_model
from models import vgg_small
from tests.onnx_tools import save


def groups(plan: str, folder: Path) -> list[dict[str, Any]]:
    training = Training(batch=4, plan=plan, halo="exchange")
    model = save(vgg_small.build(width=0.25), folder)
    build = compile_model(model, cluster=local_cluster(2), training=training, build=folder / "build")
    found: list[dict[str, Any]] = read_plan(build)["groups"]
    return found


def test_borders_of_tiles_are_halos(tmp_path: Path) -> None:
    first, second, *_ = groups("grid:2x1", tmp_path)
    assert first["received_bytes"] == 0 and first["split"] == {"rows": 2}
    assert second["received_bytes"] == second["halo_bytes"] > 0
    assert [box[2] for box in second["boxes"]] == [[0, 8], [8, 16]]


@pytest.mark.parametrize(("plan", "split"), [("channel", "output channels"), ("batch", "samples"), ("single", "")])
def test_all_else_is_redistributed(plan: str, split: str, tmp_path: Path) -> None:
    found = groups(plan, tmp_path)
    assert all(group["halo_bytes"] == 0 for group in found)
    assert any(group["received_bytes"] for group in found) == (plan == "channel")
    assert any(group["split"] == ({split: 2} if split else {}) for group in found)
    assert all(group["memory_bytes"] > 0 for group in found)
