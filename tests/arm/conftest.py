"""What emulated tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.emulated.emulator import available, compile_plugin


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin that counts. Skips where there is no emulator for it, unless all tests must run."""
    if not available() and not os.environ.get("FUSETILE_TEST_ALL"):
        pytest.skip("qemu-aarch64 is not installed (Debian: apt install qemu-user)")
    return compile_plugin(tmp_path_factory.mktemp("plugin"))
