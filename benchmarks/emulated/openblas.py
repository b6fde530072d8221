"""OpenBLAS's matrix product on an emulated CPU: the one inside numpy, which chooses its kernel for the CPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.emulated.emulator import CPUS, QEMU, Profile, read_profile
from tests.arm.rootfs import ARM64, PYTHON, root_of

PRODUCT = """
import sys, numpy as np
m, k, n = map(int, sys.argv[1:4])
a, b = np.ones((m, k), np.float32), np.ones((k, n), np.float32)
a @ b
for line in open("/proc/self/maps"):
    if "openblas" in line and "r-xp" in line:
        print(line.split()[0])
"""


def profile_product(name: str, plugin: Path, folder: Path, m: int, k: int, n: int) -> Profile:
    """What runs in OpenBLAS for a product [m, k] x [k, n]; its start-up counts, but is short."""
    root, out = root_of(ARM64), folder / "openblas.profile"
    command = [QEMU, "-cpu", CPUS[name], "-E", "OPENBLAS_NUM_THREADS=1", "-plugin", f"{plugin},out={out}"]
    command += ["-L", str(root), str(root / "usr" / "bin" / PYTHON), "-c", PRODUCT, str(m), str(k), str(n)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    ranges = [tuple(int(end, 16) for end in part.split("-")) for part in said]
    every = [i for part in read_profile(out).functions.values() for i in part]
    inside = [i for i in every if any(low <= i.address < high for low, high in ranges)]
    return Profile({"openblas": sorted(inside, key=lambda i: i.address)}, {})
