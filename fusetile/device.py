"""Kinds of devices: the built-in profiles, and those that `fusetile-runtime profile` has measured."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fusetile.errors import UserError

ABIS = {"aarch64": "", "armv7": "-32"}  # what is appended to the name of a Raspberry Pi's profile
ADDRESSABLE_32_bytes = 2_000_000_000  # what one block of memory of a 32-bit process may have
PROFILE_version = 1


@dataclass(frozen=True, slots=True)
class Messaging:
    """Processor time that a message takes from the kernels, at either end: besides its bytes, and per byte. The
    built-in profiles do not count it."""

    message_seconds: float = 0.0
    byte_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a device does ops of one kind, with all its cores: operations and bytes per second, and seconds that
    each op takes besides. `overlap`: the part of the shorter of computing and moving that hides behind the longer; 1 is
    a roofline (Williams, Waterman, Patterson, 2009), 0 a sum, as it is fitted to measurements."""

    flops: float
    bandwidth: float
    overhead_seconds: float = 0.0
    overlap: float = 1.0

    def seconds(self, flops: Any, traffic_bytes: Any) -> Any:
        """For numbers or arrays; nothing to do takes no time."""
        computing, moving = flops / self.flops, traffic_bytes / self.bandwidth
        both = np.maximum(computing, moving) + (1 - self.overlap) * np.minimum(computing, moving)
        return both + self.overhead_seconds * (both > 0)


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of device. `core_flops` is the rate that convolutions reach on one core, in floating-point operations per
    second; `bandwidth` the memory's, in bytes per second. `speeds` says more of kinds of ops that were measured (see
    `cost.kind_of`), with `cores` cores."""

    kind: str
    target: str  # name in codegen.targets
    cores: int
    core_flops: float
    bandwidth: float
    memory_bytes: int
    speeds: tuple[tuple[str, Speed], ...] = ()
    messaging: Messaging = Messaging()

    def with_cores(self, cores: int) -> Device:
        """The same device using so many cores; what was measured is taken to scale with them."""
        part = cores / self.cores
        speeds = tuple((kind, replace(speed, flops=speed.flops * part)) for kind, speed in self.speeds)
        return replace(self, cores=cores, speeds=speeds)


PARALLEL_efficiency = 0.9
"""Of the rate of all cores of a device together, the part that is left for use: an estimate."""

# Where the numbers come from. Cores and memory: the boards' data sheets (raspberrypi.com). `core_flops`, what direct
# float32 kernels reach on one core: an estimate of 15 to 20 % of the peak (8 operations per cycle on a Cortex-A53, 16
# on an A72, 32 on an A76, at the board's clock: 1.2, 1.4, 1.0, 1.5 and 2.4 GHz); boards with an A53 are scaled by
# their clocks, 32-bit kernels get 80 %. `bandwidth`, of a copy: an estimate of a quarter to a half of what the memory
# chips can do. Host: an estimate for one core with AVX2 or AVX-512. None of them is measured on a board.
PROFILES: dict[str, Device] = {
    "pi3": Device("pi3", "pi3", 4, 1.5e9, 2.0e9, 1 << 30),
    "pi3b+": Device("pi3b+", "pi3", 4, 1.75e9, 2.0e9, 1 << 30),
    "zero2w": Device("zero2w", "pi3", 4, 1.25e9, 1.8e9, 1 << 29),
    "pi4": Device("pi4", "pi4", 4, 5.0e9, 4.0e9, 2 << 30),
    "pi5": Device("pi5", "pi5", 4, 15.0e9, 9.0e9, 4 << 30),
    "pi3-32": Device("pi3-32", "armv7", 4, 1.2e9, 2.0e9, 1 << 30),
    "pi3b+-32": Device("pi3b+-32", "armv7", 4, 1.4e9, 2.0e9, 1 << 30),
    "zero2w-32": Device("zero2w-32", "armv7", 4, 1.0e9, 1.8e9, 1 << 29),
    "pi4-32": Device("pi4-32", "armv7", 4, 4.0e9, 4.0e9, ADDRESSABLE_32_bytes),
    "pi5-32": Device("pi5-32", "armv7", 4, 12.0e9, 9.0e9, ADDRESSABLE_32_bytes),
    "host": Device("host", "host", os.cpu_count() or 1, 40.0e9, 10.0e9, 8 << 30),
}


@dataclass(frozen=True, slots=True)
class Profile:
    """A file of measurements: the device, and its link's (bytes per second, latency in seconds) if it has seen one."""

    device: Device
    link: tuple[float, float] | None


def read_toml(path: Path, *, hint: str = "") -> dict[str, Any]:
    """Raises UserError, with the hint if there is no such file."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}{hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None


def read_profile(path: Path) -> Profile:
    """What `fusetile-runtime profile` wrote; raises UserError."""
    document = read_toml(path, hint="; `fusetile-runtime profile` writes such files")
    if document.get("version") != PROFILE_version:
        raise UserError(f"{path}: not a profile of version {PROFILE_version}: measure with this version of fusetile")
    try:
        link = document.get("link")
        device = Device(
            kind=str(document["name"]),
            target=str(document["target"]),
            cores=int(_positive(document, "cores")),
            core_flops=_positive(document, "core_flops"),
            bandwidth=_positive(document, "bandwidth"),
            memory_bytes=int(_positive(document, "memory_bytes")),
            speeds=tuple((kind, _speed(entry)) for kind, entry in document.get("speeds", {}).items()),
            messaging=Messaging(**{key: float(value) for key, value in document.get("messaging", {}).items()}),
        )
        return Profile(
            device, (_positive(link, "bytes_per_second"), _positive(link, "latency_seconds")) if link else None
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a whole profile ({error}): measure again") from None


def _speed(entry: dict[str, Any]) -> Speed:
    overhead = float(entry["overhead_seconds"])
    return Speed(_positive(entry, "flops"), _positive(entry, "bandwidth"), overhead, overlap=0.0)


def _positive(entry: dict[str, Any], key: str) -> float:
    value = float(entry[key])
    if not value > 0:
        raise ValueError(f"{key} = {value}")
    return value
