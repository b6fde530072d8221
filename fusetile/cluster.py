"""The devices and the network between them: cluster.toml and the built-in profiles.

[[node]]
name = "kitchen"
address = "192.168.1.21:7300"
device = "pi4"
memory = "1GB"      # optional: how much of it training may use
cores = 3           # optional
abi = "armv7"       # optional: "armv7" for a 32-bit system, "aarch64" for a 64-bit one, which is the default

[link]
rate = "94Mbit/s"
latency = "0.3ms"
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from fusetile.errors import UserError

DEFAULT_PORT = 7300
ABIS = {"aarch64": "", "armv7": "-32"}  # what is appended to the name of a Raspberry Pi's profile
ADDRESSABLE_32_bytes = 2_000_000_000  # what one block of memory of a 32-bit process may have
MESSAGE_seconds = 0.1e-3
"""What a message keeps a link busy for besides its bytes: system calls at both ends, the frame's header."""


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
class Node:
    """One device of the cluster; its rank is its place in `Cluster.nodes`."""

    name: str
    address: str
    device: Device

    @property
    def flops(self) -> float:
        """Floating-point operations per second of all its cores together."""
        cores = self.device.cores
        return self.device.core_flops * cores * (PARALLEL_efficiency if cores > 1 else 1.0)

    def speed(self, kind: str) -> Speed:
        """How fast it does ops of a kind: as measured, or by the general rates."""
        measured = dict(self.device.speeds).get(kind)
        return measured or Speed(self.flops, self.device.bandwidth)


@dataclass(frozen=True, slots=True)
class Link:
    """What connects any two devices: bytes per second in each direction, seconds until a small message has arrived."""

    bytes_per_second: float
    latency_seconds: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """Devices in rank order."""

    nodes: tuple[Node, ...]
    link: Link = Link(94e6 / 8, 0.3e-3)

    @property
    def speeds(self) -> tuple[float, ...]:
        """Relative speed of each device, for proportional cuts."""
        return tuple(node.flops for node in self.nodes)


def local_cluster(nodes: int, *, target: str = "host", ports: Sequence[int] = ()) -> Cluster:
    """`nodes` equal devices on this machine, by default at consecutive ports; loopback is fast."""
    if nodes < 1:
        raise UserError(f"--nodes {nodes}: a cluster has at least 1 node")
    device = _profile(target, "--target")
    if target == "host":
        device = replace(device, cores=max(1, device.cores // nodes), memory_bytes=host_memory_bytes())
    numbers = ports or range(DEFAULT_PORT, DEFAULT_PORT + nodes)
    members = tuple(Node(f"node{rank}", f"127.0.0.1:{port}", device) for rank, port in enumerate(numbers))
    return Cluster(members, Link(1e9, 0.05e-3) if target == "host" else Link(94e6 / 8, 0.3e-3))


def host_memory_bytes() -> int:
    """The memory of this computer."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_cluster(path: Path) -> Cluster:
    """Read cluster.toml; raises UserError that names the file, the entry and the value."""
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None
    _known(document, {"node", "link"}, f"{path}")
    entries = document.get("node", [])
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: no [[node]] entry; a cluster needs at least one")
    nodes = tuple(_node(entry, f"{path}: node {i + 1}") for i, entry in enumerate(entries))
    for what in ("name", "address"):
        values = [getattr(node, what) for node in nodes]
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise UserError(f"{path}: two nodes have the {what} {twice[0]!r}; give each its own")
    return Cluster(nodes, _link(document.get("link", {}), f"{path}: [link]"))


def _node(entry: Mapping[str, Any], where: str) -> Node:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: {entry!r} must be a table with a name, an address and a device")
    _known(entry, {"name", "address", "device", "memory", "cores", "abi"}, where)
    for key in ("name", "address", "device"):
        if not isinstance(entry.get(key), str):
            raise UserError(f"{where}: {key} is missing or not a string; a node has a name, an address and a device")
    name, address = entry["name"], entry["address"]
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name.startswith("."):
        raise UserError(f"{where}: name {name!r} must be letters, digits, '-', '_' or '.': it names a folder")
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise UserError(f"{where} ({name}): address {address!r} must be host:port, like 192.168.1.21:{DEFAULT_PORT}")
    device = _profile(entry["device"], f"{where} ({name})")
    if "abi" in entry:
        device = _with_abi(device, entry["abi"], f"{where} ({name})")
    if "memory" in entry:
        device = replace(device, memory_bytes=int(_quantity(entry["memory"], BYTES, f"{where} ({name}): memory")))
        if device.target == "armv7" and device.memory_bytes > ADDRESSABLE_32_bytes:
            raise UserError(f"{where} ({name}): memory = {entry['memory']!r}: a 32-bit system can use at most 2GB")
    if "cores" in entry:
        cores = entry["cores"]
        if not isinstance(cores, int) or isinstance(cores, bool) or not 1 <= cores <= 256:
            raise UserError(f"{where} ({name}): cores = {cores!r} must be a whole number from 1 to 256")
        device = device.with_cores(cores)
    return Node(name, address, device)


def _profile(kind: str, where: str) -> Device:
    if kind not in PROFILES:
        raise UserError(f"{where}: unknown device {kind!r}; known are {', '.join(sorted(PROFILES))}")
    return PROFILES[kind]


def _with_abi(device: Device, abi: Any, where: str) -> Device:
    if not isinstance(abi, str) or abi not in ABIS:
        raise UserError(f"{where}: abi = {abi!r} must be one of {', '.join(ABIS)}")
    kind = device.kind.removesuffix(ABIS["armv7"]) + ABIS[abi]
    if device.kind == "host" or kind not in PROFILES:
        raise UserError(f"{where}: a device {device.kind!r} has no choice of abi; take abi = {abi!r} out")
    return PROFILES[kind]


def _link(entry: Mapping[str, Any], where: str) -> Link:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: must be a table with rate and latency")
    _known(entry, {"rate", "latency"}, where)
    rate = _quantity(entry.get("rate", "94Mbit/s"), RATES, f"{where}: rate")
    return Link(rate, _quantity(entry.get("latency", "0.3ms"), TIMES, f"{where}: latency"))


def _known(entry: Mapping[str, Any], keys: set[str], where: str) -> None:
    unknown = sorted(set(entry) - keys)
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(keys))}")


BYTES = {"": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
RATES = {"Mbit/s": 1e6 / 8, "Gbit/s": 1e9 / 8, "MB/s": 1e6, "GB/s": 1e9}
TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def _quantity(value: Any, units: Mapping[str, float], where: str) -> float:
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/]*)\s*", str(value))
    try:
        number = float(match[1]) * units[match[2]] if match else 0.0
    except (KeyError, ValueError):
        number = 0.0
    if not 0 < number < inf:
        known = ", ".join(unit for unit in units if unit)
        raise UserError(f"{where} = {value!r} must be a positive number with a unit: {known}")
    return number
