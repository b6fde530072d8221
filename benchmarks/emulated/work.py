"""One op on random data: its kernel calls for a target, and the arena that they run on. For any op and any CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fusetile.box import Box, whole
from fusetile.codegen.build import build_library
from fusetile.codegen.calls import Kernel, Lowered
from fusetile.codegen.job import Job
from fusetile.codegen.lower import lower
from fusetile.codegen.targets import Target, host
from fusetile.graph import Graph, Op
from fusetile.ops import Domain, domain_of, row
from fusetile.program import ALIGNMENT_bytes, Buffer, Call
from fusetile.runtime.native import Library
from fusetile.runtime.storage import make_arena, pack, unpack

Lower = Callable[[Job], Lowered]


@dataclass(frozen=True)
class Work:
    """The calls of one op, and the buffers they use, placed in an arena; `inputs` are the values to put there."""

    op: Op
    kernels: tuple[Kernel, ...]
    calls: tuple[Call, ...]
    buffers: Mapping[str, Buffer]
    inputs: Mapping[str, np.ndarray]

    @property
    def arena_bytes(self) -> int:
        return max(buffer.offset_bytes + buffer.size_bytes for buffer in self.buffers.values())

    def arena(self) -> np.ndarray:
        """An arena with the inputs in it."""
        arena = make_arena(self.arena_bytes)
        for name, value in self.inputs.items():
            pack(arena, self.buffers[name], whole(value.shape), value)
        return arena

    def results(self, arena: np.ndarray) -> list[np.ndarray]:
        """The outputs in an arena in which the calls have run."""
        outputs = [self.buffers[name] for name in self.op.outputs if name in self.buffers]
        return [unpack(arena, buffer, buffer.box) for buffer in outputs]


def work(
    kind: str,
    values: Sequence[np.ndarray],
    attrs: Mapping[str, Any],
    target: Target,
    *,
    filters: Sequence[int] = (),
    raw: Sequence[int] = (),
    with_lower: Lower = lower,
) -> Work:
    """An op on `values`, whole. Inputs `filters` are weights; maps `raw` are stored unblocked, as a network's input
    with few channels is. `with_lower` lowers it: what the compiler would choose, unless another function is given."""
    graph = Graph()
    names = [
        graph.add_tensor(f"x{i}", value.shape, str(value.dtype), "filter" if i in filters else "map")
        for i, value in enumerate(values)
    ]
    results = graph.add(kind, names, attrs=attrs)
    op = graph.producers()[results[0]]
    domain = domain_of(graph, op)
    inputs = [
        _buffer(graph, name, target.block, raw=i in raw, border=_border(domain, i)) for i, name in enumerate(names)
    ]
    shared = dict(row(kind).in_place)
    outputs = [
        inputs[shared[o]] if o in shared else _buffer(graph, name, target.block) for o, name in enumerate(results)
    ]
    lowered = with_lower(Job(op, domain, domain.box, inputs, outputs, target))
    placed: dict[str, Buffer] = {}
    offset = 0
    for buffer in {buffer.name: buffer for buffer in (*inputs, *outputs, *lowered.scratch)}.values():
        placed[buffer.name] = replace(buffer, offset_bytes=offset)
        offset += -(-buffer.size_bytes // ALIGNMENT_bytes) * ALIGNMENT_bytes
    offsets = {name: buffer.offset_bytes for name, buffer in placed.items()}
    calls = tuple(call.placed(offsets) for call in lowered.calls)
    kernels = tuple(call.kernel for call in lowered.calls)
    return Work(op, kernels, calls, placed, dict(zip(names, values, strict=True)))


def _border(domain: Domain, i: int) -> tuple[int, int]:
    """The zeros that an op reads around its input i."""
    reach: Box = domain.reach(domain.box, i)
    sizes = [dim.size for dim in domain.reads[i]]
    outside = [max(0, -low, high - size) for (low, high), size in zip(reach, sizes, strict=True)]
    return (outside[2], outside[3]) if len(outside) == 4 else (0, 0)


def _buffer(graph: Graph, name: str, block: int, *, raw: bool = False, border: tuple[int, int] = (0, 0)) -> Buffer:
    tensor = graph.tensors[name]
    box = whole(tensor.shape)
    if tensor.dtype == "int32" or not tensor.shape:
        return Buffer(name, box, tensor.dtype)
    if tensor.kind == "filter" and len(box) > 1:
        return Buffer(name, box, tensor.dtype, (block, min(tensor.shape[1], block)))
    return Buffer(name, box, tensor.dtype, (1, min(tensor.shape[1], block) if raw else block), border)


def run_here(works: Sequence[Work]) -> list[list[np.ndarray]]:
    """The outputs of works for this computer."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = build_library([kernel for one in works for kernel in one.kernels], host(), Path(folder))
        with Library(path, threads=1) as library:
            for one in works:
                arena = one.arena()
                library.segment(one.calls, arena)()
                found.append(one.results(arena))
    return found
