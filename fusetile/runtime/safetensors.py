"""The safetensors file format, read and written by hand: devices have numpy and nothing more.

    8 bytes        length of the header, little-endian
    header         JSON: name -> {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}, and
                   "__metadata__": {text: text}; padded with spaces to a multiple of 8
    data           the arrays one after another, row-major, little-endian; offsets count from here

Source: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fusetile.errors import UserError
from fusetile.runtime.files import atomic_write

_NAMES = {"float32": "F32", "float64": "F64", "float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8"}
_DTYPES = {name: np.dtype(dtype).newbyteorder("<") for dtype, name in _NAMES.items()}
_HEADER_LIMIT_bytes = 100_000_000  # the format's own


def save(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write the arrays, in their order, atomically."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, array in arrays.items():
        end = begin + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array, _DTYPES[_NAMES[array.dtype.name]]).data)

    atomic_write(path, write)


def load(path: Path, *, remedy: str = "copy the bundle again") -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays (mapped from the file, read-only) and the metadata. Raises UserError, with the `remedy`, if it is not
    such a file."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _HEADER_LIMIT_bytes):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        return {name: _array(path, 8 + length, entry) for name, entry in header.items()}, metadata
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): {remedy}") from error


def _array(path: Path, data_start: int, entry: Any) -> np.ndarray:
    shape = tuple(int(size) for size in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    dtype = _DTYPES[entry["dtype"]]
    if int(np.prod(shape, dtype=np.int64)) * dtype.itemsize != end - begin:
        raise ValueError(f"shape {shape} does not fill {end - begin} bytes")
    if begin == end:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, mode="r", offset=data_start + begin, shape=shape)
