"""Shards joined to whole parameters, in the model's orientation; weights put into the arena."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fusetile.box import Box, slices
from fusetile.errors import PlanError, UserError
from fusetile.runtime import safetensors
from fusetile.runtime.result import BEST, PARAMETERS, Piece, gather, load_weights, pieces_of, write_gradients
from fusetile.runtime.storage import make_arena
from tests.runtime import toy

WHOLE = np.arange(24, dtype=np.float32).reshape(4, 6)


def piece(box: Box, *, transposed: bool = False) -> Piece:
    return Piece(PARAMETERS, "w", (4, 6), transposed, box, WHOLE[slices(box)])


def test_pieces_are_joined() -> None:
    pieces = [piece(((0, 4), (4, 6))), piece(((0, 2), (0, 4))), piece(((2, 4), (0, 4)))]
    np.testing.assert_array_equal(gather(pieces, None)[PARAMETERS]["w"], WHOLE)


def test_a_transposed_parameter_is_turned_back() -> None:
    joined = gather([piece(((0, 4), (0, 6)), transposed=True)], None)[PARAMETERS]["w"]
    np.testing.assert_array_equal(joined, WHOLE.T)


def test_a_missing_part_is_a_fault_of_the_plan() -> None:
    with pytest.raises(PlanError, match=r"no device has \[2,4\)x\[0,4\) of 'w'"):
        gather([piece(((0, 4), (4, 6))), piece(((0, 2), (0, 4)))], None)


def test_of_the_best_weights_there_are_all_or_none() -> None:
    """A node may have lost its part of them; the result of the training is there nevertheless."""
    last = [piece(((0, 4), (0, 6))), replace(piece(((0, 4), (0, 6))), name="v")]
    best = [replace(part, group=BEST) for part in last]
    assert gather(last + best, None)[BEST].keys() == {"v", "w"}
    for lost in (best[:1], [best[0], replace(best[1], box=((0, 2), (0, 6)), values=WHOLE[:2])]):
        found = gather(last + lost, None)
        assert found[PARAMETERS].keys() == {"v", "w"} and not found[BEST]


def test_gradients_are_written_under_any_name(tmp_path: Path) -> None:
    names = ["file", "/conv/weight", "a.b:0"]
    write_gradients(tmp_path / "g.npz", {name: WHOLE.T.astype(np.float64) for name in names})
    with np.load(tmp_path / "g.npz") as archive:
        assert sorted(archive) == sorted(names)
        for name in names:
            assert archive[name].dtype == np.float32
            np.testing.assert_array_equal(archive[name], WHOLE.T)


def test_weights_go_into_the_arena_and_come_back(tmp_path: Path) -> None:
    made = toy.program(1, toy.free_addresses(2))
    arena = make_arena(made.arena_bytes)
    values = np.arange(6, dtype=np.float32)
    boxes = json.dumps({"w": [[6, 12]]})
    safetensors.save(tmp_path / "w", {"w": values}, {"boxes": boxes})
    load_weights(tmp_path / "w", made, arena)
    (back,) = pieces_of(made, arena, [])
    assert (back.name, back.shape, back.box) == ("weight", (12,), ((6, 12),))
    np.testing.assert_array_equal(back.values, values)


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        ({}, {"boxes": "{}"}, "has nothing for 'w'"),
        ({"w": np.zeros(6, np.float32)}, {"boxes": '{"w": [[0, 6]]}'}, r"has \[0,6\) of shape \(6,\) for 'w' \[6,12\)"),
        ({"w": np.zeros(5, np.float32)}, {"boxes": '{"w": [[6, 12]]}'}, r"of shape \(5,\)"),
        ({"w": np.zeros(6, np.float32)}, {}, "does not say which boxes"),
        ({"w": np.zeros(6, np.float32)}, {"boxes": "[1"}, "does not say which boxes"),
    ],
)
def test_weights_of_another_bundle_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str], message: str
) -> None:
    made = toy.program(1, toy.free_addresses(2))
    safetensors.save(tmp_path / "w", arrays, metadata)
    with pytest.raises(UserError, match=message):
        load_weights(tmp_path / "w", made, make_arena(made.arena_bytes))
