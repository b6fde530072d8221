"""Files that can't be read, and models that can't be trained: one clear message each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from fusetile.errors import UnsupportedOp, UserError
from fusetile.onnx_import import import_onnx
from fusetile.onnx_import.files import self_contained
from models import lenet
from tests.onnx_tools import model, node, normal, save

X = {"x": ("N", 4, 6, 6)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't read the model: No such file"),
        (b"", "the file is empty"),
        (b"hello, this is no model\n" * 9, "not an ONNX model"),
        (b"PK\x03\x04 zipped", "PyTorch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (bytes(range(256)), "not an ONNX model"),
    ],
)
def test_files_that_are_no_models(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        import_onnx(path)
    assert str(path) in str(caught.value) and caught.value.exit_status == 2


def test_truncated_at_every_place(tmp_path: Path) -> None:
    data = lenet.build(size=12, width=0.2).SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in [*range(0, 200, 7), *range(200, len(data), 997), *range(len(data) - 12, len(data))]:
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cut\.onnx"):
            import_onnx(path)


def test_flipped_bytes_never_end_in_anything_but_a_message(tmp_path: Path) -> None:
    data = lenet.build(size=12, width=0.2).SerializeToString()
    random = np.random.default_rng(0)
    path, refused = tmp_path / "flipped.onnx", 0
    for place in random.integers(0, len(data), 300):
        path.write_bytes(data[:place] + random.bytes(1) + data[place + 1 :])
        try:
            import_onnx(path)
        except UserError as error:
            refused += 1
            assert "flipped.onnx" in str(error)
    assert refused > 20


def test_damaged_weights(tmp_path: Path) -> None:
    proto = lenet.build()
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-4]
    with pytest.raises(UserError, match=r"initializer 'conv1.weight' is damaged"):
        import_onnx(save(proto, tmp_path))


def external_lenet(folder: Path) -> Path:
    path = folder / "external.onnx"
    onnx.save(lenet.build(size=12), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_external_data(tmp_path: Path) -> None:
    path = external_lenet(tmp_path)
    inline = import_onnx(save(lenet.build(size=12), tmp_path))
    for name, parameter in import_onnx(path).parameters.items():
        np.testing.assert_array_equal(parameter.value, inline.parameters[name].value)
    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone" / "model.onnx"
    alone.write_bytes(self_contained(path))
    assert import_onnx(alone).parameters.keys() == inline.parameters.keys()
    assert self_contained(alone) == alone.read_bytes()
    weights = tmp_path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"external\.onnx"):
        import_onnx(path)
    weights.unlink()
    with pytest.raises(UserError, match=r"weights that are stored beside it.*weights\.bin.*same folder"):
        import_onnx(path)


def test_empty_graph(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no nodes"):
        import_onnx(save(model([], X, ["x"]), tmp_path))


@pytest.mark.parametrize(("opset", "message"), [(6, "opset 6 is not supported"), (999, "opset 999 is newer")])
def test_opsets(opset: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        import_onnx(save(model([node("Relu", "x", "y")], X, opset=opset), tmp_path))


def test_no_opset(tmp_path: Path) -> None:
    proto = model([node("Relu", "x", "y")], X)
    del proto.opset_import[:]
    with pytest.raises(UserError, match="does not say its opset"):
        import_onnx(save(proto, tmp_path))


def test_invalid_models(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not valid ONNX"):
        import_onnx(save(model([node("Relu", "nowhere", "y")], X), tmp_path))
    with pytest.raises(UserError, match="no inputs for data"):
        import_onnx(save(model([node("Relu", "w", "y")], {}, ["y"], {"w": normal(3)}), tmp_path))
    with pytest.raises(UserError, match="output 'c' does not depend on the model's inputs"):
        constant = node("Constant", "", "c", value_float=1.0)
        import_onnx(save(model([constant, node("Relu", "x", "y")], X, ["y", "c"]), tmp_path))


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        (TensorProto.INT64, ("N", 3), "input 'x' is int64; fusetile's inputs are float32"),
        (TensorProto.FLOAT16, ("N", 3), "input 'x' is float16"),
        (TensorProto.FLOAT, ("N", 3, 4), "has 3 dimensions"),
    ],
)
def test_inputs(kind: int, shape: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        import_onnx(save(model([node("Relu", "x", "y")], {"x": shape}, input_type=kind), tmp_path))


def test_all_unsupported_ops_are_named_at_once(tmp_path: Path) -> None:
    nodes = [
        node("Asinh", "x", "a", "first"),
        node("Shape", "a", "shape"),  # folded, though what it reads is not known
        node("Reshape", "a shape", "b"),
        *(node("Det", "b" if i == 0 else f"c{i - 1}", f"c{i}", f"soft{i}") for i in range(4)),
        node("RandomNormalLike", "c3", "e", "noise"),
        node("Fancy", "c3 e", "y", domain="com.acme"),
    ]
    with pytest.raises(UnsupportedOp) as caught:
        import_onnx(save(model(nodes, X), tmp_path))
    message = str(caught.value)
    for refused in (
        "Asinh (node 'first')",
        "Det (nodes 'soft0', 'soft1', 'soft2', ...)",
        "RandomNormalLike (node 'noise'; make that noise an input of the model)",
        "com.acme::Fancy (node 'y')",
    ):
        assert refused in message
    assert "Supported ops: Abs, Add, And, Av" in message and "Shape (" not in message and "model.onnx" in message


FORMS = [
    (node("Conv", "x w", "y", "n", group=2), {"w": normal(4, 3, 3, 3)}, "does not fit .* in 2 groups"),
    (node("Conv", "x w", "y", "n", group=0), {"w": normal(4, 4, 3, 3)}, "group=0 must be at least 1"),
    (node("Conv", "x w", "y", "n"), {"w": normal(4, 3, 3, 3)}, r"'w' of shape \(4, 3, 3, 3\) does not fit"),
    (node("Conv", "x w", "y", "n"), {"w": normal(4, 4, 9, 9)}, "smaller than the window"),
    (node("Conv", "x w", "y", "n"), {"w": normal(4, 4, 3)}, "only windows on"),
    (node("Conv", "x w", "y", "n", kernel_shape=[1, 1]), {"w": normal(4, 4, 3, 3)}, "kernel_shape"),
    (
        node("Conv", "x w b", "y", "n"),
        {"w": normal(4, 4, 3, 3), "b": normal(3)},
        r"'b' has shape \(3,\); expected \(4,\)",
    ),
    (node("Conv", "x w", "y", "n", pads=[-1, 0, 0, 0]), {"w": normal(4, 4, 3, 3)}, "pads"),
    (node("Conv", "x w", "y", "n", strides=[1]), {"w": normal(4, 4, 3, 3)}, "must have 2, 2 and 4 numbers"),
    (
        node("Conv", "x w", "y", "n"),
        {"w": normal(4, 4, 3, 3).astype("f2")},
        "'w' is float16; export the model in float32",
    ),
    (node("Conv", "x w", "y", "n"), {"w": normal(4, 4, 3, 3).astype("f8")}, "'w' is float64"),
    (node("Conv", "x w", "y", "n"), {"w": normal(0, 4, 3, 3)}, "is empty; is the network too narrow"),
    (node("MaxPool", "x", "y", "n", kernel_shape=[20, 20], pads=[9] * 4), {}, "more than 256"),
    (node("MaxPool", "x", "y", "n", kernel_shape=[2, 2], pads=[2] * 4), {}, "nothing but padding"),
    (node("MaxPool", "x", "y", "n", kernel_shape=[2]), {}, "only windows on"),
    (node("ReduceMean", "x", "y", "n", axes=[2, 7]), {}, "not all dimensions"),
    (node("Squeeze", "x t", "y", "n"), {"t": np.array([2])}, "not all of size 1"),
    (node("Reshape", "x t", "y", "n"), {"t": np.array([1, 100])}, "the batch must stay first"),
    (node("Gemm", "x w", "y", "n", transB=1), {"w": normal(4, 4)}, r"its input must be \[N, C\]"),
    (node("MatMul", "x w", "y", "n"), {"w": normal(4, 4, 5, 6)}, "no matrix product"),
    (node("Dropout", "x t", "y", "n"), {"t": np.float32(1)}, r"ratio 1.0 is not in \[0, 1\)"),
    (node("Pow", "x x", "y", "n"), {}, "exponent 'x' must be a constant"),
    (node("Resize", "x _ t", "y", "n"), {"t": np.array([1, 2, 1, 1], np.float32)}, "batch and channels must stay"),
    (node("Pad", "x t", "y", "n", mode="reflect"), {"t": np.array([0, 0, 9, 0, 0, 0, 0, 0])}, "can't be reflected"),
    (node("Where", "t x x", "y", "n"), {"t": np.float32(3)}, "must be a constant"),
    (node("Cast", "x", "y", "n", to=7), {}, "another type"),
    (node("Div", "x t", "y", "n"), {"t": np.float32(0)}, "divides by 't', which is 0"),
    (node("BatchNormalization", "x g g m v", "y", "n"), dict.fromkeys("gmv", normal(3)), r"'g' has shape \(3,\)"),
]


@pytest.mark.parametrize(("bad", "weights", "message"), FORMS)
def test_forms_that_are_refused(
    bad: onnx.NodeProto, weights: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    opset = 19 if bad.op_type == "AveragePool" else 17
    with pytest.raises(UserError, match=message) as caught:
        import_onnx(save(model([bad], X, ["y"], weights, opset=opset), tmp_path))
    assert f"{bad.op_type} node 'n'" in str(caught.value) and "model.onnx" in str(caught.value)


def test_second_outputs_that_are_read_are_refused(tmp_path: Path) -> None:
    pool = node("MaxPool", "x", "y indices", "n", kernel_shape=[2, 2])
    with pytest.raises(UnsupportedOp, match="output 'indices': it is the indices of a MaxPool"):
        import_onnx(save(model([pool], X, ["y", "indices"]), tmp_path))


def test_spatial_of_old_batch_normalization(tmp_path: Path) -> None:
    vectors = {name: np.ones(4, np.float32) for name in "gbmv"}
    bad = node("BatchNormalization", "x g b m v", "y", spatial=0)
    with pytest.raises(UnsupportedOp, match="spatial=0"):
        import_onnx(save(model([bad], X, ["y"], vectors, opset=7), tmp_path))


def test_sparse_weights(tmp_path: Path) -> None:
    proto = model([node("Conv", "x w", "y")], X)
    values = onnx.numpy_helper.from_array(np.ones(1, np.float32), "w")
    indices = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "w_indices")
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [4, 4, 1, 1]))
    with pytest.raises(UserError, match="'w' is sparse"):
        import_onnx(save(proto, tmp_path))
