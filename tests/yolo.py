"""What tests of YOLOv2's loss share."""

from __future__ import annotations

import numpy as np

from fusetile.graph import Graph, Parameter
from fusetile.passes.differentiate import BoxOptions, Criterion, differentiate

ANCHORS = (1.2, 0.9, 2.5, 3.0, 4.0, 1.5)


def random_boxes(random: np.random.Generator, *, images: int, most: int, classes: int) -> np.ndarray:
    """Boxes [images, most, 5]: some are none; some share a cell, some an anchor too; one is at the last corner."""
    boxes = np.empty((images, most, 5), np.float32)
    boxes[..., 0] = random.integers(-1, classes, (images, most))
    boxes[..., 1:3] = random.random((images, most, 2))
    boxes[..., 3:] = 0.05 + 0.5 * random.random((images, most, 2))
    boxes[:, 1] = boxes[:, 0]
    boxes[:, 2, 1:3] = boxes[:, 0, 1:3]
    boxes[:, 3, 1:3] = 1
    boxes[:, :4, 0] = np.arange(4) % classes
    return boxes


def loss_alone(y: np.ndarray, options: BoxOptions) -> Graph:
    """A graph of which the output is a trained map."""
    graph = Graph()
    graph.add_tensor("y", y.shape)
    graph.parameters["y"] = Parameter(y, trainable=True)
    graph.outputs = [graph.add("Identity", ["y"], outputs=["out"])[0]]
    return differentiate(graph, Criterion(loss="yolov2", boxes=options))
