"""Checkpoints: what a node has of everything that training changes, in a file of its own.

    FOLDER/step-00001200.rank-1-of-4.safetensors

holds node 1's shards after step 1200, canonical arrays under their names in the graph, and in the metadata (entry
`checkpoint`, JSON) the run, each array's box, whole shape, CRC-32, and its place in the ONNX model. A node keeps its
two newest. Files appear whole or not at all.

Any nodes can go on from the files of all nodes of one step: a shard is put together from whatever boxes cover it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from fusetile.box import Box, extents, intersect, shift, slices, text, volume, whole
from fusetile.errors import UserError
from fusetile.plan import uncovered
from fusetile.program import Program, Shard
from fusetile.runtime import safetensors
from fusetile.runtime.storage import pack, unpack

KEPT = 2
_REMEDY = "remove the files of that step, and an earlier one will be taken"
_NAME = re.compile(r"step-(\d+)\.rank-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a parameter in a checkpoint's file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    box: Box
    crc: int
    onnx_name: str
    transposed: bool
    values: np.ndarray

    def checked(self) -> np.ndarray:
        """The values. Raises UserError if they are not those that were written."""
        if crc32(np.ascontiguousarray(self.values).data) != self.crc:
            raise UserError(f"{self.path} is damaged ({self.name!r}): {_REMEDY}")
        return self.values


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The files of all nodes after one step; `run` is what a run that goes on must have in common with this one."""

    step: int
    run: Mapping[str, Any]
    parts: Mapping[str, tuple[Part, ...]]  # by parameter
    validation: Mapping[str, Any] | None
    files: tuple[Path, ...]
    absent: int  # nodes whose files are not there

    def covers(self, name: str, box: Box) -> bool:
        """Whether the files that are there have all of a parameter's box."""
        return not uncovered(box, tuple(part.box for part in self.parts.get(name, ())))

    def is_whole(self) -> bool:
        """Whether the files of all nodes are there: of what others have only they know."""
        return not self.absent

    @property
    def best_step(self) -> int:
        """The step of the best validation until then; 0 if there was none."""
        return int(self.validation["best_step"]) if self.validation else 0

    def check_run(self, run: Mapping[str, Any]) -> None:
        """Raises UserError if it is that of another run."""
        for key, value in run.items():
            was = self.run.get(key)
            if was != value:
                raise UserError(
                    f"the checkpoint of step {self.step} comes from a run with {key} = {was}; this run has {value}: "
                    "resume with the same model, data and options"
                )

    def read(self, name: str, box: Box) -> np.ndarray:
        """The canonical array of a parameter's box."""
        parts = [part for part in self.parts[name] if volume(intersect(part.box, box))]
        values = np.empty(extents(box), parts[0].values.dtype)
        for part in parts:
            common = intersect(part.box, box)
            values[slices(shift(common, box))] = part.checked()[slices(shift(common, part.box))]
        return values

    def trained(self) -> dict[str, np.ndarray]:
        """ONNX name -> array, in the orientation of the model. Raises UserError if a node's file is missing."""
        if not self.is_whole():
            raise UserError(f"step {self.step} is not complete: the files of all nodes must be in one folder")
        found = {}
        for name, parts in self.parts.items():
            if parts[0].onnx_name:
                values = self.read(name, whole(parts[0].shape))
                found[parts[0].onnx_name] = values.swapaxes(0, 1) if parts[0].transposed else values
        return found


def changing(program: Program) -> list[Shard]:
    """The shards that training changes: weights, statistics, state of the optimizer."""
    return [shard for shard in program.shards if shard.updated and shard.lasting]


