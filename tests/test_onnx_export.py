"""The exported model is the one that came in, with other values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fusetile.errors import UserError
from fusetile.onnx_export import export_onnx
from fusetile.onnx_import import import_onnx
from models import vgg_small
from tests.onnx_tools import model, node, normal, run_ort, save


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_only_the_given_initializers_change(tmp_path: Path) -> None:
    proto = vgg_small.build(size=16, width=0.25)
    proto.graph.initializer[0].doc_string = "the first"
    source, out = save(proto, tmp_path), tmp_path / "trained.onnx"
    graph = import_onnx(source)
    trained = {p.onnx_name: np.abs(normal(*p.value.shape, seed=1)) for p in graph.parameters.values()}
    kept = trained.popitem()[0]
    export_onnx(source, trained, out)
    onnx.checker.check_model(str(out), full_check=True)
    before, after = initializers(source), initializers(out)
    assert list(before) == list(after)
    for name in before:
        np.testing.assert_array_equal(after[name], before[name] if name == kept else trained[name])
    result = onnx.load(out)
    assert result.graph.initializer[0].doc_string == "the first"
    for field in ("node", "input", "output"):
        assert list(getattr(result.graph, field)) == list(getattr(proto.graph, field))
    assert np.isfinite(run_ort(result, {"x": normal(2, 3, 16, 16)})["y"]).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "trained.onnx"]


def test_model_given_as_proto_is_not_changed(tmp_path: Path) -> None:
    proto = model([node("Gemm", "x w b", "y")], {"x": (1, 3)}, ["y"], {"w": normal(3, 2), "b": normal(1, 2)})
    before = proto.SerializeToString()
    export_onnx(proto, {"b": np.array([5, 6], np.float32)}, tmp_path / "out.onnx")
    assert proto.SerializeToString() == before
    np.testing.assert_array_equal(initializers(tmp_path / "out.onnx")["b"], [[5, 6]])


def test_external_data_are_taken_into_the_file(tmp_path: Path) -> None:
    source, out = tmp_path / "in" / "model.onnx", tmp_path / "trained.onnx"
    source.parent.mkdir()
    onnx.save(vgg_small.build(size=8), source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    export_onnx(source, {"fc.bias": np.arange(10, dtype=np.float32)}, out)
    (source.parent / "weights.bin").unlink()
    after = initializers(out)
    np.testing.assert_array_equal(after["fc.bias"], np.arange(10))
    np.testing.assert_array_equal(
        after["fc.weight"], numpy_helper.to_array(vgg_small.build(size=8).graph.initializer[-2])
    )


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ({"nothing": normal(3)}, "no initializer 'nothing'"),
        ({"w": normal(2, 3)}, r"'w' has shape \(3, 2\), its trained value \(2, 3\)"),
        ({"w": normal(3, 2).astype(np.float64)}, "its trained value float64"),
        ({"t": normal(1)}, "'t' is int64"),
    ],
)
def test_values_that_do_not_fit(trained: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    nodes = [node("Gemm", "x w", "z"), node("Reshape", "z t", "y")]
    proto = model(nodes, {"x": ("N", 3)}, ["y"], {"w": normal(3, 2), "t": np.array([-1, 2])})
    with pytest.raises(UserError, match=message):
        export_onnx(proto, trained, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_target_that_can_not_be_written(tmp_path: Path) -> None:
    proto = model([node("Relu", "x", "y")], {"x": (1, 3)})
    with pytest.raises(UserError, match=r"can't write .*nowhere.out\.onnx: No such file"):
        export_onnx(proto, {}, tmp_path / "nowhere" / "out.onnx")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"can't write .*folder: Is a directory"):
        export_onnx(proto, {}, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
