"""Programs: addresses in blocked storage, and program.json."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fusetile.box import view4
from fusetile.program import (
    Buffer,
    Call,
    Feed,
    Gradient,
    Program,
    Recv,
    Run,
    Send,
    Shard,
    Wait,
    Zone,
    from_json,
    to_json,
)
from fusetile.rates import Rates

MAP = Buffer("y", ((1, 3), (8, 30), (2, 9), (0, 5)), "float32", (1, 8), (1, 2), 11, 4096)
FILTER = Buffer("w", ((8, 21), (0, 13), (0, 3), (0, 2)), "float32", (8, 8), offset_bytes=128)
VECTOR = Buffer("loss", ((0, 1),), "float32", offset_bytes=0)
INTEGERS = Buffer("target", ((0, 2),), "int32", offset_bytes=64)


def program() -> Program:
    calls = (Call("conv_k3", 7, (0, 64, 4096), (1, -2, 3), (0.1, -1e-30)), Call("zero", 1, (0,)))
    return Program(
        rank=1,
        nodes=3,
        name="kitchen",
        addresses=("10.0.0.1:7300", "10.0.0.2:7300", "[::1]:7300"),
        plan_hash="p" * 64,
        model_hash="m" * 64,
        library="kernels-abc.so",
        batch=4,
        seed=2**40 + 1,
        arena_bytes=1 << 33,
        steps=(Recv(0, 5, 64, 128), Run(calls), Send(2, 7, 192, 64, -3), Wait((5, 7)), Run(())),
        feeds=(Feed("target", "y", (4,), INTEGERS, 10), Feed("learning_rate", "", (1,), VECTOR)),
        shards=(Shard("fc.w", "fc.weight", (21, 13, 3, 2), True, ((8, 16), (0, 13), (0, 3), (0, 2)), FILTER),),
        gradients=(Gradient("fc.w", "fc.weight", (21, 13), False, ((0, 8), (0, 13)), FILTER, 1, 1),),
        loss=VECTOR,
        segment_seconds=0.25,
        rates=Rates(learning_rate=0.1),
        peers=(0, 2),
        zones=(Zone("y", 4096, 9216, (-1, 0), (2, 1)),),
    )


def test_json_round_trip() -> None:
    before = program()
    after = from_json(to_json(before))
    assert after == before
    assert hash(after.steps) == hash(before.steps)  # tuples all the way down
    assert to_json(after) == to_json(before)


def test_a_device_without_a_part_has_no_loss() -> None:
    from dataclasses import replace

    idle = replace(program(), loss=None, steps=(), feeds=(), shards=(), gradients=(), peers=())
    assert from_json(to_json(idle)) == idle


def test_one_step_per_line() -> None:
    lines = to_json(program()).splitlines()
    assert [next(iter(json.loads(line.rstrip(",")))) for line in lines[-7:-2]] == ["recv", "run", "send", "wait", "run"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda fields: fields | {"schema": 99}, "schema version 99"),
        (lambda fields: {key: value for key, value in fields.items() if key != "steps"}, "steps"),
        (lambda fields: fields | {"steps": [{"jump": {}}]}, "jump"),
        (lambda fields: fields | {"surprise": 1}, "surprise"),
    ],
)
def test_what_is_not_a_program_is_refused(change: Callable[[dict[str, Any]], dict[str, Any]], error: str) -> None:
    broken = json.dumps(change(json.loads(to_json(program()))))
    with pytest.raises((ValueError, KeyError, TypeError), match=error):
        from_json(broken)


@pytest.mark.parametrize("buffer", [MAP, FILTER, VECTOR, INTEGERS], ids=lambda buffer: buffer.name)
def test_storage_holds_every_element_at_a_place_of_its_own(buffer: Buffer) -> None:
    """`element` agrees with the storage shape's row-major order at every block start, border and pitch counted."""
    places = np.arange(buffer.size_bytes // np.dtype(buffer.dtype).itemsize).reshape(buffer.storage_shape)
    starts = [range(start, stop) for start, stop in view4(buffer.box)]
    (n0, _), (c0, _), (h0, _), (w0, _) = view4(buffer.box)
    b0, b1 = buffer.block
    for n, c, h, w in itertools.product(starts[0][::b0], starts[1][::b1], starts[2], starts[3]):
        box = ((n, n + 1), (c, c + 1), (h, h + 1), (w, w + 1))
        in_rank = {4: box, 1: (box[1],)}[len(buffer.box)] if buffer.box != INTEGERS.box else (box[1],)
        rows, columns = h - h0 + buffer.border[0], w - w0 + buffer.border[1]
        assert buffer.element(in_rank) == places[(n - n0) // b0, (c - c0) // b1, rows, columns, 0, 0]


def test_strides_follow_the_storage_shape() -> None:
    assert MAP.storage_shape == (2, 3, 9, 11, 8, 1)
    assert MAP.strides == (3 * 9 * 11 * 8, 9 * 11 * 8, 11 * 8, 8)
    assert FILTER.storage_shape == (2, 2, 3, 2, 8, 8)


def test_a_box_off_the_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="does not start at a block"):
        MAP.element(((1, 2), (12, 16), (2, 3), (0, 1)))
