"""Targets: the CPUs that kernels are compiled for."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fusetile.errors import UserError

# The oldest C library that a device may have: Debian 10. Raspberry Pi OS bookworm has 2.36.
GLIBC = "2.28"


@dataclass(frozen=True, slots=True)
class Target:
    """One kind of CPU. `width` is the floats in a vector register, `registers` their number, `block` the channel block
    that suits it; `zig` is the triple for the linker."""

    name: str
    triple: str
    cpu: str
    width: int
    registers: int
    zig: str
    block: int
    features: tuple[str, ...] = ()

    @property
    def tvm(self) -> dict[str, Any]:
        """The target as TVM takes it."""
        target: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.cpu}
        return {**target, "mattr": list(self.features)} if self.features else target


def _arm64(name: str, cpu: str) -> Target:
    return Target(name, "aarch64-linux-gnu", cpu, 4, 32, f"aarch64-linux-gnu.{GLIBC}", 8)


def _x86(name: str, cpu: str, width: int, registers: int, features: tuple[str, ...] = ()) -> Target:
    return Target(name, "x86_64-linux-gnu", cpu, width, registers, f"x86_64-linux-gnu.{GLIBC}", width, features)


TARGETS = {
    target.name: target
    for target in (
        _arm64("pi3", "cortex-a53"),
        _arm64("pi4", "cortex-a72"),
        _arm64("pi5", "cortex-a76"),
        _arm64("arm64", "generic"),
        _x86("avx2", "x86-64-v3", 8, 16),
        # LLVM's x86-64-v4 avoids 512-bit registers unless it is told not to
        _x86("avx512", "x86-64-v4", 16, 32, ("-prefer-256-bit",)),
    )
}
_ARM_PARTS = {"0xd03": "pi3", "0xd08": "pi4", "0xd0b": "pi5"}
_AVX2 = {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


def target_named(name: str) -> Target:
    """A target by name, `host` being this computer; raises UserError if there is none."""
    if name == "host":
        return host()
    if name not in TARGETS:
        raise UserError(f"unknown device type {name!r}: choose one of host, {', '.join(TARGETS)}")
    return TARGETS[name]


@cache
def host() -> Target:
    """The target for this computer."""
    return detect(platform.machine(), Path("/proc/cpuinfo").read_text())


def detect(machine: str, cpuinfo: str) -> Target:
    """The target for a computer with this machine name and /proc/cpuinfo; raises UserError if there is none."""
    fields: dict[str, set[str]] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), set()).update(value.split())
    if machine == "x86_64":
        flags = fields.get("flags", set())
        for name, wanted in (("avx512", _AVX512), ("avx2", _AVX2)):
            if wanted <= flags:
                return TARGETS[name]
        raise UserError("this computer has no AVX2: fusetile's kernels need AVX2 with FMA or 64-bit ARM")
    if machine in ("aarch64", "arm64"):
        known = [_ARM_PARTS[part] for part in sorted(fields.get("CPU part", set())) if part in _ARM_PARTS]
        return TARGETS[known[0] if known else "arm64"]
    raise UserError(f"no kernels for machine type {machine!r}: fusetile needs x86-64 with AVX2 or 64-bit ARM")
