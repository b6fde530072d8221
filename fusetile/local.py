"""Train on this machine: start a process per node, watch them, and put the weights back into the ONNX model."""

from __future__ import annotations

import ctypes
import hashlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from fusetile.cluster import Cluster
from fusetile.errors import FusetileError, PeerFailure, UserError
from fusetile.onnx_export import export_onnx
from fusetile.run_options import RunOptions
from fusetile.runtime import checkpoint, safetensors
from fusetile.runtime.follow import Following
from fusetile.runtime.progress import StepRecord
from fusetile.runtime.stream import Sample, Stream

RESULT, TRAINED, REPORT = "trained.safetensors", "trained.onnx", "report.html"
CHECKPOINTS, BEST = "checkpoints", "best"
GRACE_seconds = 5.0
"""So long after one node has failed the others may take to say what they saw of it."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder, which goes at the end, or when this process ends in whatever way: a shell waits for that."""
    folder = tempfile.mkdtemp(prefix="fusetile-")
    remove = ["sh", "-c", 'cat; rm -rf "$1"', "sh", folder]
    with subprocess.Popen(remove, stdin=subprocess.PIPE, start_new_session=True):  # its input ends with this process
        yield Path(folder)


def train_locally(
    build: Path,
    cluster: Cluster,
    data: Path | Iterable[Sample],
    options: RunOptions,
    out: Path,
    *,
    on_step: Callable[[StepRecord], object] | None = None,
    quiet: bool = False,
) -> None:
    """Run every node of `build` here; OUT/trained.onnx is written when all have finished. Samples that are no files go
    to the first node, which must be the source. `on_step` sees every step, and ends the training by returning False.
    Raises what stopped them."""
    existed = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    threads = options.threads or max(1, (os.cpu_count() or 1) // len(cluster.nodes))
    processes: list[subprocess.Popen[str]] = []
    # from the first node and to it: what the program that follows is told, and answers
    pipes = [*os.pipe(), *os.pipe()] if on_step else []
    following = Following(pipes[0], pipes[3], on_step) if on_step else None
    sockets = [] if isinstance(data, Path) else [*socket.socketpair()]
    stream = Stream(data, sockets[0]) if not isinstance(data, Path) else None
    try:
        for rank, node in enumerate(cluster.nodes):
            has_data = cluster.source in (None, rank)
            command = [sys.executable, "-m", "fusetile.runtime.node", str(build / "nodes" / node.name)]
            if has_data:
                command += ["--stream", str(sockets[1].fileno())] if sockets else ["--data", str(data)]
            command += replace(options, threads=threads, val=options.val if has_data else None).arguments()
            command += ["--checkpoints", str(out / CHECKPOINTS), "--best", str(out / BEST), "--checked"]
            command += ["--save-gradients", str(options.save_gradients)] if options.save_gradients else []
            command += ["--followed"] if on_step else []
            passed: list[int] = []
            if rank == 0:
                command += ["--out", str(out), *(["--log", str(options.log)] if options.log else [])]
                command += ["--follow", str(pipes[2]), str(pipes[1])] if on_step else []
                passed = [*pipes[1:3], *(each.fileno() for each in sockets[1:])]
            command += ["--quiet"] if quiet or rank else []
            processes.append(_started(command, passed, output=rank == 0))
        for end in pipes[1:3]:
            os.close(end)  # the node has them; so this process sees the end of the node
        del pipes[1:3]
        for each in sockets:
            each.close()  # what is read and written through is the stream's
        if stream is not None:
            threading.Thread(target=stream.serve, name="fusetile-stream", daemon=True).start()
        _wait(processes, [node.name for node in cluster.nodes], following)
    except FusetileError:
        if stream is not None and stream.failure is not None:
            raise stream.failure from None
        raise
    finally:
        _stop(processes)
        for end in pipes:
            os.close(end)
        for each in sockets:
            each.close()
        if not existed and not any(out.iterdir()):
            out.rmdir()  # nothing came of it
    export_run(out, out / TRAINED, model=build / "model.onnx")
    best = out / f"{BEST}.safetensors"
    if options.val and best.is_file():
        export_run(best, best.with_suffix(".onnx"), model=build / "model.onnx")
    elif options.val:
        best.with_suffix(".onnx").unlink(missing_ok=True)  # of another run


def _started(command: Sequence[str], passed: Sequence[int], *, output: bool) -> subprocess.Popen[str]:
    """A node process that has these file descriptors. With `output` it owns the terminal; what others say is kept, and
    shown if one of them fails."""
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=None if output else subprocess.PIPE,
        text=True,
        preexec_fn=_end_with_parent,
        pass_fds=passed,
    )


