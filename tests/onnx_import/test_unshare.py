"""BatchNormalization vectors that exporters merge by value, and those that are meant to be shared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from fusetile.onnx_export import export_onnx
from fusetile.onnx_import import import_onnx
from fusetile.onnx_import.unshare import unshare
from tests.onnx_tools import model, node, normal, run_ort, save

ONE, ZERO = np.ones(3, np.float32), np.zeros(3, np.float32)


def merged_by_name() -> onnx.ModelProto:
    """As PyTorch's newer exporter writes a fresh network."""
    nodes = [
        node("Conv", "x w zero", "c"),
        node("BatchNormalization", "c one zero zero one", "d", "bn1"),
        node("BatchNormalization", "d one zero zero one", "y", "bn2"),
    ]
    return model(nodes, {"x": ("N", 3, 4, 4)}, ["y"], {"w": normal(3, 3, 1, 1), "one": ONE, "zero": ZERO})


def merged_by_identity() -> onnx.ModelProto:
    """As PyTorch's older exporter writes it, outside training mode."""
    weights = {"w": normal(3, 3, 1, 1), "bn1.weight": ONE, "bn1.bias": ZERO}
    sources = {"bn1.running_mean": "bn1.bias", "bn1.running_var": "bn1.weight", "bn2.weight": "bn1.weight"}
    sources |= {"bn2.bias": "bn1.bias", "bn2.running_mean": "bn1.running_mean", "bn2.running_var": "bn1.weight"}
    nodes = [node("Identity", old, new) for new, old in sources.items()]
    for x, bn, y in (("c", "bn1", "d"), ("d", "bn2", "y")):
        vectors = " ".join(f"{bn}.{name}" for name in ("weight", "bias", "running_mean", "running_var"))
        nodes.append(node("BatchNormalization", f"{x} {vectors}", y, bn))
    nodes.insert(6, node("Conv", "x w", "c"))
    return model(nodes, {"x": ("N", 3, 4, 4)}, ["y"], weights)


@pytest.mark.parametrize("merged", [merged_by_name, merged_by_identity])
def test_every_norm_gets_its_own_vectors_and_the_same_result(
    merged: Callable[[], onnx.ModelProto], tmp_path: Path
) -> None:
    proto = merged()
    before = proto.SerializeToString()
    apart = unshare(proto)
    onnx.checker.check_model(apart, full_check=True)
    x = {"x": normal(2, 3, 4, 4)}
    np.testing.assert_array_equal(run_ort(apart, x)["y"], run_ort(proto, x)["y"])
    norms = [list(n.input)[1:] for n in apart.graph.node if n.op_type == "BatchNormalization"]
    assert len({name for names in norms for name in names}) == 8
    assert proto.SerializeToString() == before
    graph = import_onnx(save(proto, tmp_path))
    assert sum(p.trainable for p in graph.parameters.values()) == (6 if merged is merged_by_name else 5)
    assert len(graph.next_value) == 4


def test_names_that_identities_kept_come_back() -> None:
    names = {tensor.name for tensor in unshare(merged_by_identity()).graph.initializer}
    assert {"bn1.running_mean", "bn2.weight", "bn2.running_var"} <= names


def test_trained_values_of_merged_vectors_are_stored(tmp_path: Path) -> None:
    path = save(merged_by_name(), tmp_path)
    graph = import_onnx(path)
    trained = {p.onnx_name: normal(*p.value.shape, seed=i) for i, p in enumerate(graph.parameters.values())}
    out = export_onnx(path, trained, tmp_path / "trained.onnx")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in out.graph.initializer}
    for name, array in trained.items():
        np.testing.assert_array_equal(stored[name], array)


def test_what_is_meant_to_be_shared_stays() -> None:
    vectors = {"g": normal(3), "b": normal(3), "m": normal(3), "v": ONE}
    nodes = [node("BatchNormalization", "x g b m v", "z"), node("BatchNormalization", "z g b m v", "y")]
    proto = model(nodes, {"x": ("N", 3, 4, 4)}, ["y"], vectors)
    assert unshare(proto) is proto


