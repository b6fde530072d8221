"""What the command line can say of a run of what was compiled."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fusetile.command_line import check_values, numbers, option
from fusetile.errors import UserError

_run = functools.partial(option, "Run")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """A run of what was compiled."""

    val: Annotated[
        Path | None,
        _run("--val", "Held-back data of the same kind: validate, and keep the best weights.", metavar="DATA"),
    ] = None
    val_every: Annotated[
        int | None, _run("--val-every", "Validate after every N steps. Default: an epoch.", min=1, metavar="N")
    ] = None
    patience: Annotated[
        int | None,
        _run("--patience", "Stop when N validations in a row were not better than the best.", min=1, metavar="N"),
    ] = None
    steps: Annotated[int | None, _run("--steps", "Stop after this many steps.", min=1)] = None
    epochs: Annotated[int | None, _run("--epochs", "Passes over the data. Default: 1.", min=1)] = None
    no_shuffle: Annotated[bool, _run("--no-shuffle", "Take the samples in order.")] = False
    mean: Annotated[
        str, _run("--mean", "Per channel, subtracted from inputs; bytes become 0 to 1 first.", metavar="M,...")
    ] = ""
    std: Annotated[str, _run("--std", "Per channel, what inputs are then divided by.", metavar="S,...")] = ""
    augment: Annotated[
        str,
        _run(
            "--augment",
            "Change every sample in each epoch anew: flip, crop, colour, brightness, contrast, saturation, hue, each "
            "with a strength if you like, as in flip,crop=0.2.",
            metavar="WHAT,...",
        ),
    ] = ""
    threads: Annotated[
        int | None,
        _run("--threads", "Threads per node. Default: this machine's cores shared among the nodes.", min=1),
    ] = None
    log: Annotated[Path | None, _run("--log", "Write one JSON object per step.", metavar="FILE.jsonl")] = None
    save_gradients: Annotated[
        Path | None, _run("--save-gradients", "Write the last step's gradients.", metavar="FILE.npz")
    ] = None

    checkpoint_every: Annotated[
        int | None,
        _run("--checkpoint-every", "Write a checkpoint after every N steps, and at the end.", min=1, metavar="N"),
    ] = None
    resume: Annotated[
        bool, _run("--resume", "Go on from the newest checkpoint in OUT/checkpoints, with any number of nodes.")
    ] = False

    def __post_init__(self) -> None:
        check_values(self)
        if self.steps is not None and self.epochs is not None:
            raise UserError("give --steps or --epochs, not both")
        _, deviations = self.scaling
        if any(value <= 0 for value in deviations):
            raise UserError(f"--std {self.std}: must be above 0")

    @property
    def scaling(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The numbers of --mean and --std."""
        return numbers("--mean", self.mean), numbers("--std", self.std)

    def arguments(self) -> list[str]:
        """For fusetile-runtime on any node."""
        given = [
            ("--val", self.val),
            ("--val-every", self.val_every),
            ("--patience", self.patience),
            ("--steps", self.steps),
            ("--epochs", self.epochs),
            ("--augment", self.augment or None),
            ("--threads", self.threads),
            ("--checkpoint-every", self.checkpoint_every),
        ]
        found = [part for name, value in given if value is not None for part in (name, str(value))]
        # one word each: a first number may be negative
        found += [f"{name}={value}" for name, value in (("--mean", self.mean), ("--std", self.std)) if value]
        flags = (("--no-shuffle", self.no_shuffle), ("--resume", self.resume))
        return found + [name for name, given in flags if given]
