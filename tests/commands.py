"""Call the commands as a user would, without the start of a process for each; and models and data to give to them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from fusetile.cli import main

SHAPE = (8, 1, 16, 16)  # of the images in the working folder `here`
NODE = '[[node]]\nname = "a"\naddress = "127.0.0.1:7300"\ndevice = "host"\n'  # of a cluster.toml


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


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def refused(capfd: pytest.CaptureFixture[str], *arguments: object, saying: str) -> None:
    """The command ends with status 2, one line on stderr that matches, and leaves no new file behind."""
    before = names(Path())
    capfd.readouterr()
    status = fusetile(*arguments)
    error = capfd.readouterr().err
    assert status == 2, error
    assert re.fullmatch(r"fusetile: error: .+\n", error), error
    assert re.search(saying, error), error
    assert names(Path()) == before
