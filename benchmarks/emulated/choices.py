"""Why a convolution is direct or Winograd on a Raspberry Pi: counts of every algorithm, and the time they stand for.

Times are in executed instructions. What counts cost:

    an instruction                                   1
    a line fetched into the first-level cache        NEAR: about half the latency of the second level, an assumption
    a line fetched from memory, or written to it     by the rates with which plans are made (`fusetile.device`): what a
                                                     core executes while its share of the bandwidth moves a line

Counting takes minutes, so `counts.tsv` has the counts; `python -m benchmarks.choices --count` writes it anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from benchmarks.emulated.emulator import Profile
from benchmarks.emulated.layers import Layer
from fusetile.codegen.targets import Target
from fusetile.device import PROFILES

# of YOLOv2, ResNet, VGG and U-Nets, whole and as plans cut them; from 104 rows on a pixel costs the same
CHOICES = tuple(
    Layer(c, k, rows, 3, columns=0 if columns == rows else columns, images=images)
    for c, k, rows, columns, images in (
        (32, 64, 104, 104, 1),
        (64, 128, 52, 52, 1),
        (128, 256, 26, 26, 1),
        (256, 512, 26, 26, 1),
        (512, 1024, 13, 13, 1),
        (64, 64, 56, 56, 1),
        (128, 128, 28, 28, 1),
        (256, 256, 14, 14, 1),
        (512, 512, 7, 7, 1),
        (256, 256, 7, 7, 4),
        (256, 256, 13, 13, 4),
        (1024, 1024, 13, 7, 1),
        (512, 1024, 13, 4, 1),
        (256, 512, 26, 9, 1),
        (512, 256, 13, 7, 1),
        (128, 256, 26, 13, 1),
        (128, 128, 7, 7, 1),
        (128, 64, 9, 26, 1),
        (64, 128, 52, 9, 1),
        (64, 64, 14, 14, 1),
        (64, 64, 7, 7, 1),
        (64, 32, 26, 26, 1),
        (32, 32, 26, 26, 1),
        (32, 32, 13, 13, 1),
        (32, 32, 7, 7, 1),
        (32, 64, 104, 18, 1),
    )
)
CHOSEN_FOR = ("pi3", "pi4", "pi5", "armv7")  # targets
DEVICES = {"pi3": "pi3", "pi4": "pi4", "pi5": "pi5", "arm64": "pi4", "armv7": "pi3-32"}
NEAR = 8.0
SMALL_CACHE = ("pi3", "armv7")  # 512 KB; a Pi 4 has 1 MB, a core of a Pi 5 512 KB and its share of 2 MB
DIRECT = {32: 1.2, 16: 1.7}  # instructions per vector multiply-add of direct kernels, by the number of registers
LINE_bytes, VECTOR_flops = 64, 8

COUNTS = Path(__file__).with_name("counts.tsv")
Key = tuple[str, str, str, int]  # target, layer, phase, algorithm


@dataclass(frozen=True, slots=True)
class Counts:
    """Executed instructions, and lines that moved: into the first-level cache; between memory and a second-level cache
    of 512 KB, or of 1 MB, in both directions."""

    executed: int
    near: int
    memory_512: int
    memory_1024: int

    @classmethod
    def of(cls, profile: Profile) -> Counts:
        moved = [profile.caches[name].fetched + profile.caches[name].written for name in ("512KB", "1MB")]
        return cls(profile.executed, profile.caches["first"].fetched, *moved)

    def instructions(self, target: Target) -> float:
        """As many instructions would take as long."""
        memory = self.memory_512 if target.name in SMALL_CACHE else self.memory_1024
        return self.executed + NEAR * self.near + line_instructions(target) * memory


def line_instructions(target: Target) -> float:
    """What a line costs that comes from memory or goes there."""
    device = PROFILES[DEVICES[target.name]]
    per_second = device.core_flops / VECTOR_flops * DIRECT[target.registers]
    return per_second * LINE_bytes * device.cores / device.bandwidth


def read_counts() -> dict[Key, Counts]:
    found = {}
    for line in COUNTS.read_text().splitlines()[1:]:
        target, layer, phase, algorithm, *numbers = line.split("\t")
        found[target, layer, phase, int(algorithm)] = Counts(*map(int, numbers))
    return found


def write_counts(counts: Mapping[Key, Counts]) -> None:
    """By target and layer, in the order of the tables above."""
    layers = [str(layer) for layer in CHOICES]

    def place(key: Key) -> tuple[int, int]:
        return CHOSEN_FOR.index(key[0]), layers.index(key[1])

    def row(values: Iterable[object]) -> str:
        return "\t".join(map(str, values)) + "\n"

    head = row(["target", "layer", "phase", "algorithm", *(field.name for field in fields(Counts))])
    COUNTS.write_text(head + "".join(row((*key, *astuple(counts[key]))) for key in sorted(counts, key=place)))
