"""Predicted speedups of plans: what the planner finds, beside data parallel training and uniform grids.

python -m benchmarks.plans            prints a table: model, batch, nodes; seconds and speedup over one device
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnx
from rich.console import Console
from rich.table import Table

from fusetile.cluster import local_cluster
from fusetile.graph import Graph
from fusetile.onnx_import import import_onnx
from fusetile.passes.add_optimizer import Optimizer, add_optimizer
from fusetile.passes.differentiate import differentiate
from fusetile.passes.fuse import fuse
from fusetile.passes.prune import prune
from fusetile.passes.rematerialize import rematerialize
from fusetile.planner.choose import best_plan
from models import resnet18, vgg_small, yolov2

MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "yolov2-16 at 416": (yolov2.build, "mse"),
    "resnet18 at 224": (resnet18.build, "cross-entropy"),
    "vgg_small": (vgg_small.build, "cross-entropy"),
}


def training_graph(build: Callable[[], onnx.ModelProto], loss: str, batch: int) -> Graph:
    """The graph that is planned."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(build(), path)
        graph = import_onnx(path, batch=batch)
    graph = prune(add_optimizer(differentiate(graph, loss=loss), Optimizer(momentum=0.9, weight_decay=0.0)))
    return rematerialize(fuse(graph))


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted speedups of plans.")
    parser.add_argument("--device", default="pi3")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 6])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args()
    table = Table(
        "model", "batch", "nodes", "one", "auto", "batch", "grid", "over one", "over a core", "gap", "planning"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (build, loss) in MODELS.items():
        for batch in options.batch:
            graph = training_graph(build, loss, batch)
            for nodes in options.nodes:
                cluster = local_cluster(nodes, target=options.device)
                start = time.perf_counter()
                estimate = best_plan(graph, cluster=cluster, block=8).estimate
                planning = time.perf_counter() - start
                assert estimate is not None
                one, auto = estimate.others["single"], estimate.step_seconds
                rules = [estimate.others.get(rule, one) for rule in ("batch", "grid")]
                table.add_row(
                    *(name, str(batch), str(nodes)),
                    *(f"{seconds:.2f}" for seconds in (one, auto, *rules)),
                    f"{one / auto:.2f}",
                    f"{cluster.nodes[0].device.cores * one / auto:.1f}",
                    f"{100 * estimate.gap:.1f} %",
                    f"{planning:.1f} s",
                )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
