"""The executor on one device: the order of things, and gradients before they are overwritten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fusetile.errors import PlanError
from fusetile.program import Program, Recv, Send, Wait
from fusetile.runtime.executor import Executor, Snapshot
from fusetile.runtime.native import Library
from fusetile.runtime.storage import make_arena, pack, unpack
from fusetile.runtime.transport import Transport
from tests.runtime import toy


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Library]:
    with Library(toy.build_library(tmp_path_factory.mktemp("toy")), threads=1) as library:
        yield library


def test_a_step_and_its_gradients(library: Library) -> None:
    made = toy.program(0, ("h:1",))
    arena = make_arena(made.arena_bytes)
    executor = Executor(made, library=library, arena=arena, transport=None)
    x = np.arange(8 * toy.COLUMNS, dtype=np.float32).reshape(8, toy.COLUMNS)
    pack(arena, made.feeds[0].buffer, made.feeds[0].buffer.box, x)
    pack(arena, made.feeds[1].buffer, (), np.array(0.5))
    assert executor.run(1) == x.sum()
    snapshot: Snapshot = []
    assert executor.run(2, snapshot=snapshot) == x.sum()
    ((gradient, values),) = snapshot
    assert gradient.onnx_name == "weight"
    np.testing.assert_array_equal(values, x.sum(axis=0))
    weights = unpack(arena, made.shards[0].buffer, made.shards[0].box)
    np.testing.assert_array_equal(weights, -2 * 0.5 * x.sum(axis=0))


class Nothing(Transport):
    """No connection is needed to refuse a program."""

    def __init__(self) -> None:
        self.progress = 0


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((Wait((3,)), Send(1, 3, 0, 8)), r"waits for the transfers \[3\] before they are posted"),
        ((Send(1, 3, 0, 10_000),), "transfer 3 is outside the arena"),
        ((Recv(1, 3, 0, 0),), "outside the arena of .* bytes, or empty"),
    ],
)
def test_programs_that_would_hang_or_spoil_memory_are_refused(
    library: Library, steps: tuple[Send | Recv | Wait, ...], message: str
) -> None:
    made: Program = replace(toy.program(0, ("h:1", "h:2")), steps=steps)
    with pytest.raises(PlanError, match=message):
        Executor(made, library=library, arena=make_arena(made.arena_bytes), transport=Nothing())


def test_one_device_has_nobody_to_talk_to(library: Library, tmp_path: Path) -> None:
    made = replace(toy.program(0, ("h:1",)), steps=(Wait(()),))
    with pytest.raises(PlanError, match="a program for one device"):
        Executor(made, library=library, arena=make_arena(made.arena_bytes), transport=None)
