"""fusetile-runtime: one device's part of a training run.

main -> run: bundle, data, kernels, weights -> meet the other nodes -> steps -> result to the lowest rank
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from fusetile.errors import FusetileError, UserError
from fusetile.program import Program, from_json
from fusetile.runtime import checkpoint
from fusetile.runtime.augment import Augmentation
from fusetile.runtime.data import Data
from fusetile.runtime.executor import Executor, Snapshot
from fusetile.runtime.faults import Stopped
from fusetile.runtime.files import atomic_write, check_writable
from fusetile.runtime.native import Library
from fusetile.runtime.progress import Progress, StepRecord
from fusetile.runtime.rendezvous import LOWEST, Meeting, meet, partners
from fusetile.runtime.result import (
    BEST,
    GRADIENTS,
    PARAMETERS,
    best_pieces,
    gather,
    give,
    load_weights,
    pieces_of,
    results,
    write_gradients,
    write_parameters,
)
from fusetile.runtime.samples import Scaling
from fusetile.runtime.storage import make_arena, release
from fusetile.runtime.training import Losses, Training
from fusetile.runtime.transport import Transport
from fusetile.runtime.validation import History, Validation

_SWITCH_seconds = 0.0005  # of Python's threads: the I/O thread must not wait 5 ms for the executor's Python


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says; see `parser`."""

    bundle: Path
    data: Path
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0 when all is done, 2 for a user's mistake, 128 + n when stopped by signal n."""
    sys.setswitchinterval(_SWITCH_seconds)
    signals = Signals()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with signals.installed():
            if words[:1] == ["profile"]:
                from fusetile.runtime.profile import main as profile  # which needs this module

                profile(words[1:], signals)
            else:
                run(_options(parser().parse_args(words)), signals)
    except FusetileError as error:
        print(f"fusetile-runtime: error: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    except OSError as error:
        print(f"fusetile-runtime: error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def run(options: Options, signals: Signals) -> None:
    """Everything between the command line and the exit status."""
    program = load_program(options.bundle)
    lowest = program.rank == LOWEST
    _check_outputs(options, lowest)
    scaling = Scaling(options.mean, options.std)
    data = Data(options.data, program, shuffle=options.shuffle, scaling=scaling, augmentation=options.augment)
    held_back = _held_back(options, program, scaling)
    total = options.steps if options.steps is not None else options.epochs * data.steps_per_epoch
    terms = {"samples": data.count, "shuffle": options.shuffle, "batch": program.batch, "seed": program.seed}
    terms |= {"accumulate": program.accumulate} if program.accumulate > 1 else {}
    every = options.val_every or data.steps_per_epoch
    validated = [held_back.count, every, options.patience] if held_back is not None else None
    there = _checkpoints(options, program, total)
    with ExitStack() as stack:
        stack.callback(data.close)
        if held_back is not None:
            stack.callback(held_back.close)
        progress = stack.enter_context(Progress(total, show=lowest and not options.quiet, log=options.log))
        library = stack.enter_context(Library(options.bundle / program.library, threads=options.threads))
        arena = make_arena(program.arena_bytes)
        load_weights(options.bundle / "weights.safetensors", program, arena)
        meeting = Meeting(wants={"gradients": options.save_gradients is not None, "start": max(there)})
        transport = None
        if program.nodes > 1:
            same = {"steps": total, "resume": options.resume, "augment": options.augment.text, "validation": validated}
            same |= {"mean": list(options.mean), "std": list(options.std)}
            meeting = _meet(program, options, terms | same, list(there))
            transport = Transport(program, meeting.links, deadline=options.deadline)
            transport.step = meeting.wants["start"]  # peers may begin before this node does
            stack.enter_context(running(transport, signals))
        training = Training(program, data, library=library, arena=arena, transport=transport, total=total)
        validation = None
        if held_back is not None:
            own = Executor(program, program.validation, library=library, arena=arena, transport=transport)
            validation = Validation(program, held_back, executor=own, arena=arena, transport=transport)
        start, history = there[meeting.wants["start"]], History({})
        if start is not None:
            checkpoint.load(start, program, arena, run=terms)
            history = History.from_json(start.validation) if start.validation else history
        snapshot: Snapshot = []
        losses = Losses(program.rates, total)
        step = meeting.wants["start"]
        while step < total and not (options.patience and history.since >= options.patience):
            step += 1
            began = time.monotonic()
            due = validation is not None and (step % every == 0 or step == total)
            may_end = step == total or (due and options.patience is not None)
            snapshot.clear()
            loss = training.step(step, snapshot if may_end and meeting.wants["gradients"] else None)
            record = StepRecord(step, loss, time.monotonic() - began, training.samples)
            if (failure := losses.failure(step, loss)) is not None:
                progress.step(record)
                raise failure
            if validation is not None and due:
                history = validation.run(step, history)
                record = replace(record, validation=history.values, best=history.best_step == step)
            progress.step(record)
            if record.best:
                _write_checkpoint(options, options.best, program, arena, step, terms, history)
            if options.checkpoint_every and (step % options.checkpoint_every == 0 or step == total):
                _write_checkpoint(options, options.checkpoints, program, arena, step, terms, history)
        release(arena, keep=results(program))  # the copies that follow take no more than a step did
        pieces = pieces_of(program, arena, snapshot)
        if history.best_step:
            best = checkpoint.usable(options.best, program, step=history.best_step)
            pieces += best_pieces(program, best.get(history.best_step))
        if lowest:
            _write(options, program, gather(pieces, transport), step, history)
        elif transport is not None:
            give(pieces, transport)
        if transport is not None:
            transport.check()  # a signal may have come while the result was written


def _checkpoints(options: Options, program: Program, total: int) -> dict[int, checkpoint.Checkpoint | None]:
    """By step, what this node can start from: with --resume, whole checkpoints; else only step 0."""
    folder = options.checkpoints
    if not options.resume:
        if options.checkpoint_every and checkpoint.checkpoints(folder):
            raise UserError(f"there are checkpoints of an earlier run in {folder}: give --resume, or remove them")
        return {0: None}
    found: dict[int, checkpoint.Checkpoint | None] = {**checkpoint.usable(folder, program)}
    if not found:
        raise UserError(
            f"--resume: no step's files in {folder} have all that node {program.name!r} needs; copy the files of all "
            "nodes there, or compile with the same model and optimizer"
        )
    if min(found) >= total:
        raise UserError(f"--resume: the checkpoint in {folder} is of step {min(found)}, and the run has {total} steps")
    return found


def _held_back(options: Options, program: Program, scaling: Scaling) -> Data | None:
    """The data for validation. Raises UserError."""
    if options.val is None:
        for flag, value in (("--val-every", options.val_every), ("--patience", options.patience)):
            if value is not None:
                raise UserError(f"{flag} {value} needs --val DATA")
        return None
    if program.validation is None:
        raise UserError(
            f"--val: the bundle {options.bundle} can't validate: compile with --validation, and copy it again"
        )
    return Data(options.val, program, shuffle=False, scaling=scaling, routine=program.validation)


def _write_checkpoint(
    options: Options,
    folder: Path,
    program: Program,
    arena: np.ndarray,
    step: int,
    terms: Mapping[str, Any],
    history: History,
) -> None:
    """This node's file; the lowest rank also puts the model there, for `fusetile export`."""
    model = options.bundle / "model.onnx"
    folder.mkdir(parents=True, exist_ok=True)
    kept = 1 if folder == options.best else checkpoint.KEPT
    shown = history.json() if history.best_step else None
    checkpoint.write(folder, program, arena, step=step, run=terms, validation=shown, kept=kept)
    if program.rank == LOWEST and model.is_file() and not (folder / model.name).exists():
        with model.open("rb") as source:
            atomic_write(folder / model.name, partial(shutil.copyfileobj, source))


def _meet(program: Program, options: Options, terms: Mapping[str, Any], starts: list[int]) -> Meeting:
    """Wait for the other nodes. `terms` must be the same on all; of the `starts` that all have, the last is taken."""
    if not options.quiet:
        others = ", ".join(program.addresses[rank] for rank in partners(program))
        print(f"node {program.name!r} is ready and waits for {others}", flush=True)
    wants = {"gradients": options.save_gradients is not None}
    return meet(program, run=terms, wants=wants, starts=starts, timeout=options.connect_timeout)


@contextmanager
def running(transport: Transport, signals: Signals) -> Iterator[None]:
    """A running transport: an error of this node is told to the others, and the thread ends in any case."""
    signals.raising = False
    transport.start(catch_signals=True)
    try:
        if signals.received:  # just before the transport listened
            raise Stopped(signals.received)
        yield
    except BaseException as error:
        transport.abort(error)
        raise
    finally:
        transport.close()


def _write(
    options: Options, program: Program, result: dict[str, dict[str, np.ndarray]], steps: int, history: History
) -> None:
    if options.save_gradients is not None:
        write_gradients(options.save_gradients, result[GRADIENTS])
    path = options.out / "trained.safetensors"
    write_parameters(path, result[PARAMETERS], program, steps)
    lines = [f"{len(result[PARAMETERS])} trained parameters: {path}"]
    if options.patience and history.since >= options.patience:
        lines.insert(0, f"stopped: no validation since step {history.best_step} was better")
    if result[BEST]:
        path = options.out / "best.safetensors"
        write_parameters(path, result[BEST], program, history.best_step)
        lines.append(f"the best of them, after step {history.best_step}: {path}")
    if not options.quiet:
        print("\n".join(lines), flush=True)


def load_program(bundle: Path) -> Program:
    """The program of a bundle. Raises UserError."""
    path = bundle / "program.json"
    if not path.exists():
        raise UserError(f"{bundle} is not a bundle: there is no {path.name} in it; give the folder BUILD/nodes/NAME")
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"can't read {path} ({error}): copy the bundle again, or compile again") from error


def _check_outputs(options: Options, lowest: bool) -> None:
    """Find out before the training, not after it, whether the result can be written."""
    try:
        if lowest:
            options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't make the folder {options.out}: {error.strerror}") from error
    check_writable(options.save_gradients, options.log, folder=options.out if lowest else None)


class Signals:
    """SIGINT and SIGTERM. They raise Stopped, unless a transport runs: its thread hears of them at once, tells the
    other nodes, and lets the executor stop at its next step."""

    _NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.raising = True
        self.received = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside; afterwards as before."""
        before = {number: signal.signal(number, self._handle) for number in self._NUMBERS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self.raising:
            raise Stopped(number)


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
    add("--data", type=Path, required=True, help="a folder with a folder of images per class; or an .npz file or a "
        "folder of .npy files: inputs under the model's "
        "input names (or x), targets under y, or y0, y1, ...; the first dimension counts the samples")  # fmt: skip
    add("--val", type=Path, metavar="DATA", help="held-back data of the same kind, for validation: the loss, and the "
        "metrics that go with it, as of a trained model")  # fmt: skip
    add("--val-every", type=count, metavar="N", help="validate after every N steps (default: an epoch), and at the end")
    add("--patience", type=count, metavar="N", help="stop when N validations in a row were not better than the best")
    length = lines.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, metavar="N", help="train N batches")
    length.add_argument("--epochs", type=count, metavar="E", default=1, help="go E times through the data (default 1)")
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
    return lines


def _options(parsed: argparse.Namespace) -> Options:
    fields = vars(parsed)
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


if __name__ == "__main__":
    sys.exit(main())
