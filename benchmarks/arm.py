"""The kernels of Raspberry Pis, counted under an emulator: `python -m benchmarks.arm [--target pi3] [PATTERN]`.

Nothing here is a time, and nothing depends on this computer. Per layer, phase and algorithm (direct, Winograd F(2x2),
F(4x4); * is what the compiler chooses), and per ideal vector multiply-add of the direct convolution:

    insns     executed instructions, of all kernels of the phase with their transforms
    misses    lines of 64 bytes per 1000: fetched into the first-level cache of this CPU, and into a second-level cache
              of 512 KB and of 1 MB that one core has for itself
    time      the instructions that take as long as these and the misses, see benchmarks/emulated/choices.py
    loads     in the loops with a tenth of all multiplications or more, which Winograd's transforms have not:
              instructions from a load to its first use, least and median; [sp] counts accesses to the stack there

Then the same of OpenBLAS, which chooses its kernel for the CPU (with --openblas: a matrix product of numpy's in an
emulated Debian, made on first use), and instructions per element of other ops. All results, on random data, must be
those of this computer's kernels. What no emulator knows: how many instructions a cycle takes, what a miss costs, and
what hardware prefetches. Needs Debian's qemu-user. `python -m benchmarks.choices` has all layers that are chosen for.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np

from benchmarks.emulated.choices import Counts
from benchmarks.emulated.emulator import CPUS, Program, available, compile_plugin
from benchmarks.emulated.layers import Layer
from benchmarks.emulated.loops import hot_loops, typical_distance
from benchmarks.emulated.openblas import profile_product
from benchmarks.emulated.others import Other, others
from benchmarks.emulated.work import Work, run_here
from fusetile.codegen.targets import Target, target_named

LAYERS = (
    Layer(3, 32, 104, 3),
    Layer(32, 64, 104, 3),
    Layer(64, 128, 52, 3),
    Layer(128, 256, 26, 3),
    Layer(256, 512, 13, 3),
    Layer(128, 64, 52, 1),
    Layer(256, 128, 26, 1),
    Layer(512, 128, 7, 1),
    Layer(3, 64, 112, 7, 2),
    Layer(64, 128, 28, 3, 2),
    Layer(64, 64, 56, 3, groups=64),
    Layer(64, 64, 56, 3, 2, groups=64),
)
HOT = 0.1
NAMES = {0: "direct", 2: "F(2x2)", 4: "F(4x4)"}


Row = tuple[Layer, str, int]
Results = list[list[np.ndarray]]


def check(name: str, found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """SystemExit unless the emulated results are this computer's, up to rounding."""
    for a, b in zip(found, expected, strict=True):
        if (error := np.abs(a.astype(float) - b).max() / np.abs(b).max()) > 1e-4:
            raise SystemExit(f"{name}: results differ from this computer's by {error:.0e} of the largest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=sorted(CPUS), help="one CPU (default: pi3, pi4, pi5 and armv7)")
    parser.add_argument("--openblas", action="store_true", help="count OpenBLAS's matrix product, too")
    parser.add_argument("pattern", nargs="?", default="", help="only layers and ops whose name contains this")
    options = parser.parse_args()
    if not available():
        raise SystemExit("benchmarks.arm needs qemu-aarch64 with plugins: apt install qemu-user")
    rows = [
        (layer, phase, algorithm)
        for layer in LAYERS
        if options.pattern in str(layer)
        for phase in layer.phases()
        for algorithm in layer.algorithms()
    ]
    more = [other for other in others() if options.pattern in other.name]
    if not rows and not more:
        raise SystemExit(f"nothing here has {options.pattern!r} in its name; without a pattern all names are shown")
    here = run_here(works(rows, more, target_named("host")))
    with tempfile.TemporaryDirectory() as folder:
        plugin = compile_plugin(Path(folder))
        for name in [options.target] if options.target else ["pi3", "pi4", "pi5", "armv7"]:
            program = Program(works(rows, more, target_named(name)), target_named(name), Path(folder), plugin)
            table(program, rows, here[: len(rows)])
            table_of_others(program, more, here[len(rows) :])
            if options.openblas and name != "armv7":  # Debian's numpy there has no OpenBLAS
                openblas(name, plugin, Path(folder))


def works(rows: Sequence[Row], more: Sequence[Other], target: Target) -> list[Work]:
    """The convolutions, then the other ops."""
    convolutions = [layer.work(phase, algorithm, target) for layer, phase, algorithm in rows]
    return convolutions + [other.work(target) for other in more]


def table(program: Program, rows: Sequence[Row], expected: Results) -> None:
    """The convolutions on one CPU."""
    name = program.target.name
    print(f"\n{name}: {CPUS[name]}")
    if not rows:
        return
    head = f"{'layer':22} {'phase':16} {'algorithm':10} {'insns':>6} {'misses: L1 512K 1M':>20}"
    print(f"{head} {'time':>5} {'loads':>9} [sp]")
    for i, (layer, phase, algorithm) in enumerate(rows):
        results, profile = program.run(i, caches=True)
        check(f"{layer}, {phase}", results, expected[i])
        loops = hot_loops(profile, HOT)
        least, middle = typical_distance(loops)
        misses = " ".join(f"{1000 * cache.fetched / layer.ideal:6.1f}" for cache in profile.caches.values())
        label = NAMES[algorithm] + "*" * (layer.chosen(phase, program.target) == algorithm)
        print(
            f"{layer!s:22} {phase:16} {label:10} {profile.executed / layer.ideal:6.2f} {misses:>20} "
            f"{Counts.of(profile).instructions(program.target) / layer.ideal:5.2f} "
            f"{least:3d} {middle:5.1f} {sum(len(loop.stack) for loop in loops):4d}",
            flush=True,
        )


def table_of_others(program: Program, more: Sequence[Other], expected: Results) -> None:
    """Instructions per element of the other ops; they come after the convolutions."""
    for i, other in enumerate(more):
        results, profile = program.run(len(program.works) - len(more) + i)
        check(other.name, results, expected[i])
        print(f"{other.name:50} {profile.executed / other.elements:6.2f} instructions per element", flush=True)


def openblas(name: str, plugin: Path, folder: Path) -> None:
    """OpenBLAS's product of the matrices that a 1x1 convolution is."""
    layer = Layer(256, 128, 26, 1)
    profile = profile_product(name, plugin, folder, layer.k, layer.c, prod(layer.out))
    loops = hot_loops(profile, HOT)
    least, middle = typical_distance(loops)
    stack = sum(len(loop.stack) for loop in loops)
    sizes, insns = f"{layer.k} x {layer.c} x {prod(layer.out)}", profile.executed / layer.ideal
    print(f"\nOpenBLAS, product {sizes}: {insns:.2f} insns, loads {least} {middle:.1f}, [sp] {stack}", flush=True)


if __name__ == "__main__":
    main()