def _end_with_parent() -> None:
    """Runs in a new node process: it gets SIGTERM if this one dies, however that happens (prctl(2))."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(processes: Sequence[subprocess.Popen[str]], names: Sequence[str], following: Following | None = None) -> None:
    """Until all nodes have ended well; raises with the messages of those that did not."""
    interrupted = False
    failing: float | None = None
    while any(process.poll() is None for process in processes):
        try:
            if following is not None and select.select([following.incoming], [], [], 0.02)[0]:
                following = following if following.read() else None
            elif following is None:
                time.sleep(0.02)
        except KeyboardInterrupt:
            interrupted = True
            _stop(processes)
        if failing is None and any(process.poll() for process in processes):
            failing = time.monotonic()
        if failing is not None and time.monotonic() > failing + GRACE_seconds:
            break  # a node that failed before it met the others: they still wait for it
    failed = [(name, process) for name, process in zip(names, processes, strict=True) if process.returncode]
    _stop(processes)
    if interrupted:
        raise KeyboardInterrupt
    if not failed:
        return
    # a mistake of the user's is the cause where there is one; peers only say that they lost a node, or repeat its words
    words = [(process.returncode, name, _last_words(process)) for name, process in failed]
    messages = [
        (status, f"{name}: {text}")
        for i, (status, name, text) in enumerate(words)
        if not any(other in text and (other != text or k < i) for k, (_, _, other) in enumerate(words))
    ]
    mistakes = [text for status, text in messages if status == UserError.exit_status]
    if mistakes:
        raise UserError(mistakes[0].split(": ", 1)[1])
    raise PeerFailure("; ".join(text for _, text in messages))


def _last_words(process: subprocess.Popen[str]) -> str:
    text = process.stderr.read() if process.stderr else ""
    marked = [line.split("error: ", 1)[1] for line in text.splitlines() if "error: " in line]
    return marked[-1] if marked else text.strip() or f"ended with status {process.returncode}"


def _stop(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def export_run(run: Path, out: Path, *, model: Path | None = None) -> None:
    """Write `out`: a model with the weights of a finished run, or of a checkpoint. `run` is the run's folder or its
    bundle (its result, or else its newest checkpoint), a folder of checkpoints, or a file in one of these."""
    weights, wanted, folder = _trained(run)
    near = [model] if model else [above / "model.onnx" for above in (folder, *folder.resolve().parents[:2])]
    models = [path for path in near if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == wanted]
    if not models and (folder / TRAINED).is_file():  # of `fusetile train`: the same model
        models = [folder / TRAINED]
    if not models:
        raise UserError(f"{folder}: the model.onnx that was compiled is not beside it; it is in the build")
    if broken := sorted(name for name, value in weights.items() if not np.isfinite(value).all()):
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        print(
            f"fusetile: warning: {broken[0]}{more} hold NaN or infinity; lower --lr, or look for NaN in the data",
            file=sys.stderr,
        )
    export_onnx(models[0], weights, out)


def _trained(run: Path) -> tuple[dict[str, np.ndarray], str | None, Path]:
    """The weights, the hash of their model, and the folder that they are in."""
    if run.is_file() and not checkpoint.is_file(run):
        weights, metadata = safetensors.load(run)
        return weights, metadata.get("model_hash"), run.parent
    if run.is_file() or (run.is_dir() and any(map(checkpoint.is_file, run.iterdir()))):
        return _from_checkpoint(run)
    for folder in (run, run / "run"):
        if (folder / RESULT).is_file():
            return _trained(folder / RESULT)
    for folder in (run, run / "run"):
        if (folder / CHECKPOINTS).is_dir():
            return _from_checkpoint(folder / CHECKPOINTS)
    raise UserError(
        f"{run}: no {RESULT} and no {CHECKPOINTS} in it or in its folder 'run'; has the run finished on the first node?"
    )


def _from_checkpoint(path: Path) -> tuple[dict[str, np.ndarray], str | None, Path]:
    """The same: of the step of a file, or of the newest whole step in a folder."""
    folder = path.parent if path.is_file() else path
    found = checkpoint.checkpoints(folder)
    if path.is_file():
        found = [each for each in found if path in each.files]
    if not found:
        raise UserError(f"{path}: there is no checkpoint")
    for each in found[:-1]:
        if each.is_whole():
            return each.trained(), str(each.run["model"]), folder
    return found[-1].trained(), str(found[-1].run["model"]), folder
