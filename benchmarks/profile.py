"""Where a step's time goes: `python -m benchmarks.profile BUILD/nodes/NAME [--shares 1] [--top 20]`.

Runs the program of a single device on random data, call by call on one thread, and prints the milliseconds per kernel
and of the slowest calls, each the least of several runs.

With `--shares T` every call is done in the shares that T threads would have, one after the other, and what counts is
the largest: how well the work can be divided, whatever else the computer does. What threads lose beyond that, at
barriers and on the way to memory, it can't show.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections import Counter, defaultdict
from itertools import product
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
    lines.add_argument("--shares", type=int, default=1, help="of how many threads")
    lines.add_argument("--runs", type=int, default=7)
    lines.add_argument("--top", type=int, default=20, help="how many single calls to show")
    options = lines.parse_args()
    program = load_program(options.bundle)
    if program.nodes > 1:
        raise SystemExit(f"{options.bundle} is for {program.nodes} devices; only the program of one can run alone")
    timed, alone = profile(program, options.bundle, options.shares, options.runs)
    total = sum(seconds for _, seconds in timed)
    by_kernel: dict[str, float] = defaultdict(float)
    for call, seconds in timed:
        by_kernel[call.kernel] += seconds
    counts = Counter(call.kernel for call, _ in timed)
    print(f"{total * 1e3:.1f} ms in {len(timed)} calls")
    if options.shares > 1:
        print(f"all shares together: {alone * 1e3:.1f} ms, {alone / total:.2f} times as long")
    for kernel, seconds in sorted(by_kernel.items(), key=lambda item: -item[1]):
        print(f"{seconds * 1e3:9.2f} ms {seconds / total:6.1%}  {counts[kernel]:4d} x {kernel}")
    print()
    for call, seconds in sorted(timed, key=lambda item: -item[1])[: options.top]:
        print(f"{seconds * 1e3:9.2f} ms {seconds / total:6.1%}  {call.split:6d} units  {call.kernel}  {call.op}")


def profile(program: Program, bundle: Path, shares: int, runs: int) -> tuple[list[tuple[Call, float]], float]:
    """Every call of a step in order with the seconds of its longest share, and the seconds of all shares of all calls;
    the least of `runs` steps."""
    arena = make_arena(program.arena_bytes)
    random = np.random.default_rng(0)
    calls = [call for step in program.steps if isinstance(step, Run) for call in step.calls]
    best = np.full((len(calls), shares), np.inf)
    with Library(bundle / program.library, threads=1) as library:
        load_weights(bundle / "weights.safetensors", program, arena)
        segment, kernels = library.segment(calls, arena), ctypes.CDLL(str(library.path.resolve()))
        for _ in range(runs):
            for feed in program.feeds:  # anew: what is fed shares its memory with what is computed later
                sizes, whole = extents(feed.buffer.box), feed.buffer.dtype == "int32"
                values = np.zeros(sizes) if whole else random.standard_normal(sizes) * SCALE
                pack(arena, feed.buffer, feed.buffer.box, values)
            for (i, call), share in product(enumerate(calls), range(shares)):
                low, high = call.split * share // shares, call.split * (share + 1) // shares
                kernel, argument = getattr(kernels, call.kernel), ctypes.byref(segment.calls[i])
                start_seconds = time.perf_counter()
                if low < high:
                    kernel(low, high, argument, 0)
                best[i, share] = min(best[i, share], time.perf_counter() - start_seconds)
    return list(zip(calls, best.max(1).tolist(), strict=True)), float(best.sum())


if __name__ == "__main__":
    main()
