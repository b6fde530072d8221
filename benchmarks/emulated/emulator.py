"""Kernels on an emulated CPU: results, executed instructions and simulated cache misses, none of which depend on time.

The kernels of several works become one static program, which qemu-user runs with the plugin `profile.c`. Needs Debian's
`qemu-user` (`qemu-user-static` loads no plugins) and nothing else: zig compiles the plugin and links the program.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.emulated.work import Work
from fusetile.codegen.build import compile_kernels
from fusetile.codegen.calls import BODY, Kernel
from fusetile.codegen.targets import Target

HERE = Path(__file__).parent
QEMU, QEMU_32 = "qemu-aarch64", "qemu-arm"
CPUS = {"pi3": "cortex-a53", "pi4": "cortex-a72", "pi5": "cortex-a76", "arm64": "max", "armv7": "cortex-a7"}
FIRST_LEVEL = {  # ways x sets of 64-byte lines
    "pi3": "4x128",
    "pi4": "2x256",
    "pi5": "4x256",
    "arm64": "4x128",
    "armv7": "4x128",
}
PLUGIN_VERSION = 1  # of QEMU 7 and 8


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a kernel, and how often it ran."""

    address: int
    count: int
    text: str


@dataclass(frozen=True, slots=True)
class Misses:
    """Lines of 64 bytes that a cache had to fetch, and those that it wrote back."""

    fetched: int
    written: int


@dataclass(frozen=True)
class Profile:
    """What ran: per function its instructions in order of addresses; and per simulated cache its misses, if asked."""

    functions: dict[str, list[Instruction]]
    caches: dict[str, Misses]

    @property
    def executed(self) -> int:
        return sum(instruction.count for part in self.functions.values() for instruction in part)


def available() -> bool:
    """Whether this computer has the emulators."""
    return shutil.which(QEMU) is not None and shutil.which(QEMU_32) is not None


def compile_plugin(folder: Path) -> Path:
    """The plugin, for this computer."""
    path = folder / "profile.so"
    flags = ["-O2", "-shared", "-fPIC", f"-DPLUGIN_VERSION={PLUGIN_VERSION}"]
    _run([sys.executable, "-m", "ziglang", "cc", *flags, "-o", str(path), str(HERE / "profile.c")])
    return path


class Program:
    """The works as one program for `target`; work i is run with `run(i)`."""

    def __init__(self, works: Sequence[Work], target: Target, folder: Path, plugin: Path) -> None:
        self.works, self.target, self.plugin = works, target, plugin
        kernels = {kernel.symbol: kernel for work in works for kernel in work.kernels}
        objects = compile_kernels(list(kernels.values()), target, lambda done, total: None)
        source, self.path = folder / f"{target.name}.c", folder / target.name
        source.write_text(_program(works, list(kernels.values())))
        flags = ["-target", target.zig[1].split(".")[0], *target.zig[2:], "-O2", "-static", "-nostdlib"]
        flags += ["-ffreestanding", f"-I{HERE}"]
        _run([sys.executable, "-m", "ziglang", "cc", *flags, "-o", str(self.path), str(source), *map(str, objects)])

    def run(self, index: int, *, caches: bool = False) -> tuple[list[np.ndarray], Profile]:
        """The outputs of a work, and what happened in its kernels."""
        work, out = self.works[index], self.path.with_suffix(".profile")
        arena = work.arena()
        options = [f"{self.plugin},out={out},symbol=_body"]
        options += [f"caches={FIRST_LEVEL[self.target.name]}"] if caches else []
        qemu = QEMU_32 if self.target.name == "armv7" else QEMU
        command = [qemu, "-cpu", CPUS[self.target.name], "-plugin", ",".join(options), str(self.path)]
        given = np.array([index, arena.size], np.int32).tobytes() + arena.tobytes()
        arena[:] = np.frombuffer(_run(command, given), np.uint8)
        return work.results(arena), read_profile(out)


def read_profile(path: Path) -> Profile:
    """What the plugin wrote."""
    functions: dict[str, dict[int, Instruction]] = {}
    caches = {}
    for line in path.read_text().splitlines():
        kind, name, *rest = line.split(maxsplit=4)
        if kind == "cache":
            caches[name] = Misses(*map(int, rest))
            continue
        address, count, text = int(rest[0], 16), int(rest[1]), rest[2].lower()
        found = functions.setdefault(name, {})
        before = found[address].count if address in found else 0
        found[address] = Instruction(address, before + count, " ".join(text.split()))
    return Profile({name: [found[at] for at in sorted(found)] for name, found in functions.items()}, caches)


def _program(works: Sequence[Work], kernels: Sequence[Kernel]) -> str:
    """C: the calls of all works."""
    lines = [f"#define ARENA_bytes {max(work.arena_bytes for work in works)}", '#include "driver.c"']
    for kernel in kernels:
        types = [*["int32_t"] * 3, *["void *"] * kernel.pointers, *["int32_t"] * kernel.ints]
        lines.append(f"void {BODY.format(kernel.symbol)}({', '.join([*types, *['float'] * kernel.floats])});")
    lines.append("static void run(int32_t work, char *arena) {")
    for i, work in enumerate(works):
        for call in work.calls:
            pointers = [f"arena + {offset}" for offset in call.pointers]
            given = ", ".join(map(str, [0, call.split, 0, *pointers, *call.ints, *call.floats]))
            lines.append(f"  if (work == {i}) {BODY.format(call.kernel)}({given});")
    return "\n".join([*lines, "}", ""])


def _run(command: Sequence[str], given: bytes = b"") -> bytes:
    done = subprocess.run(command, input=given, capture_output=True)
    if done.returncode:
        said = (done.stderr or done.stdout)[-2000:].decode(errors="replace")
        raise OSError(f"{command[0]} ends with status {done.returncode}: {said}")
    return done.stdout
