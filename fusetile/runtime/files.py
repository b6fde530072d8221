"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fusetile.errors import FusetileError


def atomic_write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a file beside `path`, bring it to the disk and give it its name; an error leaves nothing.

    Raises FusetileError, which names `path`, if the disk is full or the file can't be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise FusetileError(f"can't write {path}: {error.strerror or error}") from error
        raise
    directory = os.open(path.parent, os.O_RDONLY)  # the name must reach the disk as well
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
