"""Runs kernel calls of another CPU in an emulated Python, so that every kernel test can be run for ARM as well.

    FUSETILE_TEST_TARGET=pi3 FUSETILE_TEST_PYTHON="qemu-aarch64-static -cpu cortex-a53 -L ROOT ROOT/usr/bin/python3.11"

The emulated Python needs numpy. It is started once, as this module's program, and does a job per line of its input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import astuple
from functools import cache
from pathlib import Path

import numpy as np

from fusetile.program import Call
from fusetile.runtime.native import Library
from fusetile.runtime.storage import make_arena

COMMAND = os.environ.get("FUSETILE_TEST_PYTHON", "")
TARGET = os.environ.get("FUSETILE_TEST_TARGET", "host")


def run(library: Path, calls: Sequence[Call], arena: np.ndarray, threads: int) -> None:
    """Run calls on an arena: in this process, or emulated."""
    if not COMMAND:
        with Library(library, threads=threads) as loaded:
            loaded.segment(calls, arena)()
        return
    with tempfile.NamedTemporaryFile() as file:
        arena.tofile(file.name)
        job = {"library": str(library), "arena": file.name, "threads": threads, "calls": [astuple(c) for c in calls]}
        process = _process()
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer == "done\n", f"the emulated Python says {answer!r}"
        arena[:] = np.fromfile(file.name, np.uint8)


@cache
def _process() -> subprocess.Popen[str]:
    command = [*COMMAND.split(), __file__]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _serve() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        stored = np.fromfile(job["arena"], np.uint8)
        arena = make_arena(stored.size)
        arena[:] = stored
        with Library(Path(job["library"]), threads=job["threads"]) as library:
            library.segment([Call(*fields) for fields in job["calls"]], arena)()
        arena.tofile(job["arena"])
        print("done", flush=True)


if __name__ == "__main__":
    _serve()
