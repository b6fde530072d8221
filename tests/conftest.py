"""Property tests try the same examples every time, and take as long as the computer needs. Every program that a test
compiles has guards: what any kernel in any test writes outside of a buffer is found, and what it reads there is NaN.
Kernels are compiled in the test's process: more processes would load TVM again, and all cores have tests to do. The
processes that tests start keep their bytecode, which an emulated CPU takes seconds to make."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from fusetile.codegen.draft import Draft, memory_of
from fusetile.passes.plan_memory import MemoryPlan
from models import lenet
from tests.commands import SHAPE, images, save

settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")


def _guarded(draft: Draft, **options: bool) -> MemoryPlan:
    return memory_of(draft, **{**options, "guard": True})


os.environ["PYTHONDONTWRITEBYTECODE"] = ""
pytest.MonkeyPatch().setattr("fusetile.pipeline.memory_of", _guarded)
pytest.MonkeyPatch().setattr("fusetile.codegen.build.KERNELS_PER_PROCESS", sys.maxsize)


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of how much memory is touched: guards touch all of the arena."""
    monkeypatch.setattr("fusetile.pipeline.memory_of", memory_of)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, but for a model and its data."""
    save(lenet.build(size=16, classes=5, width=0.5), tmp_path / "model.onnx")
    images(tmp_path / "data.npz", shape=SHAPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path
