"""Native calls: the library, its arguments, parts of segments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fusetile.errors import PlanError, UserError
from fusetile.program import Call
from fusetile.runtime.native import Library
from fusetile.runtime.storage import make_arena
from tests.runtime import toy


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.build_library(tmp_path_factory.mktemp("native"))


def test_a_segment_runs_whole_or_in_parts(path: Path) -> None:
    arena = make_arena(256)
    numbers = arena.view(np.float32)
    numbers[:4] = [1, 2, 3, 4]
    calls = [Call("scale", 4, (0, 0), floats=(2.0,)), Call("scale", 3, (0, 64), floats=(0.5,)), Call("add", 4, (64, 0))]
    with Library(path, threads=1) as library:
        segment = library.segment(calls, arena)
        segment(0, 1)
        assert numbers[:4].tolist() == [2, 4, 6, 8] and not numbers[16:].any()
        segment(1, 1)
        segment(1)
        assert numbers[16:20].tolist() == [1, 2, 3, 0]
        assert numbers[:4].tolist() == [3, 6, 9, 8]
        numbers[:4] = [1, 2, 3, 4]
        segment()
        assert numbers[:4].tolist() == [3, 6, 9, 8]


def test_libraries_that_are_none(tmp_path: Path, path: Path) -> None:
    (tmp_path / "noise.so").write_bytes(b"\x7fELF noise")
    for name in ("noise.so", "missing.so"):
        with pytest.raises(UserError, match=f"can't load the kernels .*{name}"):
            Library(tmp_path / name, threads=1)
    with pytest.raises(UserError, match="can't start 5000 threads"):
        Library(path, threads=5000)


def test_calls_that_do_not_fit(path: Path) -> None:
    arena = make_arena(64)
    with Library(path, threads=1) as library:
        for call, error, message in [
            (Call("nothing", 1, ()), UserError, "has no kernel nothing"),
            (Call("add", 1, (0,) * 11), PlanError, "more arguments"),
            (Call("add", 1, (0,), (0,) * 41), PlanError, "more arguments"),
            (Call("add", 1, (64,)), PlanError, "outside the arena of 64 bytes"),
            (Call("add", 1, (0,), (1 << 31,)), PlanError, "beyond 32 bits"),
        ]:
            with pytest.raises(error, match=message):
                library.segment([call], arena)
        library.segment([Call("add", 0, (64, 64))], arena)()
