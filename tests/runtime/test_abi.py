"""Kernels of another ABI or processor are refused in words."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from fusetile.errors import UserError
from fusetile.runtime import abi
from fusetile.runtime.native import Library
from tests.runtime import toy

ARM, AARCH64, X86 = (1, 40), (2, 183), (2, 62)


def head(path: Path, kind: tuple[int, int]) -> Path:
    """A file that begins as a library of this ELF class and machine does."""
    path.write_bytes(b"\x7fELF" + bytes([kind[0], 1, 1]) + bytes(9) + struct.pack("<HH", 3, kind[1]) + bytes(44))
    return path


def process(monkeypatch: pytest.MonkeyPatch, machine: str, pointer_bytes: int) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(abi, "_POINTER_bytes", pointer_bytes)


@pytest.mark.parametrize(
    ("machine", "pointer_bytes", "expected"),
    [
        ("armv7l", 4, abi.ARMV7),
        ("aarch64", 4, abi.ARMV7),  # a 32-bit system on a 64-bit kernel
        ("aarch64", 8, "64-bit ARM"),
        ("x86_64", 8, "x86-64"),
        ("x86_64", 4, "32-bit x86_64"),
    ],
)
def test_pointers_tell_the_abi(
    machine: str, pointer_bytes: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process(monkeypatch, machine, pointer_bytes)
    assert abi.own() == expected


@pytest.mark.parametrize(
    ("pointer_bytes", "kernels", "message"),
    [
        (4, AARCH64, "are for 64-bit ARM, and the Python .* is 32-bit ARM .armv7.: put abi = "),
        (8, ARM, "are for 32-bit ARM .armv7., and the Python .* is 64-bit ARM: take abi out"),
        (8, X86, "are for x86-64, and .* is 64-bit ARM: was it made for this device"),
    ],
)
def test_kernels_of_another_abi(
    pointer_bytes: int, kernels: tuple[int, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process(monkeypatch, "aarch64", pointer_bytes)
    with pytest.raises(UserError, match=message):
        Library(head(tmp_path / "kernels.so", kernels), threads=1)


@pytest.mark.parametrize(("capabilities", "runs"), [(0x1FB8D6, True), (1 << 12, False), (0, False)])
def test_processors_without_neon(
    capabilities: int, runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process(monkeypatch, "armv7l", 4)
    monkeypatch.setattr(abi, "_capabilities", lambda: capabilities)
    library = head(tmp_path / "kernels.so", ARM)
    if runs:
        abi.check_runs(library)
    else:
        with pytest.raises(UserError, match="NEON and VFPv4"):
            abi.check_runs(library)


def test_kernels_of_this_computer_are_its_own_if_they_are_whole(tmp_path: Path) -> None:
    """The loader maps a part of a file as well, and the process dies where that ends."""
    whole, cut = toy.build_library(tmp_path), tmp_path / "cut.so"
    abi.check_runs(whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(UserError, match=f"the kernels {cut} are cut off: copy the bundle again"):
        Library(cut, threads=1)
