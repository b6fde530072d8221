"""What a device can run: kernels are refused here, in words, where the loader or the processor would refuse them.

A 32-bit system often runs a 64-bit kernel, whose name says nothing: what counts is the size of this Python's pointers.
"""

from __future__ import annotations

import ctypes
import platform
import struct
from pathlib import Path

from fusetile.errors import UserError

ARMV7 = "32-bit ARM (armv7)"
_KERNELS = {(1, 40): ARMV7, (2, 183): "64-bit ARM", (2, 62): "x86-64"}  # by ELF class and machine, see elf(5)
_HEADER_bytes = 64
_SECTIONS = {1: ("<I", 32, 46), 2: ("<Q", 40, 58)}
"""By ELF class: type and place of the offset of the section headers, which come last; place of their size and count."""
_POINTER_bytes = struct.calcsize("P")
_ADVICE = {
    True: 'put abi = "armv7" into its entry of cluster.toml and compile again, or give it a 64-bit system',
    False: "take abi out of its entry of cluster.toml and compile again",
}
_AT_HWCAP, _NEON, _VFPV4 = 16, 1 << 12, 1 << 16  # getauxval(3), asm/hwcap.h of 32-bit ARM


def own() -> str:
    """The ABI of this process."""
    machine = platform.machine()
    if machine.startswith(("arm", "aarch64")):
        return ARMV7 if _POINTER_bytes == 4 else "64-bit ARM"
    return machine.replace("_", "-") if _POINTER_bytes == 8 else f"32-bit {machine}"


def check_runs(library: Path) -> None:
    """Raise UserError if kernels are for another ABI, or for a processor with more than this one has, or are cut off,
    which the loader does not notice; what is no library is left to the loader."""
    with open(library, "rb") as file:
        head = file.read(_HEADER_bytes)
    kernels = _KERNELS.get((head[4], int.from_bytes(head[18:20], "little"))) if len(head) == _HEADER_bytes else None
    if kernels is None:
        return
    if kernels != own():
        advice = _ADVICE[own() == ARMV7] if "ARM" in kernels and "ARM" in own() else "was it made for this device?"
        raise UserError(f"the kernels {library} are for {kernels}, and the Python of this device is {own()}: {advice}")
    if kernels == ARMV7 and ~_capabilities() & (_NEON | _VFPV4):
        raise UserError(
            f"the kernels {library} need a processor with NEON and VFPv4, which this device lacks: "
            "any Raspberry Pi from the 2 on has them"
        )
    kind, table, sizes = _SECTIONS[head[4]]
    (start,), (size, count) = struct.unpack_from(kind, head, table), struct.unpack_from("<HH", head, sizes)
    if library.stat().st_size < start + size * count:
        raise UserError(f"the kernels {library} are cut off: copy the bundle again")


def _capabilities() -> int:
    found: int = ctypes.CDLL(None).getauxval(_AT_HWCAP)
    return found
