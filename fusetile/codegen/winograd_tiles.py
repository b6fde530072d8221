"""How Winograd convolutions are cut: tiles of pixels, groups of tiles, register tiles. Numbers about CPUs are here and
in conv_tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusetile.codegen.conv_calls import Epilogue, Sizes
from fusetile.codegen.conv_tiles import Machine
from fusetile.codegen.conv_views import Filter, View
from fusetile.codegen.targets import Target
from fusetile.codegen.winograd_parts import PAD, m_strides

# Threads that may share a kernel: each has scratch of its own. A Pi has 4 cores.
WORKERS, WORKERS_ARM = 12, 4
LONGEST_ARM = {32: 7, 16: 3}  # by the number of vector registers
MIN_CHANNEL_TILES = 4  # fewer tiles of output channels than this would leave threads without work
MAX_TURNS = 32
SUMS_AGAIN = 1.25  # that sums of products are read and written again costs this much of reading V
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
    """All tiles of the maps in groups of at most `longest`."""
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


def workers_of(target: Target) -> int:
    """The most threads that share a call: each has scratch of its own."""
    return WORKERS_ARM if target.width == 4 else WORKERS


def power_of_two(limit: int) -> int:
    """The largest up to `limit`."""
    return 1 << (limit.bit_length() - 1)


def padded(stride: int) -> int:
    """A distance between streams that go side by side, at least `stride`, that does not put them in one cache set."""
    return stride + PAD if stride % SET < PAD or stride % SET > SET - PAD else stride


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution to lower: operands, and how it is cut. `wide` blocks of output channels are a register tile;
    `transposed`: the weights are stored for the convolution whose input gradient this is."""

    name: str
    cpu: Machine
    workers: int
    tiling: Tiling
    wide: int
    x: View
    w: Filter
    y: View
    epilogue: Epilogue
    transposed: bool

    @property
    def block(self) -> int:
        return self.cpu.vectors.block

    @property
    def row(self) -> int:
        """Floats of a register tile of output channels."""
        return self.wide * self.block

    @property
    def k_tiles(self) -> int:
        return self.tiling.sizes.k_blocks // self.wide

    @property
    def v_xi(self) -> int:
        """Floats of V from one xi to the next."""
        return padded(self.tiling.sizes.c_blocks * self.tiling.long * self.block)

    def m_group(self, *, by_xi: bool) -> int:
        """Floats of M for a group of tiles."""
        return m_strides(self.cpu.vectors, self.tiling.m, self.wide, self.tiling.long, by_xi=by_xi)[2]

    @property
    def block_groups(self) -> int:
        """Groups of tiles whose V and M stay in the cache while all of U passes."""
        group_bytes = 4 * (self.tiling.products * self.v_xi + self.m_group(by_xi=False))
        fitting = self.cpu.outer_bytes * 3 // 4 // group_bytes
        return max(1, min(fitting, -(-self.tiling.groups // self.workers)))

    @property
    def ranges(self) -> int:
        """Ranges of groups of tiles whose sums of products, for one tile of output channels, fit the cache."""
        return -(-self.tiling.groups // max(1, self.cpu.outer_bytes // (4 * self.m_group(by_xi=True))))

    @property
    def has_many_channels(self) -> bool:
        """Whether V is much smaller than U, or less to read for every tile of output channels than U is for every block
        of tiles, and the sums of products of a tile of output channels stay in the cache."""
        m_bytes = 4 * self.m_group(by_xi=True) * self.tiling.groups
        k = self.tiling.sizes.k_blocks * self.block
        v_again = SUMS_AGAIN * self.tiling.tiles * self.k_tiles * self.ranges
        u_again = k * -(-self.tiling.groups // self.block_groups)
        return (self.wide <= 2 or 2 * m_bytes <= self.cpu.outer_bytes) and (
            2 * self.tiling.tiles <= k or v_again <= u_again
        )

    def ints(self) -> dict[str, int]:
        """What both ways of doing it tell their kernels."""
        tiling, x, w, y = self.tiling, self.x, self.w, self.y
        return tiling.ints() | {
            "blocks": tiling.sizes.c_blocks,
            "k_tiles": self.k_tiles,
            "with_bias": int(self.epilogue.bias is not None),
            "x_image": x.image,
            "x_block": x.block,
            "x_row": x.row,
            "w_k": w.k,
            "w_block": w.block,
            "y_image": y.image,
            "y_block": y.block,
            "y_row": y.row,
            "y_pixel": y.pixel,
            "v_xi": self.v_xi,
        }
