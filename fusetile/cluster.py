"""The devices and the network between them: cluster.toml.

source = "kitchen"  # optional: only this node has the data, and sends the others what they need

[[node]]
name = "kitchen"
address = "192.168.1.21:7300"
device = "pi4"
memory = "1GB"      # optional: how much of it training may use
cores = 3           # optional
abi = "armv7"       # optional: "armv7" for a 32-bit system, "aarch64" for a 64-bit one, which is the default

[[node]]
name = "attic"
address = "192.168.1.22:7300"
profile = "attic.toml"    # instead of a kind of device: what `fusetile-runtime profile` measured there

[link]              # optional: without it, the slowest that the profiles have measured, or else 94 Mbit/s, 0.3 ms
rate = "94Mbit/s"
latency = "0.3ms"
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, Literal

from fusetile.device import (
    ABIS,
    PROFILES,
    ADDRESSABLE_32_bytes,
    Device,
    PARALLEL_efficiency,
    Profile,
    Speed,
    read_profile,
    read_toml,
)
from fusetile.errors import UserError

DEFAULT_PORT = 7300
MESSAGE_seconds = 0.1e-3
"""What a message keeps a link busy for besides its bytes: system calls at both ends, the frame's header."""


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


Wire = Literal["fp32", "fp16"]


@dataclass(frozen=True, slots=True)
class Link:
    """What connects any two devices: bytes per second in each direction, seconds until a small message has arrived.
    `wire`: as what maps and gradients travel on it (see `communicate.wire_dtype`)."""

    bytes_per_second: float
    latency_seconds: float
    wire: Wire = "fp32"


@dataclass(frozen=True, slots=True)
class Cluster:
    """Devices in rank order. `source`: the rank of the only one that has the data; None if all have them."""

    nodes: tuple[Node, ...]
    link: Link = Link(94e6 / 8, 0.3e-3)
    source: int | None = None

    @property
    def speeds(self) -> tuple[float, ...]:
        """Relative speed of each device, for proportional cuts."""
        return tuple(node.flops for node in self.nodes)

    def with_source(self, name: str) -> Cluster:
        """The same devices, of which the one with this name has the data; "" changes nothing. Raises UserError."""
        names = [node.name for node in self.nodes]
        if name and name not in names:
            raise UserError(f"the source {name!r} is none of the nodes: {', '.join(names)}")
        return replace(self, source=names.index(name)) if name else self

    def with_wire(self, wire: Wire) -> Cluster:
        """The same devices, between which maps and gradients travel like this."""
        return replace(self, link=replace(self.link, wire=wire))


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
    document = read_toml(path)
    _known(document, {"node", "link", "source"}, f"{path}")
    entries = document.get("node", [])
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: no [[node]] entry; a cluster needs at least one")
    read = [_node(entry, f"{path}: node {i + 1}", path.parent) for i, entry in enumerate(entries)]
    nodes = tuple(node for node, _ in read)
    for what in ("name", "address"):
        values = [getattr(node, what) for node in nodes]
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise UserError(f"{path}: two nodes have the {what} {twice[0]!r}; give each its own")
    measured = [link for _, link in read if link is not None]
    if measured and "link" not in document:
        link = Link(min(rate for rate, _ in measured), max(latency for _, latency in measured))
    else:
        link = _link(document.get("link", {}), f"{path}: [link]")
    source = document.get("source", "")
    if not isinstance(source, str):
        raise UserError(f"{path}: source = {source!r} must be the name of a node")
    return Cluster(nodes, link).with_source(source)


def _node(entry: Mapping[str, Any], where: str, folder: Path) -> tuple[Node, tuple[float, float] | None]:
    """A node, and what its profile says of its link; profiles are named from the folder of cluster.toml."""
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: {entry!r} must be a table with a name, an address and a device")
    _known(entry, {"name", "address", "device", "profile", "memory", "cores", "abi"}, where)
    described = "profile" if "profile" in entry else "device"
    for key in ("name", "address", described):
        if not isinstance(entry.get(key), str):
            raise UserError(f"{where}: {key} is missing or not a string; a node has a name, an address and a device")
    if described == "profile" and (other := {"device", "abi"} & set(entry)):
        raise UserError(f"{where}: a profile says what {other.pop()} would; take one of the two out")
    name, address = entry["name"], entry["address"]
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name.startswith("."):
        raise UserError(f"{where}: name {name!r} must be letters, digits, '-', '_' or '.': it names a folder")
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise UserError(f"{where} ({name}): address {address!r} must be host:port, like 192.168.1.21:{DEFAULT_PORT}")
    if described == "profile":
        profile = read_profile(folder / entry["profile"])
    else:
        profile = Profile(_profile(entry["device"], f"{where} ({name})"), None)
    device = profile.device
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
    return Node(name, address, device), profile.link


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
