"""Checkpoints: whole runs of toy nodes that stop and go on, on as many nodes or others; damage and mistakes."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusetile.errors import UserError
from fusetile.runtime import checkpoint
from fusetile.runtime.storage import make_arena, pack, unpack
from tests.runtime import toy
from tests.runtime.test_node import Start, expected, library, start

__all__ = ["library", "start"]  # fixtures
RUN = {"samples": 40, "batch": 8}


def written(folder: Path, nodes: int, step: int, *, beside: Collection[int] | None = None) -> np.ndarray:
    """All nodes write; returns the whole weight."""
    w = np.random.default_rng(step).standard_normal(toy.COLUMNS).astype(np.float32)
    for rank in range(nodes):
        program = toy.program(rank, ("h:1",) * nodes)
        arena, (shard,) = make_arena(program.arena_bytes), program.shards
        pack(arena, shard.buffer, shard.box, w[slice(*shard.box[0])])
        checkpoint.write(folder, program, arena, step=step, run=RUN, beside=beside)
    return w


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 3), (4, 2), (3, 1)])
def test_any_number_of_nodes_reads_it(tmp_path: Path, before: int, after: int) -> None:
    w = written(tmp_path, before, 12)
    for rank in range(after):
        program = toy.program(rank, ("h:1",) * after)
        arena, (shard,) = make_arena(program.arena_bytes), program.shards
        found = checkpoint.usable(tmp_path, program)
        assert list(found) == [12]
        checkpoint.load(found[12], program, arena, run=RUN)
        np.testing.assert_array_equal(unpack(arena, shard.buffer, shard.box), w[slice(*shard.box[0])])
    np.testing.assert_array_equal(checkpoint.checkpoints(tmp_path)[0].trained()["weight"], w)


def test_the_two_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        written(tmp_path, 2, step)
    assert [found.step for found in checkpoint.checkpoints(tmp_path)] == [100, 15]
    (tmp_path / "step-00000100.rank-1-of-2.safetensors").unlink()
    lost = toy.program(1, ("h:1",) * 2)
    assert list(checkpoint.usable(tmp_path, lost)) == [15]
    assert list(checkpoint.usable(tmp_path, toy.program(0, ("h:1",) * 2))) == [100, 15]
    with pytest.raises(UserError, match="not complete"):
        checkpoint.checkpoints(tmp_path)[0].trained()


def test_the_best_of_another_run_goes(tmp_path: Path) -> None:
    """Whatever its step, and however many nodes it had."""
    for nodes, step in ((3, 4), (3, 2), (2, 9), (2, 2)):
        w = written(tmp_path, nodes, step, beside=())
        assert len(list(tmp_path.iterdir())) == nodes
    np.testing.assert_array_equal(checkpoint.usable(tmp_path, toy.program(0, ("h:1",)))[2].trained()["weight"], w)


def test_the_best_that_a_checkpoint_knows_stays(tmp_path: Path) -> None:
    """A run may have to go on from there, on other nodes."""
    for nodes, step in ((3, 4), (2, 6), (2, 9)):
        written(tmp_path, nodes, step, beside=[4])
    assert [found.step for found in checkpoint.checkpoints(tmp_path) if found.is_whole()] == [9, 4]


def test_what_other_nodes_have_only_they_know(tmp_path: Path) -> None:
    """This node's file has all of the one parameter that it names; the other's may name more."""
    written(tmp_path, 1, 5)
    (tmp_path / "step-00000005.rank-0-of-1.safetensors").rename(tmp_path / "step-00000005.rank-0-of-2.safetensors")
    with pytest.raises(UserError, match="step 5 is not complete"):
        checkpoint.checkpoints(tmp_path)[0].trained()


def test_of_one_step_only_its_own_files_are_read(tmp_path: Path) -> None:
    """Others may be about to be removed by the nodes that they belong to."""
    for step in (5, 10):
        written(tmp_path, 2, step)
    gone = tmp_path / "step-00000005.rank-1-of-2.safetensors"
    gone.unlink()
    gone.symlink_to("nowhere")
    program = toy.program(0, ("h:1",) * 2)
    assert list(checkpoint.usable(tmp_path, program, step=10)) == [10]
    with pytest.raises(UserError, match="can't read"):
        checkpoint.usable(tmp_path, program)


def test_damage_and_other_runs_are_told(tmp_path: Path) -> None:
    written(tmp_path, 1, 3)
    program = toy.program(0, ("h:1",))
    arena = make_arena(program.arena_bytes)
    with pytest.raises(UserError, match="samples = 40; this run has 41"):
        checkpoint.load(checkpoint.usable(tmp_path, program)[3], program, arena, run=RUN | {"samples": 41})
    other = replace(program, model_hash="other")
    with pytest.raises(UserError, match="model = model-1"):
        checkpoint.load(checkpoint.usable(tmp_path, program)[3], other, arena, run=RUN)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged .*: remove the files of that step, and an earlier one"):
        checkpoint.load(checkpoint.usable(tmp_path, program)[3], program, arena, run=RUN)
    path.write_bytes(content[:100])
    with pytest.raises(UserError, match=r"not a whole safetensors file .*: remove the files of that step"):
        checkpoint.usable(tmp_path, program)


def steps(folder: Path) -> list[tuple[int, float]]:
    records: list[dict[str, Any]] = [json.loads(line) for line in (folder / "0.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records]


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(start: Start, tmp_path: Path, nodes: int) -> None:
    losses, _, w = expected(9)
    folder = tmp_path / "saved"
    saving = ("--checkpoints", str(folder), "--checkpoint-every", "2")
    assert start(2, "--steps", "5", *saving).finish() == [(0, "")] * 2
    assert {int(path.name[5:13]) for path in folder.iterdir()} == {4, 5}
    for bundle in (tmp_path / "a", tmp_path / "b"):
        bundle.rename(bundle.with_name(f"first {bundle.name}"))
    (folder / "step-00000005.rank-1-of-2.safetensors").unlink()  # one node had not finished writing
    assert start(nodes, "--steps", "9", "--resume", *saving).finish() == [(0, "")] * nodes
    assert steps(tmp_path) == [(step, losses[step - 1]) for step in range(5, 10)]
    np.testing.assert_array_equal(checkpoint.checkpoints(folder)[0].trained()["weight"], w)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resume", "--steps", "9"), "no step's files"),
        (("--checkpoint-every", "2", "--steps", "9"), "give --resume, or remove"),
        (("--resume", "--steps", "3"), "the run has 3 steps"),
    ],
)
def test_runs_that_can_not_start(start: Start, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    if "no step" not in message:
        written(folder, 1, 4)
    ((status, said),) = start(1, "--checkpoints", str(folder), *options).finish()
    assert status == 2 and message in said
