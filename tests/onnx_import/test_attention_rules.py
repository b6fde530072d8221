"""Attention as newer exporters write it, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.onnx_import.checks import check
from tests.onnx_tools import model, node, normal

Q, K, V = (2, 4, 5, 6), (2, 4, 7, 6), (2, 4, 7, 3)
CASES: dict[str, tuple[list[tuple[int, ...]], dict[str, Any], np.ndarray | None]] = {
    "of heads": ([Q, K, V], {}, None),
    "of features": ([Q, K, V], {"q_num_heads": 4, "kv_num_heads": 4}, None),
    "heads that serve several": ([Q, (2, 2, 7, 6), (2, 2, 7, 3)], {}, None),
    "many heads": ([(2, 8, 5, 6), (2, 8, 7, 6), (2, 8, 7, 3)], {"scale": 0.3}, None),
    "causal": ([Q, (2, 4, 5, 6), (2, 4, 5, 3)], {"is_causal": 1}, None),
    "a mask": ([Q, K, V], {}, normal(5, 7, seed=3) > -1),
    "a bias": ([Q, K, V], {}, normal(1, 4, 5, 7, seed=3)),
    "capped": ([Q, K, V], {"softcap": 0.8}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_attention(name: str, tmp_path: Path) -> None:
    shapes, attrs, mask = CASES[name]
    inputs = {key: (None, *shape[1:]) for key, shape in zip("qkv", shapes, strict=True)}
    weights = {} if mask is None else {"m": mask}
    before, names = [], list("qkv")
    if "q_num_heads" in attrs:  # what is fed has four dimensions
        names = [f"{key}3" for key in "qkv"]
        weights |= {f"{key}_shape": np.array([0, s[2], s[1] * s[3]]) for key, s in zip("qkv", shapes, strict=True)}
        before = [node("Reshape", f"{key} {key}_shape", f"{key}3") for key in "qkv"]
    attend = node("Attention", " ".join(names) + " m" * (mask is not None), "y", **attrs)
    check(model([*before, attend], inputs, ["y"], weights, opset=24), tmp_path)