def write(
    folder: Path,
    program: Program,
    arena: np.ndarray,
    *,
    step: int,
    run: Mapping[str, Any],
    validation: Mapping[str, Any] | None = None,
    beside: Collection[int] | None = None,
) -> Path:
    """Write this node's file, and remove all its others but the newest `KEPT`; or, if it is to be `beside` only certain
    steps, all of other steps, also those of other plans. `validation`: what the run's validations have shown."""
    arrays, described = {}, {}
    for shard in changing(program):
        values = unpack(arena, shard.buffer, shard.box)
        arrays[shard.parameter] = values
        described[shard.parameter] = {
            "box": shard.box,
            "shape": shard.shape,
            "crc": crc32(values.data),
            "onnx_name": shard.onnx_name,
            "transposed": shard.transposed,
        }
    path = folder / f"step-{step:08d}.rank-{program.rank}-of-{program.nodes}.safetensors"
    content = {"step": step, "model_hash": program.model_hash, "run": dict(run), "arrays": described}
    content["validation"] = validation
    safetensors.save(path, arrays, {"checkpoint": json.dumps(content)})
    others = [each for each in _files(folder) if each[3] != path]
    mine = [(at, file) for at, rank, nodes, file in others if (rank, nodes) == (program.rank, program.nodes)]
    if beside is None:
        removed = [file for _, file in mine[: len(mine) + 1 - KEPT]]
    else:
        foreign = [(at, file) for at, _, nodes, file in others if nodes != program.nodes]
        removed = [file for at, file in mine + foreign if at not in beside]
    for file in removed:
        file.unlink(missing_ok=True)  # other nodes of this run may do so, too
    return path


def checkpoints(folder: Path, *, step: int | None = None) -> list[Checkpoint]:
    """All steps of which there are files, or just one, the newest first; other files may go away meanwhile. Raises
    UserError for a file that is none."""
    groups: dict[tuple[int, int], list[Path]] = {}
    for found, _, nodes, path in _files(folder):
        if step in (None, found):
            groups.setdefault((found, nodes), []).append(path)
    ordered = sorted(groups.items(), reverse=True)
    return [_read_group(paths, absent=nodes - len(paths)) for (_, nodes), paths in ordered]


def check_new(folder: Path, *, resume: bool, every: int | None) -> None:
    """Raises UserError if checkpoints will be written among those of an earlier run, and it is not this one."""
    if every and not resume and checkpoints(folder):
        raise UserError(f"there are checkpoints of an earlier run in {folder}: give --resume, or remove them")


def usable(folder: Path, program: Program, *, step: int | None = None) -> dict[int, Checkpoint]:
    """By step, or of just one, what this node can go on from: the files here have all of its shards."""
    found: dict[int, Checkpoint] = {}
    for checkpoint in checkpoints(folder, step=step):
        if all(checkpoint.covers(shard.parameter, shard.box) for shard in changing(program)):
            found.setdefault(checkpoint.step, checkpoint)
    return found


def load(checkpoint: Checkpoint, program: Program, arena: np.ndarray, *, run: Mapping[str, Any]) -> None:
    """Put the shards into the arena. Raises UserError if the checkpoint is that of another run."""
    checkpoint.check_run({**run, "model": program.model_hash})
    for shard in changing(program):
        pack(arena, shard.buffer, shard.box, checkpoint.read(shard.parameter, shard.box))


def is_file(path: Path) -> bool:
    """Whether a file is that of a checkpoint, by its name."""
    return _NAME.fullmatch(path.name) is not None


def _files(folder: Path) -> list[tuple[int, int, int, Path]]:
    """(step, rank, nodes, path) of every checkpoint's file, the oldest first."""
    names = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(m[1]), int(m[2]), int(m[3]), path) for m, path in names if m)


def _read_group(paths: Sequence[Path], *, absent: int) -> Checkpoint:
    parts: dict[str, list[Part]] = {}
    step, run, validation = 0, {}, None
    for path in paths:
        arrays, metadata = safetensors.load(path, remedy=_REMEDY)
        try:
            content = json.loads(metadata["checkpoint"])
            step, run = int(content["step"]), content["run"] | {"model": content["model_hash"]}
            validation = content.get("validation")
            for name, entry in content["arrays"].items():
                box = tuple((int(start), int(stop)) for start, stop in entry["box"])
                shape, onnx_name = tuple(map(int, entry["shape"])), str(entry["onnx_name"])
                part = Part(
                    path, name, shape, box, int(entry["crc"]), onnx_name, bool(entry["transposed"]), arrays[name]
                )
                if arrays[name].shape != extents(box):
                    raise ValueError(f"{name!r} {text(box)} has shape {arrays[name].shape}")
                parts.setdefault(name, []).append(part)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no checkpoint ({error}): {_REMEDY}") from error
    return Checkpoint(
        step, run, {name: tuple(found) for name, found in parts.items()}, validation, tuple(paths), absent
    )
