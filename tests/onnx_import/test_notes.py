"""One line about an export for inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusetile.onnx_import import import_onnx
from tests.onnx_import.checks import X
from tests.onnx_tools import model, node, normal, save


def notes(tmp_path: Path, last: Any, names: tuple[str, str], **options: Any) -> list[str]:
    weights = {names[0]: normal(4, 3, 3, 3), names[1]: normal(4)} | dict.fromkeys("gbmv", np.ones(4, np.float32))
    proto = model([node("Conv", " ".join(["x", *names]), "c"), *last], X, ["y"], weights)
    return import_onnx(save(proto, tmp_path), batch=2, **options).notes


@pytest.mark.parametrize("names", [("onnx::Conv_26", "onnx::Conv_27"), ("c1.weight", "c1.weight_bias")])
def test_a_folded_norm_is_named(names: tuple[str, str], tmp_path: Path) -> None:
    (line,) = notes(tmp_path, [node("Relu", "c", "y")], names)
    assert "folded into 1 convolution (Dropout" in line and "trains as it stands" in line and "\n" not in line


def test_a_norm_in_inference_form_is_named(tmp_path: Path) -> None:
    last = [node("BatchNormalization", "c g b m v", "d"), node("Dropout", "d", "y")]
    (line,) = notes(tmp_path, last, ("w", "bias"))
    assert "1 BatchNormalization in inference form will train" in line and "gone" not in line
    assert not notes(tmp_path, last, ("w", "bias"), bn="frozen")


def test_an_export_for_training_needs_no_line(tmp_path: Path) -> None:
    norm = node("BatchNormalization", "c g b m v", "y rm rv", training_mode=1)
    assert not notes(tmp_path, [norm], ("c1.weight", "c1.bias"))
