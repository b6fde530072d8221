"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from fusetile.errors import UserError
from fusetile.runtime.files import atomic_write


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_bytes(b"earlier")
    atomic_write(path, lambda file: file.writelines([b"new ", b"one"]))
    assert path.read_bytes() == b"new one" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_file_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_bytes(b"earlier")

    def fill(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=f"can't write {path}: No space left on device"):
        atomic_write(path, fill)
    assert path.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [path]
