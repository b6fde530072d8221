"""The command line of fusetile-runtime."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path

from fusetile.runtime.augment import Augmentation


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says; see `parser`."""

    bundle: Path
    data: Path | None
    val: Path | None
    val_every: int | None
    patience: int | None
    steps: int | None
    epochs: int
    shuffle: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augmentation
    threads: int
    log: Path | None
    save_gradients: Path | None
    checkpoint_every: int
    checkpoints: Path
    best: Path
    resume: bool
    out: Path
    deadline: float
    connect_timeout: float
    quiet: bool
    followed: bool
    follow: tuple[int, int] | None
    stream: int | None
    checked: bool


def parser() -> argparse.ArgumentParser:
    """The command line."""
    lines = argparse.ArgumentParser(
        prog="fusetile-runtime",
        description="Train on this device, together with the other devices of the plan. Start it on every device, "
        "in any order, each with its own bundle and the same options; they find each other and begin together. "
        "`fusetile-runtime profile --help`: measure a device instead.",
        epilog="Exit status: 0 when all is done, 2 for a mistake in files or options, 1 for a fault here or on another "
        "device, 130 or 143 when stopped with Ctrl-C or SIGTERM.",
    )
    add = lines.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="this device's folder, BUILD/nodes/NAME")
    add("--data", type=Path, help="an .npz file or a folder of .npy files: inputs under the model's "
        "input names (or x), targets under y, or y0, y1, ...; the first dimension counts the samples; or a folder of "
        "images: a folder per class, or images and labels, images and masks, input and target; or a data.yaml. Needed "
        "unless another node is the source of the data")  # fmt: skip
    add("--val", type=Path, metavar="DATA", help="held-back data of the same kind, for validation: the loss, and the "
        "metrics that go with it, as of a trained model")  # fmt: skip
    add("--val-every", type=count, metavar="N", help="validate after every N steps (default: an epoch), and at the end")
    add("--patience", type=count, metavar="N", help="stop when N validations in a row were not better than the best")
    length = lines.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, metavar="N", help="train N batches")
    length.add_argument("--epochs", type=count, metavar="E", help="go E times through the data (default 1)")
    add("--no-shuffle", dest="shuffle", action="store_false", help="take the samples in their order")
    add("--mean", type=_numbers, default=(), metavar="M,...", help="per channel, subtracted from inputs (bytes become "
        "numbers from 0 to 1 first)")  # fmt: skip
    add("--std", type=_numbers, default=(), metavar="S,...", help="per channel, what they are then divided by")
    add("--augment", type=Augmentation.parse, default=Augmentation(), metavar="WHAT,...", help="change every sample in "
        "each epoch anew: flip, crop, colour, brightness, contrast, saturation, hue, each with a strength if you like, "
        "as in flip,crop=0.2")  # fmt: skip
    add("--threads", type=count, metavar="T", default=len(os.sched_getaffinity(0)), help="default: all cores")
    add("--log", type=Path, metavar="FILE.jsonl", help="write one JSON object per step")
    add("--save-gradients", type=Path, metavar="FILE.npz", help="on the lowest rank: write the last step's gradients")
    add("--checkpoint-every", type=count, default=0, metavar="N", help="write this node's checkpoint after every N "
        "steps, and at the end; the two newest are kept")  # fmt: skip
    add("--checkpoints", type=Path, metavar="DIR", help="where they are (default OUT/checkpoints)")
    add("--best", type=Path, metavar="DIR", help="where the checkpoint of the best validation is (default OUT/best)")
    add("--resume", action="store_true", help="go on from the newest checkpoint that all nodes have")
    add("--out", type=Path, metavar="DIR", help="on the lowest rank: where the result goes (default BUNDLE/run)")
    add("--deadline", type=seconds, metavar="S", default=30.0,
        help="give up when another device is silent for S seconds (default 30)")  # fmt: skip
    add("--connect-timeout", type=seconds, metavar="S", default=60.0,
        help="give up when not all devices are there after S seconds (default 60)")  # fmt: skip
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--followed", action="store_true", help="a program decides after each step whether to go on: see --follow")
    add("--follow", type=int, nargs=2, metavar=("IN", "OUT"), help="on the lowest rank, for programs: write the log's "
        "line of every step to the file descriptor OUT, and go on when a line 'go' comes from IN")  # fmt: skip
    add("--stream", type=int, metavar="FD", help="on the source, instead of --data, for programs: a socket on which a "
        "program makes the samples (see runtime/stream.py)")  # fmt: skip
    add("--checked", action="store_true", help="for programs: the data have been looked at")
    return lines


def options_of(parsed: argparse.Namespace) -> Options:
    """What was parsed, with the places that follow from others."""
    fields = vars(parsed)
    fields["epochs"] = fields["epochs"] or 1
    fields["out"] = fields["out"] or fields["bundle"] / "run"
    fields["checkpoints"] = fields["checkpoints"] or fields["out"] / "checkpoints"
    fields["best"] = fields["best"] or fields["out"] / "best"
    return Options(**fields)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers separated by commas")
    return values


def count(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    """A time above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value
