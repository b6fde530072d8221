"""`fusetile train`: compile, real processes over TCP, trained.onnx."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from fusetile.passes import pieces, schedule
from models import lenet, resnet18, vgg_small, yolov2
from tests.commands import fusetile, images, losses, save


class Job:
    """A model with its data and options; every run has a folder of its own."""

    def __init__(self, folder: Path, model: onnx.ModelProto, *options: object, batch: int = 4, samples: int = 24):
        shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
        folder.mkdir(exist_ok=True)
        self.folder, self.model = folder, save(model, folder / "model.onnx")
        self.data = images(folder / "data.npz", shape=(samples, *shape[1:]))
        self.options = ("--data", self.data, "--batch", batch, *options)
        self.count = 0

    def run(self, *options: object) -> Path:
        """Train; returns the folder with trained.onnx, log.jsonl and gradients.npz."""
        self.count += 1
        out = self.folder / f"run{self.count}"
        logs = ("--log", self.folder / f"{self.count}.jsonl", "--save-gradients", self.folder / f"{self.count}.npz")
        assert fusetile("train", self.model, *self.options, *logs, "-o", out, *options) == 0
        (self.folder / f"{self.count}.jsonl").rename(out / "log.jsonl")
        (self.folder / f"{self.count}.npz").rename(out / "gradients.npz")
        return out


def weights(out: Path) -> dict[str, np.ndarray]:
    model = onnx.load(out / "trained.onnx")
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.fixture(scope="module")
def lenet_job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """LeNet, without BatchNorm, and its 20 steps on one node."""
    job = Job(tmp_path_factory.mktemp("lenet"), lenet.build(size=20, classes=5), "--steps", 20, "--lr", 0.02)
    return job, job.run("--nodes", 1)


@pytest.mark.parametrize(
    ("nodes", "plan"),
    [(2, "batch"), (3, "batch"), (4, "grid:2x2"), (3, "grid:3x1"), (3, "channel"), (4, "auto"), (2, "random:1")],
)
def test_twenty_steps_on_several_nodes_equal_those_of_one(lenet_job: tuple[Job, Path], nodes: int, plan: str) -> None:
    job, single = lenet_job
    out = job.run("--nodes", nodes, "--plan", plan)
    found, expected = losses(out / "log.jsonl"), losses(single / "log.jsonl")
    assert len(found) == 20 and found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-4)
    for name, value in weights(out).items():
        np.testing.assert_allclose(value, weights(single)[name], rtol=0, atol=1e-4, err_msg=name)


NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    "vgg": lambda: vgg_small.build(size=16, channels=1, classes=5, width=0.5),
    "resnet18": lambda: resnet18.build(size=64, classes=5, width=0.125),
    "yolov2": lambda: yolov2.build(layers=8, size=32, width=0.25),
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Job, Path, Path]]:
    """Of a network with BatchNorm: one step and four steps on one node."""

    @cache
    def made(network: str) -> tuple[Job, Path, Path]:
        job = Job(tmp_path_factory.mktemp(network), NETWORKS[network](), "--lr", 0.001, "--weight-decay", 5e-4)
        if network == "yolov2":  # its output is a map: a regression
            map_shape = onnx.shape_inference.infer_shapes(onnx.load(job.model)).graph.output[0].type.tensor_type.shape
            targets = np.random.default_rng(1).normal(size=(24, *(dim.dim_value for dim in map_shape.dim[1:])))
            np.savez(job.data, x=np.load(job.data)["x"], y=targets.astype(np.float32))
            job.options += ("--loss", "mse")
        return job, job.run("--nodes", 1, "--steps", 1), job.run("--nodes", 1, "--steps", 4)

    return made


@pytest.mark.parametrize(
    ("network", "nodes", "plan"),
    [
        ("vgg", 3, "auto"),
        ("vgg", 4, "batch"),
        ("vgg", 2, "channel"),
        ("resnet18", 3, "grid:3x1"),
        ("resnet18", 2, "channel"),
        ("yolov2", 4, "grid:2x2"),
        ("yolov2", 3, "batch"),
    ],
)
def test_batch_norm_sees_the_whole_batch(
    jobs: Callable[[str], tuple[Job, Path, Path]], network: str, nodes: int, plan: str
) -> None:
    job, one_step, four_steps = jobs(network)
    cut = ("--nodes", nodes, "--plan", plan)
    several = job.run(*cut, "--steps", 1), job.run(*cut, "--steps", 4)
    expected = losses(four_steps / "log.jsonl")
    assert losses(several[1] / "log.jsonl")[0] == pytest.approx(expected[0], rel=1e-5)
    assert losses(several[1] / "log.jsonl") == pytest.approx(expected, rel=1e-3)
    gradients = np.load(one_step / "gradients.npz")
    found = dict(np.load(several[0] / "gradients.npz"))
    assert found.keys() == dict(gradients).keys() and len(found) >= 15
    for name, value in found.items():
        np.testing.assert_allclose(value, gradients[name], rtol=0, atol=1e-4 * abs(gradients[name]).max(), err_msg=name)


def test_convolutions_in_pieces_over_sockets(
    jobs: Callable[[str], tuple[Job, Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut wherever they can be, not only where that is predicted to hide a transfer."""
    job, _, four_steps = jobs("yolov2")
    cut: list[pieces.Cuts] = []

    def recorded(*given: Any, **options: Any) -> pieces.Cuts:
        cut.append(pieces.cuts(*given, **options))
        return cut[-1]

    monkeypatch.setattr(pieces, "LEAST_HIDDEN_seconds", -inf)
    monkeypatch.setattr(pieces, "STRIP", 1)
    monkeypatch.setattr(schedule, "cuts", recorded)
    out = job.run("--nodes", 2, "--plan", "grid:2x1", "--halo", "exchange", "--steps", 4)
    assert max(map(len, cut)) > 10
    assert losses(out / "log.jsonl") == pytest.approx(losses(four_steps / "log.jsonl"), rel=1e-3)


