"""`fusetile train --val`: what is printed is what ONNX Runtime computes with the model of that step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from fusetile.onnx_import import import_onnx
from fusetile.passes.differentiate import BoxOptions, Criterion, add_loss
from fusetile.passes.fuse import fuse
from fusetile.passes.infer import infer
from fusetile.passes.prune import prune
from fusetile.reference import evaluate
from fusetile.runtime.precision import detections, mean_average_precision, suppressed, true_boxes
from models import vgg_small
from tests.commands import fusetile, images, save
from tests.graphs import feeds
from tests.training import training_graph
from tests.yolo import ANCHORS, loss_alone, random_boxes

Array = np.ndarray


def log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(model: Path, data: Path) -> tuple[Array, Array]:
    """Outputs of ONNX Runtime in float64, and targets."""
    with np.load(data) as arrays:
        (output,) = onnxruntime.InferenceSession(model).run(None, {"x": arrays["x"].astype(np.float32)})
        return output.astype(np.float64), arrays["y"]


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def classes(model: Path, data: Path) -> dict[str, float]:
    logits, y = answers(model, data)
    order = np.argsort(-logits, axis=1, kind="stable")
    return {
        "val_loss": float(-np.take_along_axis(log_softmax(logits), y[:, None], 1).mean()),
        "val_accuracy": float((order[:, 0] == y).mean()),
        "val_top5": float((order[:, :5] == y[:, None]).any(1).mean()),
    }


def check(record: Mapping[str, Any], expected: Mapping[str, float], rel: float = 1e-4) -> None:
    assert {name for name in record if name.startswith("val_")} == set(expected)
    assert {name: record[name] for name in expected} == pytest.approx(dict(expected), rel=rel)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A network with BatchNorm and Dropout, data to train on, and held-back data of no whole number of batches."""
    folder = tmp_path_factory.mktemp("classifier")
    model = save(vgg_small.build(size=16, channels=1, classes=7, width=0.25), folder / "model.onnx")
    train = images(folder / "train.npz", shape=(24, 1, 16, 16), classes=7)
    return model, train, images(folder / "val.npz", shape=(11, 1, 16, 16), classes=7, seed=1)


@pytest.mark.parametrize(("nodes", "plan"), [(3, "grid:3x1"), (4, "auto")])
def test_classes(classifier: tuple[Path, Path, Path], nodes: int, plan: str, tmp_path: Path) -> None:
    model, train, val = classifier
    options = ("--batch", 4, "--lr", 0.02, "--steps", 5, "--nodes", nodes, "--plan", plan, "--val", val)
    more = ("--val-every", 2, "--log", tmp_path / "log.jsonl", "-o", tmp_path / "out", "--guard")
    assert fusetile("train", model, "--data", train, *options, *more) == 0
    records = log(tmp_path / "log.jsonl")
    assert [record["step"] for record in records if "val_loss" in record] == [2, 4, 5]
    check(records[-1], classes(tmp_path / "out" / "trained.onnx", val))
    best = max((r for r in records if "val_loss" in r), key=lambda r: (r["val_accuracy"], -r["val_loss"]))
    check(best, classes(tmp_path / "out" / "best.onnx", val))


def one_layer(folder: Path, *, outputs: int = 3) -> Path:
    """y = Conv(x) [N,outputs,6,5]."""
    w = np.random.default_rng(0).normal(size=(outputs, 2, 3, 3)).astype(np.float32) / 4
    made = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", channels, 6, 5])
        for name, channels in (("x", 2), ("out", outputs))
    ]
    node = onnx.helper.make_node("Conv", ["x", "w"], ["out"], pads=[1, 1, 1, 1])
    graph = onnx.helper.make_graph([node], "one", made[:1], made[1:], [onnx.numpy_helper.from_array(w, "w")])
    opset = [onnx.helper.make_opsetid("", 17)]
    return save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), folder / "model.onnx")


WEIGHTS = np.array([1, 0.5, 2])


