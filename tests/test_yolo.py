"""The loss of YOLOv2: against PyTorch, loop by loop; against finite differences; in the plans of a small network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from fusetile.errors import UserError
from fusetile.graph import Graph
from fusetile.passes.differentiate import BoxOptions, Criterion, differentiate
from fusetile.reference import evaluate
from tests.graphs import Net, feeds
from tests.training import GRIDS, planned, run_plan, training_graph, worst
from tests.yolo import ANCHORS, loss_alone, random_boxes

CLASSES = 4
OPTIONS = BoxOptions(anchors=ANCHORS, factors=(5.0, 1.5, 0.5, 2.0), most=7)


def by_torch(y: np.ndarray, boxes: np.ndarray, options: BoxOptions) -> tuple[float, np.ndarray]:
    """The loss and its gradient, one cell and anchor at a time, from the paper and darknet's region layer."""
    torch = pytest.importorskip("torch")
    from torch.nn import functional

    x = torch.tensor(y, dtype=torch.float64, requires_grad=True)
    images, _, rows, columns = y.shape
    anchors = list(zip(options.anchors[::2], options.anchors[1::2], strict=True))
    coord, obj, noobject, class_ = options.factors
    total = torch.zeros((), dtype=torch.float64)

    def iou(a: Sequence[float], b: Sequence[float]) -> float:
        wide = min(a[0] + a[2] / 2, b[0] + b[2] / 2) - max(a[0] - a[2] / 2, b[0] - b[2] / 2)
        high = min(a[1] + a[3] / 2, b[1] + b[3] / 2) - max(a[1] - a[3] / 2, b[1] - b[3] / 2)
        common = max(wide, 0.0) * max(high, 0.0)
        return common / (a[2] * a[3] + b[2] * b[3] - common)

    for n in range(images):
        true = [(int(b[0]), *(float(b[k]) * (columns, rows)[(k - 1) % 2] for k in (1, 2, 3, 4))) for b in boxes[n]]
        true = [b for b in true if b[0] >= 0]
        wanted = {}
        for b in true:
            cell = min(math.floor(b[1]), columns - 1), min(math.floor(b[2]), rows - 1)
            fits = [iou((0, 0, *anchor), (0, 0, *b[3:])) for anchor in anchors]
            wanted[(*cell, fits.index(max(fits)))] = b
        for j in range(rows):
            for i in range(columns):
                for a, (wide, high) in enumerate(anchors):
                    tx, ty, tw, th, to, *scores = x[n, a * (5 + CLASSES) : (a + 1) * (5 + CLASSES), j, i]
                    place, sure = (torch.sigmoid(tx), torch.sigmoid(ty)), torch.sigmoid(to)
                    box = [value.item() for value in (place[0] + i, place[1] + j, wide * tw.exp(), high * th.exp())]
                    if (i, j, a) in wanted:
                        label, *b = wanted[i, j, a]
                        size = (tw - math.log(b[2] / wide)) ** 2 + (th - math.log(b[3] / high)) ** 2
                        total = total + coord * ((place[0] - (b[0] - i)) ** 2 + (place[1] - (b[1] - j)) ** 2 + size)
                        total = total + obj * (sure - iou(box, b)) ** 2
                        total = total + class_ * functional.cross_entropy(torch.stack(scores), torch.tensor(label))
                    elif max((iou(box, b[1:]) for b in true), default=0) <= 0.6:
                        total = total + noobject * sure**2
    total = total / images
    total.backward()
    return total.item(), x.grad.numpy()


