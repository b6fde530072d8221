"""fusetile from Python: what the command line is made of. `fusetile.compile` and `fusetile.train` are these.

import fusetile

trained = fusetile.train(
    "model.onnx", "data.npz", out="out", nodes=2,
    training=fusetile.Training(batch=32, learning_rate=0.05),
    run=fusetile.RunOptions(epochs=5, val=Path("held-back.npz")),
    on_step=lambda step: step.loss > 0.01,  # False: no more steps
)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from fusetile.checks import check_data, check_paths, check_resumed
from fusetile.cluster import Cluster, local_cluster, read_cluster
from fusetile.codegen.assemble import sample_feeds
from fusetile.errors import FusetileError, UserError
from fusetile.explain import read_plan
from fusetile.graph import Graph
from fusetile.local import BEST, CHECKPOINTS, REPORT, RESULT, TRAINED, free_ports, temporary_folder, train_locally
from fusetile.options import Training
from fusetile.picture import report_html
from fusetile.pipeline import compile_model
from fusetile.run_options import RunOptions
from fusetile.runtime import safetensors
from fusetile.runtime.progress import StepRecord
from fusetile.runtime.samples import most_boxes
from fusetile.runtime.stream import Sample
from fusetile.trace import Trace
from fusetile.yolo import LOSS as YOLO

__all__ = ["FusetileError", "RunOptions", "StepRecord", "Trained", "Training", "UserError", "compile", "train"]

OnStep = Callable[[StepRecord], object]


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of a training: the model after the last step, and how many steps there were; the model of the best
    validation, if there was any."""

    model: Path
    steps: int
    best: Path | None


def compile(
    model: str | Path,
    *,
    out: str | Path,
    cluster: Cluster | str | Path | int,
    training: Training | None = None,
    trace: Trace | None = None,
) -> Path:
    """Compile an ONNX file for devices: a cluster.toml, or that many equal ones at 127.0.0.1. Writes the folder `out`,
    with a folder for each device in it, and returns its path.

    Raises UserError for what can't be trained, DoesNotFit if a device has too little memory.
    """
    if isinstance(cluster, int):
        devices = local_cluster(cluster)
    else:
        devices = cluster if isinstance(cluster, Cluster) else read_cluster(Path(cluster))
    return compile_model(
        Path(model), cluster=devices, training=training or Training(), build=Path(out), trace=trace or Trace()
    )


def train(
    model: str | Path,
    data: str | Path | Iterable[Sample],
    *,
    out: str | Path,
    nodes: int = 1,
    training: Training | None = None,
    run: RunOptions | None = None,
    on_step: OnStep | None = None,
    quiet: bool = True,
    watch: Callable[[], AbstractContextManager[Trace]] = lambda: nullcontext(Trace()),
) -> Trained:
    """Compile an ONNX file for this computer, train with that many node processes, and write `out`/trained.onnx
    and `out`/report.html, which shows the plan and the losses.

    `data`: a file or folder, or an iterable of samples, such as {"x": image [C,H,W], "y": 3}: arrays by the names that
    the model's inputs and targets have in files. It is iterated in a thread, for the first node, which sends the others
    their parts; when it ends it is iterated anew, and samples that fill no step are left out. One without a length
    needs `steps` in `run`.

    `on_step` is called after each step: with its number, its loss, the values of the validation if there was one; if
    it returns False the training ends there, as if it had been meant to, with a validation of which the log and the
    report tell. What it raises ends the training, and is raised. Without `quiet` progress is printed; `watch` gives
    what is told of the compilation.

    Raises UserError for mistakes in files and options, other FusetileErrors for faults.
    """
    run, training, out = run or RunOptions(), training or Training(), Path(out)
    where = Path(data) if isinstance(data, str | Path) else None
    if where is None:
        _check_iterable(data, training, run)
        training = replace(training, source="node0")
    if training.validation and run.val is None:
        raise UserError("--validation is for devices that will be given --val; here give --val DATA")
    check_paths(where, run, out, checkpoints=out / CHECKPOINTS)
    training = replace(training, validation=run.val is not None)
    if training.loss == YOLO and training.max_boxes is None:
        needed = [most_boxes(where, "train")] if where else []
        needed += [most_boxes(run.val, "val")] if run.val else []
        training = replace(training, max_boxes=max(training.boxes.most, *needed))
    devices = local_cluster(nodes, ports=free_ports(nodes)).with_source(training.source)

    def look(name: str, graph: Graph) -> None:
        if name == "prune":
            feeds = sample_feeds(graph)
            batch = feeds[0].shape[0]
            samples = check_data(where, run, feeds, least=batch * training.accumulate)
            if run.resume and samples is not None:
                place = out / CHECKPOINTS
                check_resumed(place, run, training, graph, model=Path(model), samples=samples, batch=batch)

    with temporary_folder() as folder:
        with watch() as trace:
            trace.on_graph = look
            build = compile(model, out=folder / "build", cluster=devices, training=training, trace=trace)
        source = where or cast(Iterable[Sample], data)
        log = run.log or folder / "log.jsonl"
        train_locally(build, devices, source, replace(run, log=log), out, on_step=on_step, quiet=quiet)
        (out / REPORT).write_text(report_html(read_plan(build), _logged(log)))
    _, metadata = safetensors.load(out / RESULT)
    best = out / f"{BEST}.onnx"
    return Trained(out / TRAINED, int(metadata["steps"]), best if run.val and best.exists() else None)


def _logged(log: Path) -> list[dict[str, Any]]:
    """The steps of a log, unless it is a pipe or a terminal, like /dev/stdout, which may have other lines as well."""
    lines = log.read_text().splitlines() if log.is_file() else []
    return [json.loads(line) for line in lines if line.startswith('{"step": ')]


def _check_iterable(data: object, training: Training, run: RunOptions) -> None:
    if not isinstance(data, Iterable):
        raise UserError(f"the data are a {type(data).__name__}: give a path, or an iterable of samples")
    if run.steps is None and not isinstance(data, Sized):
        raise UserError("the data have no length, so say how many steps: RunOptions(steps=...)")
    if training.source not in ("", "node0"):
        raise UserError(f"source {training.source!r}: an iterable feeds the first node, node0")
    for flag, given in (("augment", run.augment), ("resume", run.resume)):
        if given:
            raise UserError(f"{flag} is for data in files; an iterable does that itself, or begins where it likes")