def pixels(output: Array, y: Array) -> dict[str, float]:
    counted, label = y != 9, np.where(y == 9, 0, y)
    losses = -np.take_along_axis(log_softmax(output), label[:, None], 1)[:, 0]
    weight = WEIGHTS[label] * counted
    answer = output.argmax(1)
    overlaps = [
        ((answer == c) & (y == c) & counted).sum() / (((answer == c) | (y == c)) & counted).sum() for c in range(3)
    ]
    return {
        "val_loss": (losses * weight).sum() / weight.sum(),
        "val_accuracy": (answer == y)[counted].mean(),
        "val_mean_iou": np.mean(overlaps),
    }


def regression(output: Array, y: Array) -> dict[str, float]:
    errors = np.square(output - y)
    return {"val_loss": errors.mean(), "val_psnr": np.mean(-10 * np.log10(errors.mean((1, 2, 3))))}


def dice(output: Array, y: Array) -> dict[str, float]:
    p, axes = 1 / (1 + np.exp(-output)), (0, 2, 3)
    return {"val_loss": 1 - np.mean((2 * (p * y).sum(axes) + 1) / (p.sum(axes) + y.sum(axes) + 1))}


def binary(output: Array, y: Array) -> dict[str, float]:
    losses = np.maximum(output, 0) - output * y + np.log1p(np.exp(-abs(output)))
    return {"val_loss": losses.mean(), "val_accuracy": ((output > 0) == (y > 0.5)).mean()}


def detector(output: Array, y: Array) -> dict[str, float]:
    """The loss by the row's reference. A box may be right that is not where it is expected: see test_precision.py."""
    graph = loss_alone(output, BoxOptions(anchors=ANCHORS[:4], most=y.shape[1]))
    (target,) = graph.targets
    found = detections(output, ANCHORS[:4], output.shape[2:], np.arange(len(output)))
    average = mean_average_precision(suppressed(found), true_boxes(y, np.arange(len(y))))
    assert average > 0
    return {"val_loss": evaluate(graph, {target: y}, exact=True)[graph.loss][0], "val_map50": average}


