"""What threads gain on one device: `python -m benchmarks.threads [PATTERN] [--threads 2]`.

Prints, per network and batch, the seconds of a step with one thread and with T, the gain, and what the computer itself
has to give: the gain of T processes with one thread each that run at once, which have no barriers to wait at and share
nothing but the way to memory. All three take turns; the figures are medians over the turns of each turn's fastest step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.step import BATCHES, CASES, WARM_UP, prepare


def main() -> None:
    """Every case and batch whose name contains the pattern."""
    lines = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lines.add_argument("pattern", nargs="?", default="", help="a part of the name, like vgg16 or 'batch 1'")
    lines.add_argument("--threads", type=int, default=2)
    lines.add_argument("--steps", type=int, default=7, help="of every side in a turn")
    lines.add_argument("--turns", type=int, default=5)
    options = lines.parse_args()
    print(f"{'network':26} {'1 thread':>9} {f'{options.threads} threads':>9} {'gain':>6} {'possible':>9}")
    for case in CASES:
        for batch in BATCHES:
            name = f"{case.model}@{case.size} batch {batch}"
            if options.pattern in name:
                with tempfile.TemporaryDirectory() as folder:
                    prepare(case, batch, Path(folder))
                    one, many, beside = measure(Path(folder), options.threads, options.steps, options.turns)
                possible = options.threads * one / beside
                print(f"{name:26} {one:8.4f}s {many:8.4f}s {one / many:6.2f} {possible:9.2f}", flush=True)


def measure(folder: Path, threads: int, steps: int, turns: int) -> tuple[float, float, float]:
    """Seconds of a step with one thread, with `threads`, and of one of as many processes with one thread each."""
    sides: list[list[float]] = [[], [], []]
    for _ in range(turns):
        for side, (processes, each) in zip(sides, ((1, 1), (1, threads), (threads, 1)), strict=True):
            side.append(max(together(folder, processes, each, steps)))
    one, many, beside = map(statistics.median, sides)
    return one, many, beside


def together(folder: Path, processes: int, threads: int, steps: int) -> list[float]:
    """The fastest step of each of some processes that run at once."""
    logs = [folder / f"log{i}.jsonl" for i in range(processes)]
    command = [sys.executable, "-m", "fusetile.runtime.node", str(folder / "build/nodes/node0"), "--quiet"]
    command += ["--data", str(folder / "data.npz"), "--steps", str(steps + WARM_UP), "--threads", str(threads)]
    started = [
        subprocess.Popen([*command, "--log", str(log), "--out", str(folder / f"run{i}")]) for i, log in enumerate(logs)
    ]
    for process in started:
        process.wait()
    if any(process.returncode for process in started):
        raise SystemExit("a node failed")
    lines = [log.read_text().splitlines()[WARM_UP:] for log in logs]
    return [min(json.loads(line)["seconds"] for line in mine) for mine in lines]


if __name__ == "__main__":
    main()
