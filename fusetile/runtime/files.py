"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fusetile.errors import UserError


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `path`, bring it to the disk and give it its name; an error leaves nothing.

    Raises UserError, which names `path`, if the disk is full or the file can't be written.
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
            raise UserError(f"can't write {path}: {error.strerror or error}") from error
        raise
    directory = os.open(path.parent, os.O_RDONLY)  # the name must reach the disk as well
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def check_writable(*files: Path | None, folder: Path | None = None) -> None:
    """Find out before the work, not after it, whether files can be written, and into a folder. Raises UserError."""
    paths = [path for path in files if path is not None]
    for path in paths:
        if path.is_dir():
            raise UserError(f"can't write {path}: there is a folder of that name; name a file")
    for each in [path.parent for path in paths] + ([folder] if folder else []):
        if not os.access(each, os.W_OK | os.X_OK):
            raise UserError(f"can't write to the folder {each}" + ("" if each.exists() else ": there is none"))


def check_makeable(folder: Path) -> None:
    """Find out before the work whether a folder can be made, if it is not there, and written to. Raises UserError."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise UserError(f"-o {folder}: there is a file of the name {there}; choose a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"-o {folder}: can't write to the folder {there}")
