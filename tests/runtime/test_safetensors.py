"""The safetensors format, against the reference implementation and against damage."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from fusetile.errors import UserError
from fusetile.runtime import safetensors
from fusetile.runtime.files import atomic_write

ARRAYS = {
    "/conv/weight": np.random.default_rng(0).random((4, 3, 2, 2), np.float32),
    "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "scalar": np.array(7, np.int32),
    "empty": np.zeros((0, 3), np.uint8),
    "half": np.ones(3, np.float16),
    "long": np.arange(3),
}


def test_round_trip(tmp_path: Path) -> None:
    safetensors.save(tmp_path / "a", ARRAYS, {"key": "value"})
    arrays, metadata = safetensors.load(tmp_path / "a")
    assert metadata == {"key": "value"} and list(arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array, strict=True)


def test_the_reference_implementation_reads_and_writes_the_same(tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.numpy")
    safetensors.save(tmp_path / "ours", ARRAYS, {"key": "value"})
    for name, array in reference.load_file(tmp_path / "ours").items():
        np.testing.assert_array_equal(array, ARRAYS[name])
    plain = {name: np.ascontiguousarray(array) for name, array in ARRAYS.items()}
    reference.save_file(plain, tmp_path / "theirs", {"key": "value"})
    arrays, metadata = safetensors.load(tmp_path / "theirs")
    assert metadata == {"key": "value"}
    for name, array in plain.items():
        np.testing.assert_array_equal(arrays[name], array)


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    safetensors.save(tmp_path / "whole", ARRAYS, {})
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:keep])
    with pytest.raises(UserError, match="cut is not a whole safetensors file"):
        safetensors.load(tmp_path / "cut")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(bytes(range(256)) * 4)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        safetensors.load(tmp_path / "noise")
    with pytest.raises(UserError, match="can't read"):
        safetensors.load(tmp_path / "missing")


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(target, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and target.read_bytes() == b"old"
