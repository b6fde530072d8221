"""What can be found out about a training before its model is compiled: paths, data, the checkpoint to go on from."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from fusetile.errors import UserError
from fusetile.graph import Graph
from fusetile.onnx_import.files import self_contained
from fusetile.options import Training
from fusetile.program import Feed
from fusetile.run_options import RunOptions
from fusetile.runtime import checkpoint
from fusetile.runtime.augment import Augmentation
from fusetile.runtime.files import check_makeable, check_writable
from fusetile.runtime.samples import Samples, Scaling, check_alike


def check_paths(data: Path | None, options: RunOptions, out: Path, *, checkpoints: Path) -> None:
    """Files and folders that are named. Raises UserError."""
    check_makeable(out)
    for flag, path in (("--data", data), ("--val", options.val)):
        if path is not None and not path.exists():
            raise UserError(f"{flag} {path}: there is no such file or folder")
    for flag, value in (("--val-every", options.val_every), ("--patience", options.patience)):
        if value is not None and options.val is None:
            raise UserError(f"{flag} {value} needs --val DATA")
    Augmentation.parse(options.augment)
    check_writable(options.log, options.save_gradients)
    there = checkpoint.checkpoints(checkpoints)
    if options.resume and not any(each.is_whole() for each in there):
        raise UserError(
            f"--resume: there is no checkpoint of all nodes in {checkpoints}; leave out --resume to begin anew"
        )
    checkpoint.check_new(checkpoints, resume=options.resume, every=options.checkpoint_every)


def check_data(data: Path | None, options: RunOptions, feeds: Sequence[Feed], *, least: int) -> int | None:
    """The data, when it is known what the model wants of them: `least` samples, or more. Returns how many there are.
    Raises UserError."""
    scaling = Scaling(*options.scaling)
    found = None
    if data is not None:
        augmentation = Augmentation.parse(options.augment)
        found = Samples(data, feeds, least=least, part="train", scaling=scaling, augmentation=augmentation).count
    if options.val is not None:
        Samples(options.val, feeds, least=1, part="val", scaling=scaling, augmentation=Augmentation())
    if data is not None and options.val is not None:
        check_alike(data, options.val)
    return found


def check_resumed(
    folder: Path, options: RunOptions, training: Training, graph: Graph, *, model: Path, samples: int, batch: int
) -> None:
    """The checkpoint that a run, of a graph with its optimizer, will go on from. Raises UserError if it can't."""
    newest = next(each for each in checkpoint.checkpoints(folder) if each.is_whole())
    newest.check_run(
        {
            "model": sha256(self_contained(model)).hexdigest(),
            "samples": samples,
            "shuffle": not options.no_shuffle,
            "batch": batch,
            "seed": training.seed,
            **({"accumulate": training.accumulate} if training.accumulate > 1 else {}),
        }
    )
    needed = [name for name in graph.next_value if graph.parameters[name].lasting]
    if lacking := [name for name in needed if name not in newest.parts]:
        raise UserError(
            f"--resume: the checkpoint of step {newest.step} in {folder} has no {lacking[0]!r}: go on with the same "
            "optimizer and the same trained weights"
        )
    steps = options.steps or (options.epochs or 1) * (samples // (batch * training.accumulate))
    if newest.step >= steps:
        raise UserError(f"--resume: the checkpoint in {folder} is of step {newest.step}, and the run has {steps} steps")
