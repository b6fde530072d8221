"""Direct or Winograd, layer by layer, on a Raspberry Pi: `python -m benchmarks.choices [--target pi3] [PATTERN]`.

The instructions that each algorithm is estimated to take the time of, per ideal vector multiply-add: executed ones and,
at their price, lines that move between caches and memory (see `benchmarks/emulated/choices.py`). * is what the compiler
chooses, ! what it should choose instead. With --count, kernels are counted anew under an emulator, and the counts kept:
do that after a change of kernels, and fit the table in `fusetile/codegen/conv_choice.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.emulated.choices import CHOICES, CHOSEN_FOR, Counts, Key, read_counts, write_counts
from benchmarks.emulated.emulator import Program, available, compile_plugin
from benchmarks.emulated.layers import PHASES, Layer
from fusetile.codegen.targets import target_named

NAMES = {0: "direct", 2: "F(2x2)", 4: "F(4x4)"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=CHOSEN_FOR, help="one CPU (default: all)")
    parser.add_argument("--count", action="store_true", help="count anew, some minutes for each CPU")
    parser.add_argument("pattern", nargs="?", default="", help="only layers whose name contains this")
    options = parser.parse_args()
    layers = [layer for layer in CHOICES if options.pattern in str(layer)]
    for name in [options.target] if options.target else CHOSEN_FOR:
        if options.count:
            if not available():
                raise SystemExit("--count needs qemu-aarch64 with plugins: apt install qemu-user")
            write_counts(read_counts() | count(name, layers))
        table(name, layers, read_counts())


def count(name: str, layers: Sequence[Layer]) -> dict[Key, Counts]:
    """All algorithms of all phases of layers on a CPU."""
    rows = [(layer, phase, m) for layer in layers for phase in PHASES for m in layer.algorithms()]
    target, found = target_named(name), {}
    with tempfile.TemporaryDirectory() as folder:
        works = [layer.work(phase, m, target) for layer, phase, m in rows]
        program = Program(works, target, Path(folder), compile_plugin(Path(folder)))
        for i, (layer, phase, m) in enumerate(rows):
            found[name, str(layer), phase, m] = Counts.of(program.run(i, caches=True)[1])
    return found


def table(name: str, layers: Sequence[Layer], counts: dict[Key, Counts]) -> None:
    """What is estimated, chosen and best."""
    target = target_named(name)
    print(f"\n{name:22} {'phase':16} " + " ".join(f"{label:>8}" for label in NAMES.values()))
    for layer in layers:
        for phase in PHASES:
            costs = {m: counts[name, str(layer), phase, m].instructions(target) for m in layer.algorithms()}
            chosen, best = layer.chosen(phase, target), min(costs, key=costs.__getitem__)
            marks = {best: "!"} | {chosen: "*"}
            shown = " ".join(f"{cost / layer.ideal:7.2f}{marks.get(m, ' ')}" for m, cost in costs.items())
            print(f"{layer!s:22} {phase:16} {shown}")


if __name__ == "__main__":
    main()
