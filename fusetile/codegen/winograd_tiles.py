"""How Winograd convolutions are cut: tiles of pixels, groups of tiles, register tiles. Numbers about CPUs are here and
in conv_tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusetile.codegen.conv import Sizes
from fusetile.codegen.conv_tiles import Machine
from fusetile.codegen.targets import Target
from fusetile.codegen.winograd_parts import PAD

# Scratch per work unit is why there are few: as many as keep 2, 3 and 4 threads evenly busy, or the cores of a Pi.
UNITS, UNITS_ARM = 12, 4
LONGEST_ARM = {32: 7, 16: 3}  # by the number of vector registers
MIN_CHANNEL_TILES = 4  # fewer tiles of output channels than this would leave threads without work
MAX_TURNS = 32
SET = 256  # floats; at multiples of it, more of 36 streams fall into one set of the nearest cache than it has lines


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles of m x m pixels over `sizes`, in groups of `long` (`long_groups` of them) or one less."""

    m: int
    sizes: Sizes
    long: int
    long_groups: int
    groups: int

    @property
    def down(self) -> int:
        return -(-self.sizes.rows // self.m)

    @property
    def across(self) -> int:
        return -(-self.sizes.columns // self.m)

    @property
    def tiles(self) -> int:
        return self.sizes.images * self.down * self.across

    @property
    def products(self) -> int:
        return (self.m + 2) ** 2

    def ints(self) -> dict[str, int]:
        """What kernels need to find the tiles of a group, and the pixels of a tile."""
        return {
            "groups": self.groups,
            "long": self.long,
            "long_groups": self.long_groups,
            "down": self.down,
            "across": self.across,
            "rows": self.sizes.rows,
            "columns": self.sizes.columns,
        }


def tiled(m: int, sizes: Sizes, longest: int) -> Tiling:
    empty = Tiling(m, sizes, 1, 0, 0)
    return grouped(empty, empty.tiles, longest)


def grouped(tiling: Tiling, tiles: int, longest: int) -> Tiling:
    """So many of the tiles in groups of at most `longest`, that differ by at most one."""
    groups = -(-tiles // longest)
    long = -(-tiles // groups)
    return replace(tiling, long=long, long_groups=tiles - groups * (long - 1), groups=groups)


def longest(cpu: Machine, wide: int) -> int:
    """The most tiles in a group for which a register tile with so many blocks of output channels needs no stack."""
    return LONGEST_ARM[cpu.registers] if cpu.vectors.lanes else cpu.pixels[wide]


def widths(cpu: Machine, k_blocks: int) -> list[int]:
    """How many blocks of output channels a register tile may have, widest first. On x86 two use every load of an input
    twice."""
    widths = (1,) if cpu.vectors.lanes else (4, 2) if 4 in cpu.pixels else (2,)
    return [wide for wide in widths if k_blocks % wide == 0] or [1]


def units_of(target: Target) -> int:
    return UNITS_ARM if target.width == 4 else UNITS


def power_of_two(limit: int) -> int:
    return 1 << (limit.bit_length() - 1)


def padded(stride: int) -> int:
    """A distance between streams that go side by side, at least `stride`, that does not put them in one cache set."""
    return stride + PAD if stride % SET < PAD or stride % SET > SET - PAD else stride