LABELS = np.random.default_rng(1).choice([0, 1, 2, 9], (17, 6, 5))
MAPS = np.random.default_rng(2).random((17, 3, 6, 5)).astype(np.float32)
BOXES = random_boxes(np.random.default_rng(4), images=17, most=33, classes=2)  # more than there is room for by default
LOSSES: dict[str, tuple[Any, Array, tuple[object, ...]]] = {
    "cross-entropy": (pixels, LABELS, ("--ignore-index", 9, "--class-weights", "1,0.5,2", "--plan", "grid:2x1")),
    "mse": (regression, MAPS, ("--plan", "grid:1x2")),
    "dice": (dice, MAPS, ("--plan", "batch", "--ema", 0.5)),
    "yolov2": (detector, BOXES, ("--anchors", "1.2,0.9 2.5,3", "--plan", "grid:2x1")),
    "bce-with-logits": (binary, MAPS, ("--plan", "channel")),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_maps(loss: str, tmp_path: Path) -> None:
    """Ten samples to train on, seven to validate: two batches, of which the last lacks one."""
    expected, y, options = LOSSES[loss]
    x = np.random.default_rng(3).normal(size=(17, 2, 6, 5)).astype(np.float32)
    np.savez(tmp_path / "train.npz", x=x[:10], y=y[:10])
    np.savez(tmp_path / "val.npz", x=x[10:], y=y[10:])
    model, out = one_layer(tmp_path, outputs=14 if loss == "yolov2" else 3), tmp_path / "out"
    data = ("--data", tmp_path / "train.npz", "--val", tmp_path / "val.npz", "--log", tmp_path / "log.jsonl")
    run = ("--loss", loss, "--nodes", 2, *options, "--batch", 4, "--guard", "-o", out)
    assert fusetile("train", model, *data, *run) == 0
    check(log(tmp_path / "log.jsonl")[-1], expected(*answers(out / "trained.onnx", tmp_path / "val.npz")))


def test_training_that_gets_no_better_stops(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With a learning rate of 0; the model computes its loss itself, as a mean over the samples."""
    folder = tmp_path / "plain"
    folder.mkdir()
    model = onnx.load(one_layer(folder))
    target, loss = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("y", ["n", 3, 6, 5]), ("loss", []))
    )
    model.graph.input.append(target)
    del model.graph.output[:]
    model.graph.output.append(loss)
    model.graph.node.append(onnx.helper.make_node("Sub", ["out", "y"], ["error"]))
    model.graph.node.append(onnx.helper.make_node("Mul", ["error", "error"], ["square"]))
    model.graph.node.append(onnx.helper.make_node("ReduceMean", ["square"], ["loss"], keepdims=0))
    x = np.random.default_rng(3).normal(size=(17, 2, 6, 5)).astype(np.float32)
    np.savez(tmp_path / "train.npz", x=x[:10], y=MAPS[:10])
    np.savez(tmp_path / "val.npz", x=x[10:], y=MAPS[10:])
    out = tmp_path / "out"
    data = ("--data", tmp_path / "train.npz", "--val", tmp_path / "val.npz", "--log", tmp_path / "log.jsonl")
    run = ("--loss", "model", "--lr", 0, "--batch", 4, "--steps", 9, "--nodes", 2, "-o", out)
    own = save(model, tmp_path / "model.onnx")
    assert fusetile("train", own, *data, *run, "--val-every", 1, "--patience", 2, "--checkpoint-every", 3) == 0
    records = log(tmp_path / "log.jsonl")
    (output,) = onnxruntime.InferenceSession(folder / "model.onnx").run(None, {"x": x[10:]})
    assert [record["val_loss"] for record in records] == [pytest.approx(np.square(output - MAPS[10:]).mean())] * 3
    assert "no validation since step 1 was better" in capfd.readouterr().out
    assert [path.name for path in sorted((out / "best").glob("*-2.safetensors"))] == [
        f"step-00000001.rank-{rank}-of-2.safetensors" for rank in range(2)
    ]
    assert fusetile("export", out / "best", "-o", tmp_path / "best.onnx") == 0
    assert (tmp_path / "best.onnx").read_bytes() == (out / "best.onnx").read_bytes()
    more = ("--val-every", 1, "--patience", 3, "--resume")
    assert fusetile("train", own, *data, *run, *more) == 0
    assert [record["step"] for record in log(tmp_path / "log.jsonl")] == [4]
    assert fusetile("train", own, *data[:2], *run, "--patience", 2) == 2
    assert "--patience 2 needs --val" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["mobilenet_v3", "googlenet", "vision_transformer", "unet", "siamese"])
def test_the_forward_pass_is_that_of_a_trained_model(name: str, tmp_path: Path) -> None:
    """PyTorch's, in evaluation mode; and every op has the name, and so the place, of one of the training step."""
    torch = pytest.importorskip("torch")
    from tests.networks import NETWORKS, export, made

    module, shapes = made(name), NETWORKS[name].inputs
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    export(module, shapes, tmp_path / "model.onnx", "legacy")
    graph, loss = import_onnx(tmp_path / "model.onnx", batch=2), NETWORKS[name].loss
    trained = training_graph(graph, loss=loss)
    inference = fuse(prune(infer(add_loss(graph, Criterion(loss=loss)), trained=trained)))
    assert set(inference.ops) <= set(trained.ops)
    fed = feeds(inference)
    found = evaluate(inference, fed)
    with torch.no_grad():
        outputs = module.eval()(*(torch.from_numpy(fed[key]) for key in inference.inputs))
    for key, output in zip(inference.outputs, [outputs] if torch.is_tensor(outputs) else outputs, strict=True):
        np.testing.assert_allclose(found[key].reshape(output.shape), output.numpy(), atol=1e-4, rtol=1e-4)
