"""`fusetile.compile` and `fusetile.train` from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import fusetile
from fusetile import RunOptions, StepRecord, Training
from models import lenet
from tests.commands import images, save


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(lenet.build(size=20, classes=5), tmp_path / "model.onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return images(tmp_path / "data.npz", shape=(12, 1, 20, 20))


TRAINING = Training(batch=4, learning_rate=0.02, plan="batch")


def values(path: Path) -> list[np.ndarray]:
    return [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]


def test_a_callback_sees_every_step_and_ends_the_training(model: Path, data: Path, tmp_path: Path) -> None:
    seen: list[StepRecord] = []

    def on_step(step: StepRecord) -> bool:
        seen.append(step)
        return step.step < 3

    run = RunOptions(steps=9, val=data, val_every=2, save_gradients=tmp_path / "g.npz", log=tmp_path / "log.jsonl")
    stopped = fusetile.train(model, data, out=tmp_path / "a", nodes=2, training=TRAINING, run=run, on_step=on_step)
    assert [step.step for step in seen] == [1, 2, 3] and stopped.steps == 3
    assert [bool(step.validation) for step in seen] == [False, True, False] and seen[1].best
    assert stopped.best == tmp_path / "a" / "best.onnx" and stopped.best.exists()
    *before, end = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [step.json() for step in seen[:2]] == before
    last = StepRecord.from_json(json.loads(end))
    assert (last.step, last.loss) == (3, seen[2].loss) and last.validation, "validated as at any end"
    assert len(np.load(tmp_path / "g.npz").files) == 10
    short = fusetile.train(model, data, out=tmp_path / "b", nodes=2, training=TRAINING, run=RunOptions(steps=3))
    assert short.best is None
    curves = [(tmp_path / name / "report.html").read_text().count("<polyline") for name in "ab"]
    assert curves == [3, 1]  # the losses of steps and of validations, and the accuracy
    for mine, theirs in zip(values(stopped.model), values(short.model), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_what_a_callback_raises_ends_the_training(model: Path, data: Path, tmp_path: Path) -> None:
    def on_step(step: StepRecord) -> None:
        raise ZeroDivisionError(step.step)

    with pytest.raises(ZeroDivisionError, match="1"):
        fusetile.train(model, data, out=tmp_path / "out", training=TRAINING, on_step=on_step)
    assert not (tmp_path / "out" / "trained.onnx").exists()


def test_compile_for_devices_and_mistakes(model: Path, tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.toml"
    cluster.write_text('[[node]]\nname = "a"\naddress = "10.0.0.1:7300"\ndevice = "host"\n')
    build = fusetile.compile(model, out=tmp_path / "build", cluster=cluster, training=TRAINING)
    assert (build / "nodes" / "a" / "program.json").exists()
    with pytest.raises(fusetile.UserError, match="no such file"):
        fusetile.train(model, tmp_path / "none.npz", out=tmp_path / "out")
    with pytest.raises(fusetile.UserError, match="here give --val DATA"):
        fusetile.train(model, tmp_path / "none.npz", out=tmp_path / "out", training=Training(validation=True))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        fusetile.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("wrong", "saying"),
    [
        ({"learning_rate": -1.0}, "--lr -1.0: must be at least 0"),
        ({"weight_decay": float("nan")}, "--weight-decay nan: must be a finite number"),
        ({"gamma": float("inf"), "schedule": "step"}, "--gamma inf: must be a finite number"),
        ({"batch": 0}, "--batch 0: must be at least 1"),
        ({"dropout": 1.0}, "--dropout 1.0: must be at most 0.99"),
        ({"optimizer": "lion"}, "--optimizer lion: choose one of sgd, adam, adamw, rmsprop"),
    ],
)
def test_options_mean_the_same_from_python(wrong: dict[str, Any], saying: str) -> None:
    with pytest.raises(fusetile.UserError, match=saying):
        Training(**wrong)
    with pytest.raises(fusetile.UserError, match="--steps 0: must be at least 1"):
        RunOptions(steps=0)


def test_the_package_loads_no_compiler() -> None:
    """A device has none."""
    code = "import sys, fusetile; print([name for name in sys.modules if name.startswith('fusetile.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Digits:
    """Samples as a program makes them."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            self.x, self.y = arrays["x"], arrays["y"]

    def __len__(self) -> int:
        return len(self.x)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from ({"x": x, "y": int(y)} for x, y in zip(self.x, self.y, strict=True))


def test_an_iterable_is_as_good_as_a_file(model: Path, tmp_path: Path) -> None:
    data = images(tmp_path / "data.npz", shape=(14, 1, 20, 20))
    run = RunOptions(epochs=2, no_shuffle=True, val=data)
    training = replace(TRAINING, batch=2, accumulate=2)
    file = fusetile.train(model, data, out=tmp_path / "a", nodes=2, training=training, run=run)
    made = fusetile.train(model, Digits(data), out=tmp_path / "b", nodes=2, training=training, run=run)
    assert made.steps == file.steps == 6
    for mine, theirs in zip(values(made.model), values(file.model), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_iterables_that_end_or_hold_something_else(model: Path, data: Path, tmp_path: Path) -> None:
    def train(samples: Iterable[dict[str, Any]], **run: Any) -> None:
        fusetile.train(model, samples, out=tmp_path / "out", training=TRAINING, run=RunOptions(**run))

    with pytest.raises(fusetile.UserError, match="have no length"):
        train(iter(Digits(data)))
    with pytest.raises(fusetile.UserError, match="end after 12 samples; a step takes 4"):
        train(iter(Digits(data)), steps=4)
    with pytest.raises(
        fusetile.UserError, match="sample 0 of the data: 'y' is 5; classes are whole numbers from 0 to 4"
    ):
        train([{"x": np.zeros((1, 20, 20)), "y": 5}])
    with pytest.raises(ZeroDivisionError):
        train(({"x": np.zeros((1, 20, 20)), "y": 1 // 0} for _ in range(9)), steps=1)
    assert not (tmp_path / "out").exists()
