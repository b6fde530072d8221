"""Where a step's time goes: `python -m benchmarks.profile BUILD/nodes/NAME [--threads 1] [--top 20]`.

Runs the program of a single device on random data, call by call, and prints the milliseconds per kernel and of the
slowest calls, each the least of several runs. `GB/s` counts nothing but a kernel's work on its own, so a call that
the caches serve in a step may look slower here, and the sum is not exactly a step.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from fusetile.box import extents
from fusetile.program import Call, Program, Run
from fusetile.runtime.native import Library
from fusetile.runtime.node import load_program
from fusetile.runtime.result import load_weights
from fusetile.runtime.storage import make_arena, pack

SCALE = 1e-3  # of what is fed, the learning rate too


def main() -> None:
    """Read the command line, profile, print."""
    lines = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lines.add_argument("bundle", type=Path)
    lines.add_argument("--threads", type=int, default=1)
    lines.add_argument("--runs", type=int, default=7)
    lines.add_argument("--top", type=int, default=20, help="how many single calls to show")
    options = lines.parse_args()
    program = load_program(options.bundle)
    if program.nodes > 1:
        raise SystemExit(f"{options.bundle} is for {program.nodes} devices; only the program of one can run alone")
    timed = profile(program, options.bundle, options.threads, options.runs)
    total = sum(seconds for _, seconds in timed)
    by_kernel: dict[str, float] = defaultdict(float)
    for call, seconds in timed:
        by_kernel[call.kernel] += seconds
    counts = Counter(call.kernel for call, _ in timed)
    print(f"{total * 1e3:.1f} ms in {len(timed)} calls")
    for kernel, seconds in sorted(by_kernel.items(), key=lambda item: -item[1]):
        print(f"{seconds * 1e3:9.2f} ms {seconds / total:6.1%}  {counts[kernel]:4d} x {kernel}")
    print()
    for call, seconds in sorted(timed, key=lambda item: -item[1])[: options.top]:
        print(f"{seconds * 1e3:9.2f} ms {seconds / total:6.1%}  {call.split:6d} units  {call.kernel}  {call.op}")


def profile(program: Program, bundle: Path, threads: int, runs: int) -> list[tuple[Call, float]]:
    """Every call of a step in order, and its seconds: the least of `runs` steps."""
    arena = make_arena(program.arena_bytes)
    random = np.random.default_rng(0)
    calls = [call for step in program.steps if isinstance(step, Run) for call in step.calls]
    best = np.full(len(calls), np.inf)
    with Library(bundle / program.library, threads=threads) as library:
        load_weights(bundle / "weights.safetensors", program, arena)
        segment = library.segment(calls, arena)
        for _ in range(runs):
            for feed in program.feeds:  # anew: what is fed shares its memory with what is computed later
                sizes, whole = extents(feed.buffer.box), feed.buffer.dtype == "int32"
                values = np.zeros(sizes) if whole else random.standard_normal(sizes) * SCALE
                pack(arena, feed.buffer, feed.buffer.box, values)
            for i in range(len(calls)):
                start_seconds = time.perf_counter()
                segment(i, i + 1)
                best[i] = min(best[i], time.perf_counter() - start_seconds)
    return list(zip(calls, best.tolist(), strict=True))


if __name__ == "__main__":
    main()
