"""Direct or Winograd on a Raspberry Pi: what is chosen is about the fastest by `benchmarks/emulated/counts.tsv`, which
has the counts of the kernels as they are."""

from __future__ import annotations

from pathlib import Path
from statistics import geometric_mean

import pytest

from benchmarks.emulated.choices import CHOICES, CHOSEN_FOR, Counts, read_counts
from benchmarks.emulated.emulator import Program
from benchmarks.emulated.layers import PHASES, Layer
from fusetile.codegen.conv_choice import DIRECT, TILES
from fusetile.codegen.job import Numerics
from fusetile.codegen.targets import TARGETS

# Times of the fastest that what is chosen may take, of any layer and in the mean: kernels leave a cache suddenly, the
# formula that chooses knows only roughly when, and counts are no times.
LONGEST: dict[Numerics, float] = {"fast": 1.2, "strict": 1.3}
MEAN = 1.01
COUNTED = {"pi3": Layer(64, 64, 7, 3), "armv7": Layer(32, 32, 13, 3)}


@pytest.mark.parametrize("numerics", TILES)
@pytest.mark.parametrize("name", CHOSEN_FOR)
def test_what_is_chosen_is_fastest(name: str, numerics: Numerics) -> None:
    counts, target, ratios = read_counts(), TARGETS[name], {}
    for layer in CHOICES:
        for phase in PHASES:
            times = {m: counts[name, str(layer), phase, m].instructions(target) for m in (DIRECT, *TILES[numerics])}
            ratios[layer, phase] = times[layer.chosen(phase, target, numerics)] / min(times.values())
    assert not {case: ratio for case, ratio in ratios.items() if ratio > LONGEST[numerics]}
    assert geometric_mean(ratios.values()) <= MEAN


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_of_the_kernels_as_they_are(name: str, plugin: Path, tmp_path: Path) -> None:
    layer, target, counts = COUNTED[name], TARGETS[name], read_counts()
    rows = [(phase, m) for phase in PHASES for m in layer.algorithms()]
    program = Program([layer.work(phase, m, target) for phase, m in rows], target, tmp_path, plugin)
    for i, (phase, m) in enumerate(rows):
        found = Counts.of(program.run(i, caches=True)[1]).instructions(target)
        assert found == pytest.approx(counts[name, str(layer), phase, m].instructions(target), rel=0.05), (phase, m)
