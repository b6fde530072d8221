"""The result of a run: shards of parameters and gradients are brought to the lowest rank and written as files.

Arrays travel in the graph's canonical shape; the files have the orientation of the ONNX model.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fusetile.box import Box, extents, slices, text, volume, whole
from fusetile.errors import PlanError, ProtocolError, UserError
from fusetile.plan import uncovered
from fusetile.program import Buffer, Gradient, Program, Shard
from fusetile.runtime import safetensors
from fusetile.runtime.checkpoint import Checkpoint
from fusetile.runtime.files import atomic_write
from fusetile.runtime.storage import pack, unpack
from fusetile.runtime.transport import Transport

PARAMETERS, GRADIENTS, BEST = "parameters", "gradients", "best"


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a parameter or of a gradient: `values` is its canonical array."""

    group: str
    name: str  # in the ONNX model
    shape: tuple[int, ...]
    transposed: bool
    box: Box
    values: np.ndarray


def load_weights(path: Path, program: Program, arena: np.ndarray) -> None:
    """Put the shards of a bundle's weights.safetensors into the arena, one after another. Raises UserError if the
    file does not fit."""
    arrays, metadata = safetensors.load(path)
    try:
        boxes = dict(json.loads(metadata["boxes"]))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} does not say which boxes it holds: copy the bundle again") from error
    for shard in program.shards:
        box = tuple(tuple(interval) for interval in boxes.get(shard.parameter, ()))
        array = arrays.pop(shard.parameter, None)  # the file's pages are let go as soon as they are copied
        if array is None or box != shard.box or array.shape != extents(shard.box):
            there = "nothing" if array is None else f"{text(box)} of shape {array.shape}"
            raise UserError(f"{path} has {there} for {shard.parameter!r} {text(shard.box)}: copy the bundle again")
        pack(arena, shard.buffer, shard.box, array)


def results(program: Program) -> list[Buffer]:
    """What of the arena is read by `pieces_of`."""
    return [shard.buffer for shard in _trained(program)]


def _trained(program: Program) -> list[Shard]:
    return [shard for shard in program.shards if shard.onnx_name and shard.updated]


def pieces_of(program: Program, arena: np.ndarray, gradients: Iterable[tuple[Gradient, np.ndarray]]) -> list[Piece]:
    """What this device has of the result. State of the optimizer and constants are no part of it."""
    parameters = [_piece(PARAMETERS, shard, unpack(arena, shard.buffer, shard.box)) for shard in _trained(program)]
    return parameters + [_piece(GRADIENTS, gradient, values) for gradient, values in gradients]


def best_pieces(program: Program, best: Checkpoint | None) -> list[Piece]:
    """What this device has of the best weights: in its checkpoint of that step, if there is one."""
    if best is None:
        return []
    return [_piece(BEST, shard, best.read(shard.parameter, shard.box)) for shard in _trained(program)]


def _piece(group: str, part: Shard | Gradient, values: np.ndarray) -> Piece:
    return Piece(group, part.onnx_name, part.shape, part.transposed, part.box, values)


def give(pieces: list[Piece], transport: Transport) -> None:
    """Send the pieces to the lowest rank, and wait until it has written them."""
    transport.give_shards([(_describe(piece), _bytes(piece.values)) for piece in pieces if piece.values.size])


def gather(pieces: list[Piece], transport: Transport | None) -> dict[str, dict[str, np.ndarray]]:
    """On the lowest rank: group -> ONNX name -> whole array in ONNX orientation. There are no best weights if a node's
    part of them is lost."""
    if transport is not None:
        pieces = pieces + [_from_description(*shard) for shard in transport.gather_shards()]
    groups = {group: _named(pieces, group) for group in (PARAMETERS, GRADIENTS, BEST)}
    best = groups[BEST]
    if best.keys() != groups[PARAMETERS].keys() or any(map(_missing, best.values())):
        groups[BEST] = {}
    return {group: {name: _join(name, parts) for name, parts in found.items()} for group, found in groups.items()}


def _describe(piece: Piece) -> dict[str, object]:
    return {
        "group": piece.group,
        "name": piece.name,
        "shape": piece.shape,
        "transposed": piece.transposed,
        "box": piece.box,
        "dtype": piece.values.dtype.name,
    }


def _bytes(values: np.ndarray) -> memoryview:
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


def _from_description(description: Mapping[str, Any], view: memoryview) -> Piece:
    match description:
        case {"group": str(group), "name": str(name), "shape": list(shape), "transposed": bool(transposed)}:
            pass
        case _:
            raise ProtocolError(f"a shard without a description: {description}")
    box = tuple((int(start), int(stop)) for start, stop in description["box"])
    dtype = np.dtype(str(description["dtype"])).newbyteorder("<")
    return Piece(group, name, tuple(shape), transposed, box, np.frombuffer(view, dtype).reshape(extents(box)))


def _named(pieces: Iterable[Piece], group: str) -> dict[str, list[Piece]]:
    named: dict[str, list[Piece]] = {}
    for piece in pieces:
        if piece.group == group:
            named.setdefault(piece.name, []).append(piece)
    return dict(sorted(named.items()))


def _missing(parts: Sequence[Piece]) -> list[Box]:
    everything = whole(parts[0].shape)
    return uncovered(everything, tuple(part.box for part in parts)) if volume(everything) else []


def _join(name: str, parts: Sequence[Piece]) -> np.ndarray:
    first = parts[0]
    if missing := _missing(parts):
        raise PlanError(f"no device has {text(missing[0])} of {name!r}")
    if len(parts) == 1:
        joined = first.values
    else:
        joined = np.empty(first.shape, first.values.dtype)
        for part in parts:
            joined[slices(part.box)] = part.values
    return joined.swapaxes(0, 1) if first.transposed else joined


def write_parameters(path: Path, arrays: Mapping[str, np.ndarray], program: Program, steps: int) -> None:
    """Write the weights after so many steps: trained.safetensors."""
    metadata = {"model_hash": program.model_hash, "plan_hash": program.plan_hash, "steps": str(steps)}
    safetensors.save(path, arrays, metadata)


def write_gradients(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the gradients as an .npz: float32, under the initializers' names (of which numpy.savez takes not all)."""

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.ascontiguousarray(array, np.float32), allow_pickle=False)

    atomic_write(path, write)
