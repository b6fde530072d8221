"""Rules of ops that move, reduce, resample or normalize, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fusetile.errors import UnsupportedOp
from fusetile.onnx_import import import_onnx
from fusetile.reference import evaluate
from tests.graphs import feeds
from tests.onnx_import.checks import check, kinds
from tests.onnx_import.moving_cases import CASES, X, ints, number
from tests.onnx_tools import model, node, normal, run_ort, save
from tests.training import planned, run_plan, training_graph, worst


@pytest.mark.parametrize("name", CASES)
def test_against_onnx_runtime(name: str, tmp_path: Path) -> None:
    nodes, weights = CASES[name]
    check(model(nodes, X, weights=weights), tmp_path)


def test_weights_that_are_written_over_in_part_are_trained(tmp_path: Path) -> None:
    nodes, weights = CASES["zeros written over a part"]
    graph = training_graph(import_onnx(save(model(nodes, X, weights=weights), tmp_path)), loss="mse")
    gradient = evaluate(graph, feeds(graph))[graph.gradients["b"]].reshape(-1)
    assert not gradient[2:4].any() and gradient[[0, 1, 4, 5]].all()


def test_numbers_computed_are_not_written_over_a_part(tmp_path: Path) -> None:
    nodes = [node("Tanh", "b", "z"), node("ScatterND", "x places z", "y", "write")]
    with pytest.raises(UnsupportedOp, match="ScatterND node 'write': only constants can be written over a part"):
        import_onnx(save(model(nodes, X, weights={"b": normal(1, 4, 5)} | ints(places=[[0, 0]])), tmp_path))


@pytest.mark.parametrize(
    ("size", "block", "attrs"),
    [
        ([5, 6], [1, 3], {"strides": [1, 3]}),
        ([6, 4], [2, 3], {"strides": [1, 2], "pads": [0, 1, 1, 0], "dilations": [2, 1]}),
    ],
    ids=["side by side", "with overlap"],
)
def test_patches(size: list[int], block: list[int], attrs: dict[str, Any], tmp_path: Path) -> None:
    channels = 2 * block[0] * block[1]
    nodes = [node("Reshape", "x three", "t"), node("Col2Im", "t size block", "y", **attrs)]
    weights = ints(three=[2, channels, -1], size=size, block=block)
    check(model(nodes, {"x": (2, channels, 2, 5)}, weights=weights, opset=18), tmp_path)


REDUCTIONS = [(axes, keep) for axes in ([1], [2, 3], [-1], [1, 2, 3], [0, 2, 3]) for keep in (0, 1)]


@pytest.mark.parametrize("kind", ["Sum", "Mean", "L1", "L2", "SumSquare", "Max", "Min"])
def test_reductions(kind: str, tmp_path: Path) -> None:
    """Joined by their sums over everything that is left, so that one session runs all."""
    nodes, weights, opset = [], ints(), 13 if kind == "Sum" else 17
    for i, (axes, keep) in enumerate(REDUCTIONS):
        attrs: dict[str, Any] = {"keepdims": keep} if opset == 13 else {"keepdims": keep, "axes": axes}
        weights |= ints(**{f"a{i}": axes})
        nodes.append(node(f"Reduce{kind}", f"x a{i}" if opset == 13 else "x", f"y{i}", **attrs))
    check(model(nodes, X, [f"y{i}" for i in range(len(REDUCTIONS))], weights, opset=opset), tmp_path)


@pytest.mark.parametrize("opset", [11, 18])
@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
def test_softmax(kind: str, opset: int, tmp_path: Path) -> None:
    nodes = [node("Mul", "x big", "z"), *(node(kind, "z", f"y{axis}", axis=axis) for axis in (1, 2, 3))]
    check(model(nodes, X, ["y1", "y2", "y3"], {"big": number(40)}, opset=opset), tmp_path)


def test_products_and_layers_with_the_channels_last_stay_where_they_are(tmp_path: Path) -> None:
    nodes, weights = CASES["layer norm of channels last"]
    graph = check(model(nodes, X, weights=weights), tmp_path)
    assert "Rearrange" not in kinds(graph) and kinds(graph).count("Conv") == 1


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_pad(mode: str, tmp_path: Path) -> None:
    nodes, weights = [], {"v": number(0.5)}
    for i, pads in enumerate(([0, 0, 1, 2, 0, 0, 3, 1], [0, 0, 0, -1, 0, 0, 2, 1])):
        weights |= ints(**{f"p{i}": pads})
        nodes.append(node("Pad", f"x p{i} v" if mode == "constant" else f"x p{i}", f"y{i}", mode=mode))
    if mode == "constant":
        weights |= ints(p2=[0, 1, 0, 1, 0, 2, 0, 1])
        nodes.append(node("Pad", "x p2", "y2"))
        weights["low"] = number(-np.inf)
        nodes += [node("Pad", "x p0 low", "padded"), node("MaxPool", "padded", "y3", kernel_shape=[2, 2])]
    outputs = [f"y{i}" for i in range(4 if mode == "constant" else 2)]
    check(model(nodes, X, outputs, weights), tmp_path)


def test_a_pad_of_zeros_becomes_the_convolutions(tmp_path: Path) -> None:
    nodes = [
        node("Pad", "x p", "a"),
        node("Conv", "a w", "y", pads=[1, 0, 0, 1]),
        node("MaxPool", "a", "z", kernel_shape=[3, 3]),
    ]
    graph = check(model(nodes, X, ["y", "z"], {"w": normal(2, 6, 3, 3)} | ints(p=[0, 0, 1, 2, 0, 0, 0, 1])), tmp_path)
    assert graph.ops["y"].attrs["pads"] == (2, 2, 0, 2)


RESIZES: list[dict[str, Any]] = [
    *(
        {"mode": "nearest", "coordinate_transformation_mode": form, "nearest_mode": rounding}
        for form in ("asymmetric", "half_pixel", "align_corners")
        for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
    ),
    *(
        {"mode": mode, "coordinate_transformation_mode": form}
        for mode in ("linear", "cubic")
        for form in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
    ),
    {"mode": "cubic", "exclude_outside": 1, "cubic_coeff_a": -0.5},
]


def test_group_normalization_with_weights_per_group(tmp_path: Path) -> None:
    """As before opset 21; and the gradients of such weights, on several nodes."""
    weights = {"s": normal(3), "b": normal(3, seed=1)}
    proto = model(
        [node("GroupNormalization", "x s b", "y", num_groups=3)], {"x": (2, 12, 4, 3)}, ["y"], weights, opset=18
    )
    check(proto, tmp_path)
    graph = training_graph(import_onnx(tmp_path / "model.onnx"), loss="mse")
    assert set(graph.gradients) == {"s", "b"}
    fed = feeds(graph)
    expected = evaluate(graph, fed)
    for plan in ("batch", "channel", "random:1", "random:2"):
        error, where = worst(run_plan(graph, *planned(graph, plan, 3), fed), expected)
        assert error < 1e-5, f"{plan}: {where} is off by {error}"


def test_resize(tmp_path: Path) -> None:
    """By scales and by sizes, whole and not, larger and smaller."""
    scales = {f"s{i}": np.array([1, 1, *s], np.float32) for i, s in enumerate(((2, 2), (1.5, 2.4), (0.5, 0.6)))}
    sizes = ints(z0=[2, 6, 7, 9], z1=[2, 6, 3, 1])
    nodes = []
    for attrs in RESIZES:
        nodes += [node("Resize", f"x _ {name}", f"y{len(nodes) + i}", **attrs) for i, name in enumerate(scales)]
        nodes += [node("Resize", f"x _ _ {name}", f"y{len(nodes) + i}", **attrs) for i, name in enumerate(sizes)]
    check(model(nodes, X, [f"y{i}" for i in range(len(nodes))], scales | sizes), tmp_path)


@pytest.mark.parametrize("opset", [9, 10])
def test_resize_of_old_opsets(opset: int, tmp_path: Path) -> None:
    scales = {"s": np.array([1, 1, 2, 3], np.float32)}
    kind = "Upsample" if opset == 9 else "Resize"
    nodes = [node(kind, "x s", f"y{i}", mode=mode) for i, mode in enumerate(("nearest", "linear"))]
    check(model(nodes, X, ["y0", "y1"], scales, opset=opset), tmp_path)


def test_average_pool_with_dilations(tmp_path: Path) -> None:
    common = {"kernel_shape": [2, 2], "dilations": [2, 3], "pads": [1, 1, 0, 1]}
    nodes = [node("AveragePool", "x", f"y{i}", count_include_pad=i, **common) for i in (0, 1)]
    check(model(nodes, X, ["y0", "y1"], opset=19), tmp_path)


def test_transposed_convolutions_that_say_the_size_of_the_output(tmp_path: Path) -> None:
    nodes = [
        node("ConvTranspose", "x w", "y0", strides=[2, 2], output_shape=[9, 10]),
        *(
            node("ConvTranspose", "x w", f"y{i}", strides=[2, 2], auto_pad=f"SAME_{end}")
            for i, end in ((1, "UPPER"), (2, "LOWER"))
        ),
    ]
    check(model(nodes, X, ["y0", "y1", "y2"], {"w": normal(6, 3, 3, 4)}), tmp_path)


def test_gemm_of_a_transposed_map(tmp_path: Path) -> None:
    nodes = [node("Reshape", "x r", "m"), node("Gemm", "m w b", "y", transA=1)]
    check(model(nodes, X, weights={"w": normal(12, 3), "b": normal(3)} | ints(r=[12, 20])), tmp_path)


def test_sequences(tmp_path: Path) -> None:
    """Newer exporters write chunk and split so."""
    nodes = [
        node("SplitToSequence", "x sizes", "s", axis=1),
        node("SequenceAt", "s one", "b"),
        node("SequenceAt", "s last", "c"),
        node("SplitToSequence", "c each", "t", axis=2),
        node("SequenceAt", "t zero", "d"),
        node("Relu", "b", "y"),
        node("Relu", "d", "z"),
    ]
    weights = ints(sizes=[1, 3, 2]) | {k: np.array(v) for k, v in (("one", 1), ("last", -1), ("zero", 0), ("each", 3))}
    check(model(nodes, X, ["y", "z"], weights), tmp_path)


@pytest.mark.parametrize("kind", ["Split", "Slice"])
def test_both_halves(kind: str, tmp_path: Path) -> None:
    if kind == "Split":
        nodes, weights = (
            [node("Split", "x", "a b", axis=1), node("Split", "x p", "c unused d", axis=2)],
            ints(p=[1, 2, 1]),
        )
    else:
        nodes = [
            node("Slice", "x s e k", "a"),
            node("Slice", "x e f k", "b"),
            node("Slice", "x s t r", "c"),
            node("Slice", "x m f r", "d"),
        ]
        weights = ints(s=[0], e=[3], f=[99], k=[1], t=[1], r=[2], m=[-1])
    nodes += [node("Sub", "a b", "y"), node("Mul", "c d", "z")]
    check(model(nodes, X, ["y", "z"], weights, opset=13), tmp_path)


def test_a_choice_that_is_known_when_compiling(tmp_path: Path) -> None:
    """Exporters write Squeeze of an unknown size as If."""
    ends = [onnx.helper.make_tensor_value_info("end", 1, None)]
    chosen, other = (
        onnx.helper.make_graph([node(kind, operands, "end")], kind, [], ends)
        for kind, operands in (("Squeeze", "x5 axis"), ("Identity", "x5"))
    )
    nodes = [
        node("Reshape", "x five", "x5"),
        node("Shape", "x5", "shape"),
        node("Gather", "shape one", "size"),
        node("Equal", "size one", "same"),
        node("If", "same", "squeezed", then_branch=chosen, else_branch=other),
        node("Relu", "squeezed", "y"),
    ]
    check(model(nodes, X, weights=ints(five=[0, 1, 6, 4, 5], axis=[1]) | {"one": np.array(1)}), tmp_path)


def test_batch_normalization_of_two_inputs(tmp_path: Path) -> None:
    """Of two branches with shared weights: the running statistics see one batch after the other."""
    vectors = {"g": normal(3), "b": normal(3, seed=1), "m": normal(3, seed=2), "v": np.ones(3, np.float32)}
    nodes = [node("BatchNormalization", f"{x} g b m v", y, momentum=0.8) for x, y in (("x0", "y0"), ("x1", "y1"))]
    proto = model([*nodes, node("Add", "y0 y1", "y")], {"x0": (2, 3, 4, 5), "x1": (2, 3, 4, 5)}, weights=vectors)
    graph = import_onnx(save(proto, tmp_path))
    feeds = {name: normal(2, 3, 4, 5, seed=i) for i, name in enumerate(graph.inputs)}
    values = evaluate(graph, feeds)
    mean = vectors["m"]
    for x in feeds.values():
        mean = 0.8 * mean + 0.2 * x.mean((0, 2, 3))
    np.testing.assert_allclose(values[graph.next_value["m"]], mean, rtol=1e-5)


def test_an_output_of_five_dimensions_keeps_its_last_ones_as_one(tmp_path: Path) -> None:
    """The raw head of a YOLO: [N, anchors, rows, columns, numbers]."""
    weights = {"w": normal(14, 6, 1, 1), "s": np.array([0, 2, 7, 4, 5])}
    nodes = [node("Conv", "x w", "c"), node("Reshape", "c s", "v"), node("Transpose", "v", "y", perm=[0, 1, 3, 4, 2])]
    proto = model(nodes, X, ["y"], weights)
    graph = import_onnx(save(proto, tmp_path), batch=2)
    x = normal(2, 6, 4, 5)
    (expected,) = run_ort(proto, {"x": x}).values()
    assert expected.shape == (2, 2, 4, 5, 7) and graph.tensors["y"].shape == (2, 2, 4, 35)
    found = evaluate(graph, {"x": x})["y"].reshape(expected.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


GRIDS = {
    "a point": np.array([1, 2]),
    "some images": np.array([[1], [0]]),
    "windows": np.stack(
        np.broadcast_arrays(np.array([[0, 1], [1, 0]])[:, :, None], np.array([[2, 0, 5]])[:, None]), -1
    ),
    "rows of channels": np.stack(np.meshgrid([0, 1], [2, 0], [3, 0, 2], indexing="ij"), -1),
}


@pytest.mark.parametrize("name", GRIDS)
def test_gather_nd(name: str, tmp_path: Path) -> None:
    nodes = [node("GatherND", "x i", "g"), node("ReduceSum", "g last", "y", keepdims=0)]
    check(model(nodes, X, weights={"i": GRIDS[name], "last": np.array([-1])}), tmp_path)


def test_gather_nd_of_scattered_points_is_refused(tmp_path: Path) -> None:
    proto = model([node("GatherND", "x i", "y", "n")], X, weights={"i": np.array([[0, 1], [1, 0]])})
    with pytest.raises(UnsupportedOp, match=r"GatherND node 'n': indices of shape \(2, 2\) that are no slices"):
        import_onnx(save(proto, tmp_path), batch=2)


EQUATIONS = {
    "attention scores": ("nchw,ncij->nhwij", "x x", {}),
    "images first": ("bcij,bcik->bcjk", "x x", {}),
    "an ellipsis": ("...ij,...kj->...ik", "x x", {}),
    "another order": ("nchw->nwhc", "x", {}),
    "no result": ("nchw,cd", "x w", {"w": (6, 4)}),
    "a matrix of weights": ("nchw,oc->nohw", "x w", {"w": (4, 6)}),
    "weights first": ("co,nchw->nhwo", "w x", {"w": (6, 4)}),
    "the joints of a graph": ("nctv,vw->nctw", "x w", {"w": (5, 5)}),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_einsum(name: str, tmp_path: Path) -> None:
    equation, operands, shapes = EQUATIONS[name]
    weights = {key: normal(*shape) for key, shape in shapes.items()}
    proto = model([node("Einsum", operands, "e", equation=equation), node("Flatten", "e", "y")], X, ["y"], weights)
    check(proto, tmp_path)


@pytest.mark.parametrize(
    ("equation", "operands", "message"),
    [
        ("nchw->nc", "x", "write that as ReduceSum"),
        ("nchw,ncij->nchw", "x x", "write that as ReduceSum before it"),
        ("nchw,nchw,nchw->nc", "x x x", "has 3 operands"),
        ("nhhw->nw", "x", "twice"),
    ],
)
def test_einsum_that_is_no_product_is_refused(equation: str, operands: str, message: str, tmp_path: Path) -> None:
    proto = model([node("Einsum", operands, "y", "n", equation=equation)], {"x": ("N", 3, 5, 5)})
    with pytest.raises(UnsupportedOp, match=f"Einsum node 'n': .*{message}"):
        import_onnx(save(proto, tmp_path), batch=2)
