"""The builders: valid ONNX, right shapes, seeded weights, and the command line as the README types it."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fusetile.onnx_import import import_onnx
from fusetile.reference import evaluate
from models import darknet19, densenet121, dncnn, lenet, mobilenetv2, resnet18, resnet50, unet, vgg16, vgg_small, yolov2
from tests.onnx_tools import normal, run_ort, save

Build = Callable[..., onnx.ModelProto]

TINY = [
    (lenet.build, {"size": 14, "width": 0.5}, (10,)),
    (vgg_small.build, {"size": 17, "width": 0.25, "classes": 3}, (3,)),
    (resnet18.build, {"size": 33, "width": 0.1, "classes": 4}, (4,)),
    (mobilenetv2.build, {"size": 40, "width": 0.2, "classes": 4}, (4,)),
    (vgg16.build, {"size": 33, "width": 1 / 16, "classes": 3, "dropout": 0}, (3,)),
    (darknet19.build, {"size": 40, "width": 1 / 16, "classes": 3}, (3,)),
    (resnet50.build, {"size": 33, "width": 0.1, "classes": 4}, (4,)),
    (densenet121.build, {"size": 33, "width": 0.1, "classes": 4}, (4,)),
    (unet.build, {"size": 32, "width": 1 / 16, "classes": 3}, (3, 32, 32)),
    (unet.build, {"size": 16, "width": 1 / 16, "up": "resize"}, (2, 16, 16)),
    (dncnn.build, {"size": 12, "width": 0.1, "layers": 4}, (3, 12, 12)),
    (yolov2.build, {"size": 48, "width": 1 / 16}, (16, 3, 3)),
    (yolov2.build, {"size": 50, "width": 1 / 64, "layers": 25, "classes": 7}, (7, 1, 1)),
    (yolov2.build, {"size": 64, "width": 1 / 32, "layers": 31, "classes": 3}, (40, 2, 2)),
    (yolov2.build, {"size": 48, "width": 1 / 16, "tiny": True, "anchors": 3, "classes": 2}, (21, 3, 3)),
]


@pytest.mark.parametrize(("build", "options", "shape"), TINY)
def test_forward_equals_onnx_runtime(
    build: Build, options: dict[str, float], shape: tuple[int, ...], tmp_path: Path
) -> None:
    proto = build(**options)
    x = normal(2, *(dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim[1:]))
    expected = run_ort(proto, {"x": x})["y"]
    assert expected.shape == (2, *shape)
    values = evaluate(import_onnx(save(proto, tmp_path), batch=2, bn="frozen"), {"x": x})
    np.testing.assert_allclose(values["y"], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def trainable(proto: onnx.ModelProto) -> int:
    return sum(prod(tensor.dims) for tensor in proto.graph.initializer if ".running_" not in tensor.name)


def test_sizes_are_those_of_the_papers() -> None:
    assert trainable(lenet.build()) == 61_706
    assert trainable(resnet18.build(size=64)) == 11_689_512  # torchvision's count
    # torchvision's count, and the bounds of 35 ReLU6
    assert trainable(mobilenetv2.build(size=32)) == 3_504_872 + 2 * 35
    assert trainable(resnet50.build(size=32)) == 25_557_032  # torchvision's counts
    assert trainable(densenet121.build(size=32)) == 7_978_856
    assert trainable(vgg16.build(size=32, dropout=0)) == 138_357_544 - 48 * 512 * 4096  # 1x1 instead of 7x7 maps
    assert trainable(darknet19.build(size=32)) == 20_842_376
    assert trainable(unet.build(size=16)) == 31_037_698  # that of github.com/milesial/Pytorch-UNet
    whole = yolov2.build(size=64, layers=31)
    assert sum(prod(t.dims) for t in whole.graph.initializer) == 50_983_561  # the numbers in Redmon's yolov2.weights
    assert trainable(yolov2.build(size=32)) == 3_424_160 and len(yolov2.LAYERS) == 25


def test_seeds_and_batches() -> None:
    assert lenet.build(seed=3) == lenet.build(seed=3) != lenet.build(seed=4)
    assert lenet.build().graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert lenet.build(batch=4).graph.output[0].type.tensor_type.shape.dim[0].dim_value == 4


def test_weights_have_the_scale_of_he_initialization() -> None:
    weights = {t.name: numpy_helper.to_array(t) for t in resnet18.build(size=32).graph.initializer}
    w = weights["layer3.1.conv2.weight"]
    assert w.std() == pytest.approx(np.sqrt(2 / prod(w.shape[1:])), rel=0.01) and abs(w.mean()) < 1e-3


@pytest.mark.parametrize(
    "name",
    [
        *("darknet19", "densenet121 --batch 2", "lenet", "mobilenetv2", "resnet18", "resnet50", "vgg16 --dropout 0.3"),
        *("unet --up resize", "vgg_small", "yolov2 --layers 7"),
    ],
)
def test_command_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model.onnx"
    module, *options = name.split()
    command = f"--size 64 --width 0.1 --classes 3 --batch 2 --seed 1 -o {out}"
    monkeypatch.setattr(sys, "argv", [module, *command.split(), *options])
    runpy.run_path(f"models/{module}.py", run_name="__main__")
    onnx.checker.check_model(str(out), full_check=True)
    assert import_onnx(out).tensors["y"].shape[:2] == (2, 3)


def test_yolov2_as_typed(tmp_path: Path) -> None:
    command = "-m models.yolov2 --layers 16 --size 416 -o"
    subprocess.run([sys.executable, *command.split(), str(tmp_path / "yolov2.onnx")], check=True, timeout=60)
    assert import_onnx(tmp_path / "yolov2.onnx").tensors["y"].shape == (1, 256, 26, 26)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--size 8 -o x.onnx", "too small for conv2"),
        ("--size none -o x.onnx", "'none' is not a whole number"),
        ("--batch 0 -o x.onnx", "not a whole number >= 1"),
        ("-o no/such/folder.onnx", "No such file"),
    ],
)
def test_command_line_errors(options: str, message: str) -> None:
    result = subprocess.run([sys.executable, "-m", "models.lenet", *options.split()], capture_output=True, text=True)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