def example(seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and boxes of three images, of which one is empty; one cell predicts a box without being responsible."""
    random = np.random.default_rng(seed)
    y = random.standard_normal((3, 3 * (5 + CLASSES), 4, 5)).astype(np.float32)
    boxes = random_boxes(random, images=3, most=OPTIONS.most, classes=CLASSES)
    boxes[2, :, 0] = -1
    boxes[0, 4] = (1, 1.5 / 5, 1.01 / 4, 3.0 / 5, 2.0 / 4)
    y[0, 2 * (5 + CLASSES) :][:4, 0, 1] = (0, 9, np.log(3 / 4), np.log(2 / 1.5))  # the box above, from the cell above
    return y, boxes


def test_yolov2_is_pytorchs() -> None:
    y, boxes = example()
    graph = loss_alone(y, OPTIONS)
    (target,) = graph.targets
    values = evaluate(graph, {target: boxes}, exact=True)
    expected, gradient = by_torch(y, boxes, OPTIONS)
    assert values[graph.loss][0] == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(values[graph.gradients["y"]], gradient, rtol=1e-5, atol=1e-7)
    ignored = 2 * (5 + CLASSES) + 4
    assert values[graph.gradients["y"]][0, ignored, 0, 1] == 0  # its IoU with the box below is above 0.6


def test_gradients_are_those_of_finite_differences() -> None:
    """The IoU is a target, which the coordinates do not see: they are moved while the confidence does not count."""
    y, boxes = example(seed=4)
    coordinates = np.isin(np.arange(y.shape[1]) % (5 + CLASSES), range(4))[None, :, None, None]
    for factors, moved in (((5.0, 0.0, 0.0, 2.0), coordinates), (OPTIONS.factors, ~coordinates)):
        graph = loss_alone(y.astype(np.float64), BoxOptions(anchors=OPTIONS.anchors, factors=factors, most=7))
        (target,) = graph.targets
        values = evaluate(graph, {target: boxes}, exact=True)
        random = np.random.default_rng(6)
        for _ in range(3):
            direction, step = random.standard_normal(y.shape) * moved, 1e-6
            plus, minus = (
                evaluate(graph, {target: boxes, "y": values["y"] + sign * step * direction}, exact=True)[graph.loss][0]
                for sign in (1, -1)
            )
            found = (values[graph.gradients["y"]] * direction).sum()
            assert (plus - minus) / (2 * step) == pytest.approx(found, rel=1e-5)


def network(outputs: int = 1) -> Graph:
    net = Net((4, 3, 14, 13))
    x = net.relu(net.conv(net.x, 10, stride=2, bias=True))
    return net.done(*(net.conv(x, 3 * (5 + CLASSES), window=1, bias=True) for _ in range(outputs)))


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 6])
def test_yolov2_in_every_plan(nodes: int) -> None:
    """Cells at the edges of tiles see all boxes; with two outputs the losses add up."""
    graph = training_graph(network(2 if nodes == 3 else 1), loss="yolov2", boxes=OPTIONS)
    random = np.random.default_rng(0)
    fed = feeds(graph) | {
        name: random_boxes(random, images=4, most=OPTIONS.most, classes=CLASSES) for name in graph.targets
    }
    expected = evaluate(graph, fed)
    for plan in ("batch", "channel", *GRIDS[nodes], "random:1", *(["auto"] if nodes == 3 else [])):
        error, where = worst(run_plan(graph, *planned(graph, plan, nodes), fed), expected)
        assert error < 1e-5, f"{plan}: {where} is off by {error}"


@pytest.mark.parametrize(
    ("loss", "boxes", "message"),
    [
        ("yolov2", BoxOptions(), "27 channels are not 5 anchors with 5 numbers"),
        ("yolov2", BoxOptions(anchors=(1.0, 1.0) * 9), "27 channels are not 9 anchors"),
        ("mse", OPTIONS, "it has no boxes"),
    ],
)
def test_outputs_that_do_not_fit(loss: str, boxes: BoxOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        differentiate(network(), Criterion(loss=loss, boxes=boxes))


def test_an_output_that_is_no_grid() -> None:
    net = Net((2, 3, 4, 4))
    with pytest.raises(UserError, match="needs an output \\[N, anchors"):
        differentiate(net.done(net.gemm(net.flatten(net.x), 30)), Criterion(loss="yolov2"))
