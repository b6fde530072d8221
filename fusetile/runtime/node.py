"""fusetile-runtime: one device's part of a training run.

main -> run: bundle, data, kernels, weights -> meet the other nodes -> steps -> result to the lowest rank
"""

from __future__ import annotations

import signal
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from fusetile.errors import FusetileError, UserError
from fusetile.program import Program, from_json
from fusetile.runtime import checkpoint
from fusetile.runtime.executor import Executor
from fusetile.runtime.faults import Stopped
from fusetile.runtime.files import check_writable
from fusetile.runtime.follow import Follower
from fusetile.runtime.local import Local
from fusetile.runtime.loop import End, Loop
from fusetile.runtime.native import Library
from fusetile.runtime.options import Options, options_of, parser
from fusetile.runtime.progress import Progress
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
from fusetile.runtime.storage import make_arena, release
from fusetile.runtime.training import Training
from fusetile.runtime.transport import Transport
from fusetile.runtime.validation import History, Validation

_SWITCH_seconds = 0.0005  # of Python's threads: the I/O thread must not wait 5 ms for the executor's Python


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
                run(options_of(parser().parse_args(words)), signals)
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
    local = Local.of(options, program)
    there = _checkpoints(options, program)
    with ExitStack() as stack:
        stack.callback(local.close)
        library = stack.enter_context(Library(options.bundle / program.library, threads=options.threads))
        arena = make_arena(program.arena_bytes)
        load_weights(options.bundle / "weights.safetensors", program, arena)
        meeting = Meeting(wants={"gradients": options.save_gradients is not None, "start": max(there)})
        transport = None
        if program.nodes > 1:
            meeting = _meet(program, options, _same(options, program, local), list(there), local.told())
            transport = Transport(program, meeting.links, deadline=options.deadline)
            transport.begin_at(meeting.wants["start"])  # peers may begin before this node does
            stack.enter_context(running(transport, signals))
        data, held_back = local.connected(transport, meeting.samples)
        total = options.steps if options.steps is not None else options.epochs * data.steps_per_epoch
        terms = {"samples": data.count, "shuffle": options.shuffle, "batch": program.batch, "seed": program.seed}
        terms |= {"accumulate": program.accumulate} if program.accumulate > 1 else {}
        _check_start(options, meeting.wants["start"], total)
        if options.resume and lowest and not options.quiet:
            print(f"goes on after step {meeting.wants['start']}", flush=True)
        progress = stack.enter_context(Progress(total, show=lowest and not options.quiet, log=options.log))
        training = Training(program, data, library=library, arena=arena, transport=transport, total=total)
        validation = None
        if held_back is not None:
            own = Executor(program, program.validation, library=library, arena=arena, transport=transport)
            validation = Validation(program, held_back, executor=own, arena=arena, transport=transport)
        start, history = there[meeting.wants["start"]], History({})
        if start is not None:
            checkpoint.load(start, program, arena, run=terms)
            history = History.from_json(start.validation) if start.validation else history
        bests = [step for each in there.values() if each is not None and (step := each.best_step)]
        loop = Loop(
            options=options,
            program=program,
            training=training,
            validation=validation,
            arena=arena,
            progress=progress,
            transport=transport,
            follower=Follower(*options.follow) if options.follow else None,
            terms=terms,
            total=total,
            every=options.val_every or data.steps_per_epoch or total,
            gradients=meeting.wants["gradients"],
            bests=deque(bests, checkpoint.KEPT),
        )
        end = loop.run(meeting.wants["start"], history)
        release(arena, keep=results(program))  # the copies that follow take no more than a step did
        _finish(options, program, arena, end, transport)


def _same(options: Options, program: Program, local: Local) -> dict[str, Any]:
    """What must be the same on all nodes."""
    return {
        "steps": options.steps,
        "epochs": options.epochs,
        "resume": options.resume,
        "followed": options.followed,
        "augment": options.augment.text,
        "mean": list(options.mean),
        "std": list(options.std),
        "validation": [options.val_every, options.patience],
        "samples": local.counts,
        "shuffle": options.shuffle,
        "batch": program.batch,
        "seed": program.seed,
    }


def _finish(options: Options, program: Program, arena: np.ndarray, end: End, transport: Transport | None) -> None:
    """All nodes give what they have of the result to the lowest rank, which writes it."""
    pieces = pieces_of(program, arena, end.snapshot)
    if end.history.best_step:
        best = checkpoint.usable(options.best, program, step=end.history.best_step)
        pieces += best_pieces(program, best.get(end.history.best_step))
    if program.rank == LOWEST:
        _write(options, program, gather(pieces, transport), end)
    elif transport is not None:
        give(pieces, transport)
    if transport is not None:
        transport.check()  # a signal may have come while the result was written


def _checkpoints(options: Options, program: Program) -> dict[int, checkpoint.Checkpoint | None]:
    """By step, what this node can start from: with --resume, whole checkpoints; else only step 0."""
    folder = options.checkpoints
    checkpoint.check_new(folder, resume=options.resume, every=options.checkpoint_every)
    if not options.resume:
        return {0: None}
    found: dict[int, checkpoint.Checkpoint | None] = {**checkpoint.usable(folder, program)}
    if not found:
        raise UserError(
            f"--resume: no step's files in {folder} have all that node {program.name!r} needs; copy the files of all "
            "nodes there, or compile with the same model and optimizer"
        )
    return found


def _check_start(options: Options, start: int, total: int) -> None:
    if options.resume and start >= total:
        raise UserError(
            f"--resume: the checkpoint in {options.checkpoints} is of step {start}, and the run has {total} steps"
        )


def _meet(
    program: Program, options: Options, terms: Mapping[str, Any], starts: list[int], samples: Mapping[str, Any]
) -> Meeting:
    """Wait for the other nodes. `terms` must be the same on all; of the `starts` that all have, the last is taken;
    `samples` is what they are told."""
    if not options.quiet:
        others = ", ".join(program.addresses[rank] for rank in partners(program))
        print(f"node {program.name!r} is ready and waits for {others}", flush=True)
    wants = {"gradients": options.save_gradients is not None}
    return meet(program, run=terms, wants=wants, starts=starts, timeout=options.connect_timeout, samples=samples)


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


def _write(options: Options, program: Program, result: dict[str, dict[str, np.ndarray]], end: End) -> None:
    if options.save_gradients is not None:
        write_gradients(options.save_gradients, result[GRADIENTS])
    path = options.out / "trained.safetensors"
    write_parameters(path, result[PARAMETERS], program, end.step)
    lines = [f"{len(result[PARAMETERS])} trained parameters: {path}"]
    if end.reason:
        lines.insert(0, f"stopped after step {end.step}: {end.reason}")
    best, path = end.history.best_step, options.out / "best.safetensors"
    if result[BEST]:
        write_parameters(path, result[BEST], program, best)
        lines.append(f"the best of them, after step {best}: {path}")
    elif best:
        path.unlink(missing_ok=True)  # of another run
        lines.append(f"the best of them, after step {best}, are lost: not all nodes have their part in {options.best}")
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


if __name__ == "__main__":
    sys.exit(main())
