"""The file that a measured device is described by: speeds fitted to measurements, and where every number comes from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

VERSION = 1


@dataclass(frozen=True, slots=True)
class Probe:
    """An op that was timed: its kind, its operations and bytes, and how long it took."""

    kind: str
    flops: float
    traffic_bytes: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds = overhead + flops / `flops` + bytes / `bandwidth`; `error`: the largest relative one of `ops` ops."""

    flops: float
    bandwidth: float
    overhead_seconds: float
    error: float
    ops: int

    def seconds(self, probe: Probe) -> float:
        """What an op would take."""
        return self.overhead_seconds + probe.flops / self.flops + probe.traffic_bytes / self.bandwidth


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """Of the link, in each direction while both are busy; `small_seconds` until a small message has arrived. Processor
    seconds per message and per byte, at either end."""

    bytes_per_second: float
    small_seconds: float
    message_cpu_seconds: float
    byte_cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A device. `scale`: what the system takes away from the kernels; `copy_bandwidth`: bytes read and written per
    second; `parallel_efficiency` and `message_seconds`: what the planner takes off by itself."""

    name: str
    nodes: int
    target: str
    threads: int
    probes: Sequence[Probe]
    scale: float
    copy_bandwidth: float
    link: LinkSpeed | None
    parallel_efficiency: float
    message_seconds: float


def speeds(probes: Sequence[Probe]) -> dict[str, Speed]:
    """A fit per kind of op."""
    kinds: dict[str, list[Probe]] = {}
    for probe in probes:
        kinds.setdefault(probe.kind, []).append(probe)
    return {kind: fit(members, computes=kind.startswith("conv")) for kind, members in sorted(kinds.items())}


def fit(probes: Sequence[Probe], *, computes: bool) -> Speed:
    """Non-negative least squares of relative errors. Ops that do not compute are explained by their bytes alone; of
    one or two ops no overhead can be told."""
    columns = np.array([[computes * probe.flops, probe.traffic_bytes, 1.0] for probe in probes])
    relative = columns / np.array([[probe.seconds] for probe in probes])
    best, least = np.zeros(3), np.inf
    used = ([0, 1, 2] if computes else [1, 2]) if len(probes) > 2 else [0 if computes else 1]
    for count in range(1, len(used) + 1):
        for chosen in map(list, combinations(used, count)):
            found, *_ = np.linalg.lstsq(relative[:, chosen], np.ones(len(probes)), rcond=None)
            error = float(np.square(relative[:, chosen] @ found - 1).sum())
            if (found > 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(3), error
                best[chosen] = found
    error = float(np.abs(relative @ best - 1).max())
    flops, bandwidth = (1 / part if part else float("inf") for part in best[:2])
    return Speed(flops, bandwidth, float(best[2]), error, len(probes))


def toml(measured: Measured) -> str:
    """The profile as cluster.toml can name it."""
    found = speeds(measured.probes)
    convolutions = [probe for probe in measured.probes if probe.kind.startswith("conv")]
    rate = sum(probe.flops for probe in convolutions) / sum(probe.seconds for probe in convolutions)
    core_rate = rate / measured.threads / (measured.parallel_efficiency if measured.threads > 1 else 1.0)
    fitted = sum(found[probe.kind].seconds(probe) for probe in measured.probes)
    together = sum(probe.seconds for probe in measured.probes)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = [
        f"# Measured by `fusetile-runtime profile` on {measured.name!r}, {time.strftime('%Y-%m-%d %H:%M')}.",
        f"version = {VERSION}",
        f"name = {json.dumps(measured.name)}",
        f"target = {json.dumps(measured.target)}  # what the kernels were compiled for",
        f"cores = {measured.threads}  # threads with which they were measured",
        f"memory_bytes = {memory_bytes}  # the system's; `memory` in cluster.toml says how much training may use",
        f"core_flops = {core_rate:.4g}  # measured: all convolutions of the probe together, per core",
        f"bandwidth = {measured.copy_bandwidth:.4g}  # measured: bytes read and written per second by a large copy",
        *(_link(measured, measured.link) if measured.link is not None else ()),
        "",
        "# Measured: seconds of an op = overhead_seconds + operations / flops + bytes / bandwidth, fitted per kind.",
        f"# Of {len(measured.probes)} ops each the least of its times; times {measured.scale:.3f} for what the system "
        "takes away.",
        f"# All ops together took {together:.4g} s, and would take {fitted:.4g} s by these numbers.",
    ]
    for kind, speed in found.items():
        lines += [
            f"[speeds.{json.dumps(kind)}]  # {speed.ops} ops; the largest error of one is {100 * speed.error:.0f} %",
            f"flops = {speed.flops:.4g}",
            f"bandwidth = {speed.bandwidth:.4g}",
            f"overhead_seconds = {speed.overhead_seconds:.4g}",
        ]
    return "\n".join(lines) + "\n"


def _link(measured: Measured, link: LinkSpeed) -> list[str]:
    known = measured.message_seconds
    return [
        "",
        f"# Measured: transfers of {measured.nodes} devices in a ring, all at once, both ways.",
        "[link]",
        f"bytes_per_second = {link.bytes_per_second:.4g}",
        f"# a small message took {link.small_seconds:.4g} s, of which {known:.4g} s count as the link's own",
        f"latency_seconds = {max(1e-6, link.small_seconds - known):.4g}",
        "",
        "[messaging]  # measured: processor time at either end, times what the system takes away",
        f"message_seconds = {link.message_cpu_seconds:.4g}",
        f"byte_seconds = {link.byte_cpu_seconds:.4g}",
    ]
