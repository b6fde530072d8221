"""Runs kernel calls in this process, and checks lowered ops against the numpy references of their rows."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fusetile.box import Box, extents, grow, shift, view4, volume
from fusetile.codegen.build import build_library
from fusetile.codegen.calls import Kernel, KernelCall
from fusetile.codegen.job import Job
from fusetile.codegen.lower import lower
from fusetile.codegen.targets import Target, target_named
from fusetile.graph import Graph, Op
from fusetile.ops import Domain, domain_of, overwritten, row
from fusetile.program import Buffer
from fusetile.reference import run_op
from fusetile.runtime.storage import make_arena, pack, unpack
from tests.codegen import emulator

GUARD_bytes = 192
BLOCK = 8
TARGET = target_named(emulator.TARGET)


def place(buffers: Sequence[Buffer]) -> tuple[list[Buffer], np.ndarray]:
    """The buffers at offsets in an arena that is all NaN, with guard bytes between them. Each buffer's border is
    zero, and so are the pad lanes of what it holds."""
    placed, offset = [], GUARD_bytes
    for buffer in buffers:
        placed.append(replace(buffer, offset_bytes=offset))
        offset += -(-buffer.size_bytes // 64) * 64 + GUARD_bytes
    arena = make_arena(offset)
    arena[:] = 0xFF
    for buffer in placed:
        garbage = np.frombuffer(b"\xff" * np.dtype(buffer.dtype).itemsize, buffer.dtype)
        stored(arena, buffer)[...] = 0
        pack(arena, buffer, buffer.box, np.broadcast_to(garbage, extents(buffer.box)))
    return placed, arena


def stored(arena: np.ndarray, buffer: Buffer) -> np.ndarray:
    """The buffer's storage as an array of `storage_shape`."""
    return arena[buffer.offset_bytes :][: buffer.size_bytes].view(buffer.dtype).reshape(buffer.storage_shape)


def inside(arena: np.ndarray, buffer: Buffer, box: Box) -> np.ndarray:
    """The blocks that hold `box`, with their pad lanes: a view [d0/b0, d1/b1, d2, d3, b1, b0]."""
    d0, d1, d2, d3 = shift(view4(box), view4(buffer.box))
    (b0, b1), (down, across) = buffer.block, buffer.border
    return stored(arena, buffer)[
        d0[0] // b0 : -(-d0[1] // b0),
        d1[0] // b1 : -(-d1[1] // b1),
        d2[0] + down : d2[1] + down,
        d3[0] + across : d3[1] + across,
    ]


def run_calls(
    calls: Sequence[KernelCall],
    buffers: Sequence[Buffer],
    arena: np.ndarray,
    *,
    threads: int = 1,
    target: Target | None = None,
) -> None:
    """Build the kernels, for this computer unless told otherwise, and run the calls on the arena."""
    offsets = {buffer.name: buffer.offset_bytes for buffer in buffers}
    plain = [call.placed(offsets) for call in calls]
    with tempfile.TemporaryDirectory() as directory:
        path = build_library([call.kernel for call in calls], target or TARGET, Path(directory))
        emulator.run(path, plain, arena, threads)


def buffer_for(
    name: str,
    tensor: Any,
    box: Box,
    *,
    block: int = BLOCK,
    margin: int = 0,
    border: tuple[int, int] = (0, 0),
    pitch: int = 0,
) -> Buffer:
    """The buffer that a plan gives a tensor, around `box`: up to `margin` more rows and columns, and whole blocks of
    channels more; `pitch` unused pixels per row."""
    shape = tensor.shape
    if volume(box) == 0:
        box = tuple((0, 1) for _ in shape)
    for axis in range(len(shape)):
        step = block if axis == 1 or (axis == 0 and (tensor.kind == "filter" or len(shape) == 1)) else 1
        low, high = (axis_box := grow(box, axis, margin * step, shape[axis]))[axis]
        box = (*axis_box[:axis], (low - low % step, high), *axis_box[axis + 1 :])
    if tensor.dtype == "int32":
        return Buffer(name, box, tensor.dtype)
    if tensor.kind == "filter":
        lanes = (block, min(shape[1], block)) if len(shape) >= 2 else (1, block)
        return Buffer(name, box, tensor.dtype, lanes)
    lanes = (1, block)
    columns = view4(box)[3]
    wide = columns[1] - columns[0] + 2 * border[1] + pitch if len(shape) == 4 else 0
    return Buffer(name, box, tensor.dtype, lanes, border if len(shape) == 4 else (0, 0), wide)


