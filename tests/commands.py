"""Call the commands as a user would, without the start of a process for each; and models and data to give to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from fusetile.cli import main


def fusetile(*arguments: object) -> int:
    """`fusetile ARGUMENTS...`; returns the exit status."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def save(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model and return its path."""
    onnx.save(model, path)
    return path


def images(path: Path, *, shape: Sequence[int], classes: int = 5, seed: int = 0) -> Path:
    """Random images [M,C,H,W] with classes, as .npz."""
    random = np.random.default_rng(seed)
    np.savez(path, x=random.normal(size=shape).astype(np.float32), y=random.integers(0, classes, shape[0]))
    return path


def losses(log: Path) -> list[float]:
    """The losses of a run's log."""
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]