def test_vectors_that_an_identity_copies(tmp_path: Path) -> None:
    """Zeros with a name of their own are weights of their own; equal random numbers are one weight with two names."""
    weights = {"w": normal(3, 3, 1, 1), "b": ZERO}
    nodes = [
        node("Identity", "b", "b2"),
        node("Identity", "b2", "b3"),
        node("Identity", "w", "w2"),
        node("Conv", "x w b", "c"),
        node("Conv", "c w2 b2", "d"),
        node("Conv", "d w2 b3", "y"),
    ]
    graph = import_onnx(save(model(nodes, {"x": ("N", 3, 4, 4)}, ["y"], weights), tmp_path))
    assert sorted(graph.parameters) == ["b", "b2", "b3", "w"]


def noted(proto: onnx.NodeProto, module: str, parameters: str) -> onnx.NodeProto:
    """A node with what PyTorch's newer exporter notes at it."""
    made_from = "".join(f", %{name}" for name in parameters.split())
    for key, value in (("name_scopes", f"['', '{module}', 'op']"), ("fx_node", f"%op : call(args = (%y{made_from}))")):
        proto.metadata_props.add(key=f"pkg.torch.onnx.{key}", value=value)
    return proto


def test_nodes_say_which_weights_are_their_own(tmp_path: Path) -> None:
    """Two normalizations and a linear layer share zeros by value; the third normalization is the first once more."""
    nodes = [
        noted(node("LayerNormalization", "x one zero", "a", axis=-1), "ln_1", "p_ln_1_weight p_ln_1_bias"),
        noted(node("LayerNormalization", "a one zero", "b", axis=-1), "ln_2", "p_ln_2_weight p_ln_2_bias"),
        noted(node("MatMul", "b w", "c"), "at.fc", "p_at_fc_weight p_at_fc_bias"),
        noted(node("Add", "c zero", "d"), "at.fc", "p_at_fc_weight p_at_fc_bias"),
        noted(node("LayerNormalization", "d one zero", "y", axis=-1), "ln_1", "p_ln_1_weight p_ln_1_bias"),
    ]
    for proto in nodes:
        for i, name in enumerate(proto.input):
            proto.input[i] = {"one": "ln_1.weight", "zero": "ln_1.bias"}.get(name, name)
    weights = {"ln_1.weight": ONE, "ln_1.bias": ZERO, "w": normal(3, 3)}
    path = save(model(nodes, {"x": ("N", 3)}, ["y"], weights), tmp_path)
    graph = import_onnx(path)
    own = {"ln_2.weight", "ln_2.bias", "at.fc.bias"}
    trained = {p.onnx_name for p in graph.parameters.values() if p.trainable}
    assert trained == {"ln_1.weight", "ln_1.bias", "w"} | own
    assert any("3 weights, such as 'at.fc.bias', that the exporter had merged" in line for line in graph.notes)
    stored = export_onnx(path, {name: normal(3) for name in own}, tmp_path / "trained.onnx")
    assert own <= {tensor.name for tensor in stored.graph.initializer}


def test_masks_that_the_exporter_has_computed_are_constant(tmp_path: Path) -> None:
    """The window mask of a shifted attention: numbers that it has put into zeros are not trained."""
    nodes = [
        node("ConstantOfShape", "shape", "zeros"),
        node("ScatterND", "zeros at val_7", "mask"),
        node("Add", "x mask", "y"),
    ]
    weights = {"shape": np.array([3]), "at": np.array([[1]]), "val_7": np.array([-100], np.float32)}
    graph = import_onnx(save(model(nodes, {"x": ("N", 3)}, ["y"], weights), tmp_path))
    assert not any(p.trainable for p in graph.parameters.values())
    assert any(p.value.reshape(-1).tolist() == [0, -100, 0] for p in graph.parameters.values())