class Case:
    """One op of a graph of its own, with random or given inputs."""

    def __init__(
        self, kind: str, inputs: Sequence[np.ndarray], attrs: Mapping[str, Any], filters: Sequence[int] = ()
    ) -> None:
        self.graph = Graph()
        names = []
        for i, value in enumerate(inputs):
            label = "filter" if i in filters else "map"
            names.append(self.graph.add_tensor(f"x{i}", value.shape, str(value.dtype), label))
        outputs = self.graph.add(kind, names, attrs=attrs)
        self.inputs = [np.asarray(value) for value in inputs]
        self.op: Op = next(op for op in self.graph.ops.values() if op.outputs == outputs)
        self.domain: Domain = domain_of(self.graph, self.op)

    def expected(self, box: Box) -> list[np.ndarray]:
        """The reference's outputs for a box of iterations."""
        needed = []
        for i, value in enumerate(self.inputs):
            need = self.domain.need(box, i)
            needed.append(value[tuple(slice(*interval) for interval in need)])
        return run_op(self.graph, self.op, self.domain, box, needed)

    def check(
        self,
        box: Box | None = None,
        *,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        threads: Sequence[int] = (1, 2),
        block: int = BLOCK,
        raw: Sequence[int] = (),
        lean: bool = False,
        **layout: Any,
    ) -> list[np.ndarray]:
        """Lower the op for a box of iterations, run it, and compare with the reference: values in the box, zero in pad
        lanes, nothing else touched, the same bits for every number of threads. Inputs `raw` are stored unblocked, as
        graph inputs with few channels are. Returns the outputs."""
        box = self.domain.box if box is None else box
        tensors = self.graph.tensors
        inputs = []
        for i, name in enumerate(self.op.inputs):
            buffer = buffer_for(name, tensors[name], self.domain.need(box, i), block=block, **layout)
            inputs.append(replace(buffer, block=(1, tensors[name].shape[1])) if i in raw else buffer)
        shared = dict(row(self.op.kind).in_place)
        outputs = [
            inputs[shared[o]]
            if o in shared
            else buffer_for(name, tensors[name], self.domain.output(box, o), block=block, **layout)
            for o, name in enumerate(self.op.outputs)
        ]
        lowered = lower(Job(self.op, self.domain, box, inputs, outputs, TARGET, lean=lean))
        distinct = {buffer.name: buffer for buffer in (*inputs, *outputs, *lowered.scratch)}
        placed, before = self._prepared(list(distinct.values()), inputs, box)
        at = {buffer.name: buffer for buffer in placed}
        results = []
        for count in threads:
            arena = make_arena(before.size)
            arena[:] = before
            run_calls(lowered.calls, placed, arena, threads=count)
            for buffer in lowered.scratch:  # who used which part of it depends on the threads
                stored(arena, at[buffer.name])[...] = 0
            results.append(arena)
        after = results[0]
        for other in results[1:]:
            assert np.array_equal(after, other), "the number of threads changes bits"
        values = []
        for o, expected in enumerate(self.expected(box)):
            buffer, written = at[outputs[o].name], self.domain.output(box, o)
            values.append(unpack(after, buffer, written))
            np.testing.assert_allclose(
                values[-1], expected, rtol=rtol, atol=atol, err_msg=f"output {o} of {self.op.kind}"
            )
            inside(before, buffer, written)[...] = 0
            pack(before, buffer, written, values[-1])
        for buffer in lowered.scratch:
            here = slice(at[buffer.name].offset_bytes, at[buffer.name].offset_bytes + buffer.size_bytes)
            before[here] = after[here]
        for buffer in placed:
            assert np.array_equal(stored(before, buffer).view(np.uint8), stored(after, buffer).view(np.uint8)), (
                f"{self.op.kind} changes more of {buffer.name} than the box, or leaves its pad lanes"
            )
        assert np.array_equal(before, after), f"{self.op.kind} writes outside its buffers"
        for name in overwritten(self.graph, self.op):
            self._check_in_place(inputs, inputs[self.op.inputs.index(name)], values[0], box)
        return values

    def _prepared(
        self, buffers: Sequence[Buffer], inputs: Sequence[Buffer], box: Box
    ) -> tuple[list[Buffer], np.ndarray]:
        """The buffers in an arena, with what iterations `box` need of the inputs."""
        placed, arena = place(buffers)
        at = {buffer.name: buffer for buffer in placed}
        for i, buffer in enumerate(inputs):
            need = self.domain.need(box, i)
            if volume(need):
                if len(need) > 1:  # a slice may start within a block
                    origin, lanes = buffer.box[1][0], buffer.block[1]
                    start = origin + (need[1][0] - origin) // lanes * lanes
                    need = (need[0], (start, need[1][1]), *need[2:])
                pack(arena, at[buffer.name], need, self.inputs[i][tuple(slice(*interval) for interval in need)])
        return placed, arena

    def _check_in_place(self, inputs: Sequence[Buffer], place_of: Buffer, expected: np.ndarray, box: Box) -> None:
        """The output in the place of an input: the same bits."""
        lowered = lower(Job(self.op, self.domain, box, inputs, [place_of], TARGET))
        distinct = {buffer.name: buffer for buffer in (*inputs, *lowered.scratch)}
        placed, arena = self._prepared(list(distinct.values()), inputs, box)
        run_calls(lowered.calls, placed, arena, threads=2)
        (buffer,) = (buffer for buffer in placed if buffer.name == place_of.name)
        found = unpack(arena, buffer, self.domain.output(box))
        assert np.array_equal(found, expected, equal_nan=True), f"{self.op.kind} can't overwrite {place_of.name}"


def kernels_of(case: Case, target: Target) -> list[Kernel]:
    """The kernels of all iterations of an op."""
    box, tensors = case.domain.box, case.graph.tensors
    sources = [buffer_for(name, tensors[name], case.domain.need(box, i)) for i, name in enumerate(case.op.inputs)]
    results = [buffer_for(name, tensors[name], case.domain.output(box, o)) for o, name in enumerate(case.op.outputs)]
    written_over = {o: sources[i] for o, i in row(case.op.kind).in_place if o < len(results)}
    results = [written_over.get(o, result) for o, result in enumerate(results)]
    return [call.kernel for call in lower(Job(case.op, case.domain, box, sources, results, target)).calls]


def middle(box: Box, domain: Domain, *, channels: int = 0) -> Box:
    """A part of an iteration box: the middle of rows and columns, and all but the first `channels` channels."""
    part = []
    for axis, (start, stop) in zip(domain.axes, box, strict=True):
        if axis.name in "hw" and stop - start > 3:
            part.append((start + 1, stop - 2))
        elif axis.name == "k" and channels:
            part.append((start + channels, stop))
        else:
            part.append((start, stop))
    return tuple(part)


def seeded(seed: int = 0) -> np.random.Generator:
    """The random numbers of a test."""
    return np.random.default_rng(seed)
