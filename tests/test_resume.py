"""`fusetile train` that stops and goes on, with state in the optimizer; losses that are no numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from models import lenet
from tests.commands import fusetile, images, losses, save

OPTIONS: tuple[Any, ...] = (
    "--batch",
    4,
    "--optimizer",
    "adamw",
    "--schedule",
    "cosine",
    "--warmup",
    2,
    "--clip-norm",
    1,
)


def weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def test_resumed_losses_are_those_of_a_run_that_did_not_stop(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = save(lenet.build(size=20, classes=5), tmp_path / "model.onnx")
    data = images(tmp_path / "data.npz", shape=(12, 1, 20, 20))
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    run = ("train", model, "--data", data, *OPTIONS, "--steps", 8, "--log", log, "-o", out)
    assert fusetile(*run, "--nodes", 2, "--plan", "batch", "--checkpoint-every", 5) == 0
    whole, trained = losses(log), weights(out / "trained.onnx")
    kept = out / "checkpoints"
    assert fusetile("export", kept, "-o", tmp_path / "last.onnx") == 0
    for name, value in weights(tmp_path / "last.onnx").items():
        np.testing.assert_array_equal(value, trained[name])
    for path in kept.glob("step-00000008*"):
        path.unlink()
    assert fusetile(*run, "--nodes", 2, "--plan", "batch", "--resume") == 0
    assert losses(log) == whole[5:]
    for name, value in weights(out / "trained.onnx").items():
        np.testing.assert_array_equal(value, trained[name])
    assert fusetile(*run, "--nodes", 3, "--plan", "grid:3x1", "--resume") == 0
    assert losses(log) == pytest.approx(whole[5:], rel=1e-5)
    (out / "trained.safetensors").unlink()
    (out / "trained.onnx").unlink()
    assert fusetile("export", out, "-o", tmp_path / "fifth.onnx") == 0
    fifth = weights(tmp_path / "fifth.onnx")
    assert any(not np.array_equal(fifth[name], trained[name]) for name in trained)
    capfd.readouterr()
    assert fusetile(*run, "--seed", 1, "--resume") == 2
    assert "seed = 0; this run has 1" in capfd.readouterr().err
    assert fusetile("export", tmp_path, "-o", tmp_path / "none.onnx") == 2
    assert "has the run finished" in capfd.readouterr().err


def test_a_loss_that_is_no_number_stops(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = save(lenet.build(size=20, classes=5), tmp_path / "model.onnx")
    data = images(tmp_path / "data.npz", shape=(12, 1, 20, 20))
    out = tmp_path / "out"
    assert (
        fusetile("train", model, "--data", data, "--batch", 4, "--lr", 1e20, "--steps", 9, "--nodes", 2, "-o", out) == 1
    )
    error = capfd.readouterr().err
    assert error.count("the loss of step") == 1 and "that of step 1 was" in error and "lower --lr" in error
    assert not (out / "trained.onnx").exists()
