"""zig, of the PyPI package ziglang: compiles and links C for any CPU and C library, on any computer."""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from pathlib import Path


def zig_cc(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `zig cc`: the program itself, as the package's own start with `python -m` takes longer than small work does.
    Raises FileNotFoundError if the package is not installed."""
    package = find_spec("ziglang")
    if package is None or package.origin is None:
        raise FileNotFoundError("the Python package ziglang is not installed")
    return subprocess.run(
        [str(Path(package.origin).with_name("zig")), "cc", *arguments], capture_output=True, text=True
    )
