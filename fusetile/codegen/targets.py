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
    that suits it; `zig` are the flags with which zig compiles C for it. With `lowering`, zig makes machine code of
    TVM's LLVM IR too, with these flags; without, TVM does."""

    name: str
    triple: str
    cpu: str
    width: int
    registers: int
    zig: tuple[str, ...]
    block: int
    features: tuple[str, ...] = ()
    lowering: tuple[str, ...] = ()

    @property
    def tvm(self) -> dict[str, Any]:
        """The target as TVM takes it."""
        target: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.cpu}
        return {**target, "mattr": list(self.features)} if self.features else target

    @property
    def ir_flags(self) -> tuple[str, ...]:
        """Flags for zig to compile TVM's LLVM IR; none if TVM does it."""
        return (*self.zig, *self.lowering) if self.lowering else ()


def _arm64(name: str) -> Target:
    """What all 64-bit Raspberry Pis have; what later ones have besides is of no use for 32-bit floats. A Cortex-A53
    stalls when a load is used at once. LLVM's model of it hardly knows that, nor do those of the CPUs that reorder
    instructions, which keep no register free either: with them the longest tiles need the stack. So code is scheduled
    for the A53's successor."""
    features = ("-lse", "-rdm", "-fullfp16", "-dotprod", "-rcpc")
    zig = ("-target", f"aarch64-linux-gnu.{GLIBC}")
    return Target(name, "aarch64-linux-gnu", "cortex-a55", 4, 32, zig, 8, features)


def _armv7() -> Target:
    """What all 32-bit Raspberry Pis since the second have. There is no fused multiply-add by element, but a vmla, which
    LLVM takes only if it may not fuse, as TVM always lets it; and its default order of instructions spills."""
    features = ("+neon", "+vfp4", "+hwdiv", "+hwdiv-arm")
    zig = ("-target", f"arm-linux-gnueabihf.{GLIBC}", "-mcpu=cortex_a7")
    lowering = ("-ffp-contract=off", "-mllvm", "-pre-RA-sched=source")
    return Target("armv7", "armv7a-linux-gnueabihf", "generic", 4, 16, zig, 8, features, lowering)


def _x86(name: str, cpu: str, width: int, registers: int, features: tuple[str, ...] = ()) -> Target:
    zig = ("-target", f"x86_64-linux-gnu.{GLIBC}")
    return Target(name, "x86_64-linux-gnu", cpu, width, registers, zig, width, features)


TARGETS = {
    target.name: target
    for target in (
        _arm64("pi3"),
        _arm64("pi4"),
        _arm64("pi5"),
        _arm64("arm64"),
        _armv7(),
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
