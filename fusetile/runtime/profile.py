"""`fusetile-runtime profile BUNDLE`: measure this device, for the planner.

The bundle, which `fusetile profile` made, holds the training step of a small network with all kinds of layers, and
transfers to the next device of the cluster. Measured are

    speeds      seconds of every op of the step: a + b * operations + c * bytes, fitted per kind of op
    memory      bytes per second of a large copy
    link        a large transfer to the next device while one comes from the last, and small ones back and forth
    messaging   processor time of both

An op's seconds are the least of many steps, times what the system takes away: the median seconds of a whole step over
the sum of all least ones.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fusetile.box import extents
from fusetile.errors import UserError
from fusetile.program import Program, Recv, Run, Send
from fusetile.runtime.files import atomic_write
from fusetile.runtime.native import Library, Segment
from fusetile.runtime.node import Signals, load_program, running
from fusetile.runtime.options import count
from fusetile.runtime.options import seconds as positive_seconds
from fusetile.runtime.profile_file import LinkSpeed, Measured, Probe, toml
from fusetile.runtime.rendezvous import meet
from fusetile.runtime.result import load_weights
from fusetile.runtime.storage import make_arena, pack
from fusetile.runtime.transport import Transport

PROBES = "probes.json"
COPY_bytes, COPIES = 1 << 26, 5
ROUNDS = 20  # of transfers, after one that counts for nothing
LEAST_steps = 5


def main(arguments: Sequence[str], signals: Signals) -> None:
    """The command: measures, and writes a file that cluster.toml can name."""
    options = _parser().parse_args(arguments)
    program = load_program(options.bundle)
    try:
        known = json.loads((options.bundle / PROBES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{options.bundle} is not for profiling: `fusetile profile` makes such bundles") from None
    out = options.out or options.bundle / "profile.toml"
    if not out.parent.is_dir():
        raise UserError(f"can't write {out}: there is no folder {out.parent}")
    with ExitStack() as stack:
        library = stack.enter_context(Library(options.bundle / program.library, threads=options.threads))
        arena = make_arena(program.arena_bytes)
        load_weights(options.bundle / "weights.safetensors", program, arena)
        transport = None
        if program.nodes > 1:
            met = meet(program, run={}, wants={}, starts=[0], timeout=options.connect_timeout)
            transport = Transport(program, met.links, deadline=options.deadline)
            stack.enter_context(running(transport, signals))
        probes, scale = _measure(program, known["ops"], library, arena, transport, for_seconds=options.seconds)
        bandwidth = copy_bandwidth()
        link = measure_link(program, arena, transport, scale) if transport is not None else None
    measured = Measured(
        name=program.name,
        nodes=program.nodes,
        threads=options.threads,
        probes=probes,
        scale=scale,
        copy_bandwidth=bandwidth,
        link=link,
        **known["constants"],
    )
    text = toml(measured).encode()

    def write(file: BinaryIO) -> None:
        file.write(text)

    atomic_write(out, write)
    print(f"{program.name}: {len(probes)} ops measured, written to {out}", flush=True)


# -- kernels -----------------------------------------------------------------------------------------------------------


def _measure(
    program: Program,
    known: Mapping[str, tuple[str, float, float]],
    library: Library,
    arena: np.ndarray,
    transport: Transport | None,
    *,
    for_seconds: float,
) -> tuple[list[Probe], float]:
    """Steps for so many seconds, at least a few: the ops, and what the system takes away."""
    (segment_calls,) = (step.calls for step in program.steps if isinstance(step, Run))
    segment = library.segment(segment_calls, arena)
    runs, at = [], 0
    for op, members in groupby(segment_calls, key=lambda call: call.op):
        count = len(list(members))
        runs.append((op, at, at + count))
        at += count
    least = [float("inf")] * len(runs)
    totals: list[float] = []
    end = time.monotonic() + for_seconds
    random = np.random.default_rng(0)
    while len(totals) < LEAST_steps or time.monotonic() < end:
        _feed(program, arena, random)
        took = [_timed(segment, start, stop) for _, start, stop in runs]
        least = list(map(min, least, took))
        totals.append(sum(took))
        if transport is not None:
            transport.count()
            transport.check()
    scale = float(np.median(totals)) / sum(least)
    taken: dict[str, float] = {}
    for (op, *_), best in zip(runs, least, strict=True):
        taken[op] = taken.get(op, 0.0) + best * scale
    return [Probe(*known[op], seconds) for op, seconds in taken.items() if op in known], scale


def _feed(program: Program, arena: np.ndarray, random: np.random.Generator) -> None:
    """Small random values, so that no weight grows without bound; classes are 0."""
    for feed in program.feeds:
        sizes, whole = extents(feed.buffer.box), feed.buffer.dtype == "int32"
        pack(arena, feed.buffer, feed.buffer.box, np.zeros(sizes) if whole else random.standard_normal(sizes) * 1e-3)


def _timed(segment: Segment, start: int, stop: int) -> float:
    began = time.perf_counter()
    segment(start, stop)
    return time.perf_counter() - began


def copy_bandwidth() -> float:
    """Bytes read and written per second when a large array is copied."""
    source, target = np.ones(COPY_bytes, np.uint8), np.zeros(COPY_bytes, np.uint8)
    best = np.inf
    for _ in range(COPIES):
        began = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - began)
    return 2 * COPY_bytes / best


# -- the link ----------------------------------------------------------------------------------------------------------


def measure_link(program: Program, arena: np.ndarray, transport: Transport, scale: float) -> LinkSpeed:
    """All devices do this at the same time: small messages one by one to the next device, each after one has come from
    the last device; then large ones. The medians of several rounds; processor time by the same `scale` as kernels."""
    sends = [step for step in program.steps if isinstance(step, Send)]
    recvs = [step for step in program.steps if isinstance(step, Recv)]
    small, large = sends[:-1], sends[-1]
    times: list[tuple[float, float, float, float]] = []
    for number in range(1, ROUNDS + 2):
        transport.begin_turn(number)
        for recv in recvs:
            transport.recv(recv.peer, recv.tag, _view(arena, recv))
        took, processor = [], []
        for some in ([small[0]], small[1:], [large]):  # the first lets all begin together
            began, began_cpu = time.perf_counter(), time.process_time()
            for send in some:
                transport.send(send.peer, send.tag, _view(arena, send), 0)
                transport.wait([recvs[sends.index(send)].tag])
            took.append((time.perf_counter() - began) / len(some))
            processor.append((time.process_time() - began_cpu) / len(some))
        transport.finish([step.tag for step in sends] + [step.tag for step in recvs])
        times.append((took[1], took[2], processor[1], processor[2]))
    each, whole, each_cpu, whole_cpu = np.median(times[1:], axis=0)
    return LinkSpeed(
        bytes_per_second=large.size_bytes / max(whole - each, 1e-9),
        small_seconds=each,
        message_cpu_seconds=scale * each_cpu / 2,  # one was sent and one came
        byte_cpu_seconds=scale * max(0.0, whole_cpu - each_cpu) / (2 * large.size_bytes),
    )


def _view(arena: np.ndarray, step: Send | Recv) -> memoryview:
    return arena.data[step.offset_bytes : step.offset_bytes + step.size_bytes]


def _parser() -> argparse.ArgumentParser:
    lines = argparse.ArgumentParser(
        prog="fusetile-runtime profile",
        description="Measure this device and its link for the planner, and write a file that cluster.toml can name. "
        "Start it on all devices of the cluster at the same time: the link is measured between them.",
    )
    add = lines.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="this device's folder of what `fusetile profile` wrote")
    add("--out", type=Path, metavar="FILE.toml", help="default: BUNDLE/profile.toml")
    add("--threads", type=count, metavar="T", default=len(os.sched_getaffinity(0)), help="default: all cores")
    add(
        "--seconds",
        type=positive_seconds,
        metavar="S",
        default=10.0,
        help="how long the kernels are measured (default 10)",
    )
    add("--deadline", type=positive_seconds, metavar="S", default=30.0, help=argparse.SUPPRESS)
    add("--connect-timeout", type=positive_seconds, metavar="S", default=60.0,
        help="give up when not all devices are there after S seconds (default 60)")  # fmt: skip
    return lines