def test_the_same_command_gives_the_same_bits_whatever_the_threads(tmp_path: Path) -> None:
    job = Job(tmp_path, NETWORKS["vgg"](), "--steps", 5, "--nodes", 2, "--plan", "grid:2x1")
    first, again, threads = job.run("--threads", 1), job.run("--threads", 1), job.run("--threads", 2)
    assert losses(first / "log.jsonl") == losses(again / "log.jsonl") == losses(threads / "log.jsonl")
    for name in ("trained.onnx", "trained.safetensors", "gradients.npz"):
        assert (first / name).read_bytes() == (again / name).read_bytes() == (threads / name).read_bytes(), name


def test_the_trained_model_is_the_one_that_came_in_with_new_weights(lenet_job: tuple[Job, Path]) -> None:
    job, out = lenet_job
    before, after = onnx.load(job.model), onnx.load(out / "trained.onnx")
    onnx.checker.check_model(after, full_check=True)
    assert [node.SerializeToString() for node in before.graph.node] == [
        node.SerializeToString() for node in after.graph.node
    ]
    assert [tensor.name for tensor in before.graph.initializer] == list(weights(out))
    for tensor in before.graph.initializer:
        assert not np.array_equal(onnx.numpy_helper.to_array(tensor), weights(out)[tensor.name]), tensor.name
    x = np.load(job.data)["x"]
    (logits,) = onnxruntime.InferenceSession(out / "trained.onnx").run(None, {"x": x})
    assert logits.shape == (24, 5) and np.isfinite(logits).all()


def test_shuffling_and_augmentation_depend_on_the_seed_alone(tmp_path: Path) -> None:
    job = Job(tmp_path, lenet.build(size=20, classes=5), "--steps", 8, "--augment", "flip,crop,colour")
    with np.load(job.data) as data:
        np.savez(job.data, x=(data["x"] * 40 + 128).clip(0, 255).astype(np.uint8), y=data["y"])
    plain = losses(job.run() / "log.jsonl")
    assert plain == pytest.approx(losses(job.run("--nodes", 2, "--plan", "grid:2x1") / "log.jsonl"), rel=1e-5)
    assert plain[0] != losses(job.run("--seed", 1) / "log.jsonl")[0]
    assert plain[0] != losses(job.run("--no-shuffle") / "log.jsonl")[0]


def test_training_equals_torch(tmp_path: Path) -> None:
    """A network exported from PyTorch, trained there and here on three nodes: losses, weights, running statistics."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(3, 2, 1),
        torch.nn.Conv2d(8, 16, 3, stride=2, padding=1),
        torch.nn.LeakyReLU(0.1),
        torch.nn.AvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(16 * 4 * 4, 5),
    )
    model, data = tmp_path / "exported.onnx", images(tmp_path / "data.npz", shape=(12, 3, 32, 32))
    form: dict[str, Any] = {"dynamo": False, "do_constant_folding": False, "dynamic_axes": {"x": {0: "batch"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network.eval(), (torch.zeros(2, 3, 32, 32),), str(model), input_names=["x"], **form)
    options = ("--batch", 4, "--lr", 0.05, "--momentum", 0.8, "--weight-decay", 1e-3, "--epochs", 2, "--no-shuffle")
    logs = ("--log", tmp_path / "log.jsonl", "-o", tmp_path / "out")
    assert fusetile("train", model, "--data", data, "--nodes", 3, "--plan", "grid:3x1", *options, *logs) == 0

    x, y = (torch.from_numpy(np.load(data)[name]) for name in ("x", "y"))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.8, weight_decay=1e-3)
    network.train()
    expected = []
    for start in (0, 4, 8) * 2:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(x[start : start + 4]), y[start : start + 4])
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses(tmp_path / "log.jsonl") == pytest.approx(expected, rel=1e-4)
    for name, value in network.named_parameters():
        np.testing.assert_allclose(weights(tmp_path / "out")[name], value.detach().numpy(), atol=1e-4, err_msg=name)
    (logits,) = onnxruntime.InferenceSession(tmp_path / "out" / "trained.onnx").run(None, {"x": x.numpy()})
    assert logits.shape == (12, 5)


def test_batches_of_a_step_are_one_large_batch(tmp_path: Path) -> None:
    """Without BatchNorm. Schedule, clipping and averages count steps; so do validations and checkpoints."""
    options = ("--optimizer", "adamw", "--lr", 0.01, "--schedule", "cosine", "--clip-norm", 0.5, "--ema", 0.5)
    job = Job(tmp_path, lenet.build(size=14, width=0.5, classes=5), *options, "--epochs", 2, "--guard", batch=12)
    job.options += ("--val", job.data, "--val-every", 2)
    whole = job.run("--nodes", 1)
    expected = np.load(whole / "gradients.npz")
    assert len(losses(whole / "log.jsonl")) == 4
    for nodes, plan in ((1, "single"), (2, "batch"), (3, "grid:3x1"), (4, "grid:2x2")):
        cut = job.run("--nodes", nodes, "--plan", plan, "--batch", 3, "--accumulate", 4)
        assert losses(cut / "log.jsonl") == pytest.approx(losses(whole / "log.jsonl"), rel=1e-5)
        for name, value in weights(cut).items():
            np.testing.assert_allclose(value, weights(whole)[name], rtol=0, atol=1e-5, err_msg=name)
        for name, value in np.load(cut / "gradients.npz").items():
            tolerance = 1e-4 * abs(expected[name]).max()
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=tolerance, err_msg=name)
