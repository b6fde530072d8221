"""Boxes of all candidates as arrays: where ops compute, what they read, where tensors are.

Shapes: [candidates, devices, dimensions, 2], the last axis start and stop; an empty box is all zeros.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from fusetile.box import Box, empty, volume
from fusetile.graph import FORWARD, UPDATE, Graph, Op
from fusetile.ops import Domain, domain_of, row
from fusetile.passes.communicate import aligned
from fusetile.passes.place import parameter_needs, shards_of
from fusetile.passes.tile import tile
from fusetile.plan import Placement
from fusetile.planner.candidates import Candidate
from fusetile.planner.units import Unit

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Placed:
    """An op under every candidate of its unit: what it reads, and its cost, both [candidates, devices]."""

    op: Op
    unit: int
    placements: tuple[Placement, ...]
    flops: Array
    traffic_bytes: Array


@dataclass(frozen=True, slots=True)
class Home:
    """A tensor's layout under every candidate of its unit; `partial[candidate]`: its true value is the sum. `size`:
    bytes of an element; `forward`: it is a value of the forward pass; `persists`: it is a parameter's."""

    unit: int
    have: Array
    own: Array
    partial: Array
    size: int
    forward: bool
    persists: bool


@dataclass(frozen=True, slots=True)
class _Traced:
    """What ops of one signature have in common; `outputs`: (have, own)."""

    flops: Array
    traffic_bytes: Array
    needs: tuple[Array, ...]
    partial: Array
    outputs: tuple[tuple[Array, Array], ...]


class Geometry:
    """`ops` by name, `homes` by tensor."""

    def __init__(self, graph: Graph, block: int) -> None:
        self.ops: dict[str, Placed] = {}
        self.homes: dict[str, Home] = {}
        self._graph, self._block = graph, block
        self._needs: dict[tuple[str, int], Array] = {}
        self._traced: dict[Hashable, _Traced] = {}

    def add(self, op: Op, unit: int, placements: tuple[Placement, ...]) -> None:
        """Place an op; its outputs get their homes."""
        key = (self.signature(op), placements)
        if key not in self._traced:
            self._traced[key] = self._trace(op, placements)
        traced = self._traced[key]
        self.ops[op.name] = Placed(op, unit, placements, traced.flops, traced.traffic_bytes)
        for i, need in enumerate(traced.needs):
            self._needs[op.name, i] = need
        for name, (have, own) in zip(op.outputs, traced.outputs, strict=True):
            size = np.dtype(self._graph.tensors[name].dtype).itemsize
            self.homes[name] = Home(unit, have, own, traced.partial, size, op.phase == FORWARD, op.phase == UPDATE)

    def signature(self, op: Op) -> Hashable:
        """Equal for ops whose boxes and costs are equal."""
        tensors = [self._graph.tensors[name] for name in (*op.inputs, *op.outputs)]
        shapes = tuple((tensor.shape, tensor.dtype, tensor.kind) for tensor in tensors)
        return (op.kind, repr(sorted(op.attrs.items())), shapes)

    def _trace(self, op: Op, placements: tuple[Placement, ...]) -> _Traced:
        graph, domain = self._graph, domain_of(self._graph, op)
        inputs = [graph.tensors[name] for name in op.inputs]
        boxes = [placement.compute for placement in placements]
        work = volumes(_array(boxes)) * row(op.kind).flops(op.attrs, inputs)
        traffic = np.zeros(work.shape)
        needs = []
        for i, tensor in enumerate(inputs):
            exact: dict[Box, Box] = {}
            read = _mapped(boxes, lambda box, i=i: domain.need(box, i), exact)
            traffic += np.dtype(tensor.dtype).itemsize * volumes(read)
            whole_blocks = {box: aligned(need, tensor, self._block) for box, need in exact.items()}
            needs.append(_mapped(boxes, whole_blocks.__getitem__, {}))
        partial = np.array([_is_partial(domain, placement) for placement in placements])
        outputs = []
        for i, name in enumerate(op.outputs):
            made = _mapped(boxes, lambda box, i=i: domain.output(box, i), {})
            own = _mapped([placement.own for placement in placements], lambda box, i=i: domain.output(box, i), {})
            traffic += np.dtype(graph.tensors[name].dtype).itemsize * volumes(made)
            outputs.append((np.where(partial[:, None, None, None], own, made), own))
        return _Traced(work, traffic, tuple(needs), partial, tuple(outputs))

    def need(self, name: str, readers: Sequence[str]) -> Array:
        """What ops of one unit read of a tensor: the hull."""
        arrays = [
            self._needs[reader, i]
            for reader in readers
            for i, read in enumerate(self._graph.ops[reader].inputs)
            if read == name
        ]
        result = arrays[0]
        for other in arrays[1:]:
            result = _hull(result, other)
        return result


def placed_units(
    graph: Graph,
    units: Sequence[Unit],
    candidates: Sequence[Sequence[Candidate]],
    *,
    speeds: Sequence[float],
    block: int,
) -> Geometry:
    """All ops under all candidates of their units; an update belongs to the unit that reads its parameter."""
    geometry = Geometry(graph, block)
    tiled: dict[Hashable, Placement] = {}
    for number, (unit, choices) in enumerate(zip(units, candidates, strict=True)):
        for op in unit.ops:
            domain = domain_of(graph, op)
            splits = [choice.head if op.layer == unit.head.name else choice.followers for choice in choices]
            signature = geometry.signature(op)
            for split in splits:
                if (signature, split) not in tiled:
                    tiled[signature, split] = tile(domain, split=split, speeds=speeds, block=block)
            geometry.add(op, number, tuple(tiled[signature, split] for split in splits))
    readers = graph.consumers()
    for op in graph.ops.values():
        if op.phase == UPDATE and row(op.kind).in_place:  # clipping costs little beside the updates
            _, position = row(op.kind).in_place[0]
            reading = [reader for reader in readers[op.inputs[position]] if reader.phase != UPDATE]
            number = geometry.ops[reading[0].name].unit if reading else _unit_of_inputs(geometry, op)
            placements = _updates(graph, op, geometry, number, reading, len(candidates[number]), speeds, block)
            geometry.add(op, number, placements)
            for parameter, new in graph.next_value.items():
                if new in op.outputs:
                    geometry.homes[parameter] = geometry.homes.pop(new)
    return geometry


def _unit_of_inputs(geometry: Geometry, op: Op) -> int:
    return next(geometry.homes[name].unit for name in op.inputs if name in geometry.homes)


def _updates(
    graph: Graph,
    op: Op,
    geometry: Geometry,
    unit: int,
    reading: Sequence[Op],
    candidates: int,
    speeds: Sequence[float],
    block: int,
) -> tuple[Placement, ...]:
    _, position = row(op.kind).in_place[0]
    parameter, axes = op.inputs[position], len(domain_of(graph, op).axes)
    mine = [reader for reader in reading if geometry.ops[reader.name].unit == unit]
    placements = []
    for index in range(candidates):
        reads = [(reader, geometry.ops[reader.name].placements[index]) for reader in mine]
        needs = parameter_needs(graph, parameter, reads, nodes=len(speeds))
        pieces = shards_of(graph.tensors[parameter].shape, needs, speeds=speeds, block=block)
        own = tuple(piece[:axes] if volume(piece) else empty(axes) for piece in pieces)
        placements.append(Placement(own, own))
    return tuple(placements)


def volumes(boxes: Array) -> Array:
    """Elements of boxes [..., dimension, 2]."""
    return (boxes[..., 1] - boxes[..., 0]).prod(-1)


def _array(boxes: Sequence[Sequence[Box]]) -> Array:
    """[candidates, devices, dimensions, 2]."""
    return np.array(boxes, np.int64).reshape(len(boxes), len(boxes[0]), len(boxes[0][0]), 2)


def _mapped(boxes: Sequence[Sequence[Box]], function: object, known: dict[Box, Box]) -> Array:
    """`function` of every box, called once for each distinct one."""
    assert callable(function)
    for candidate in boxes:
        for box in candidate:
            if box not in known:
                known[box] = function(box)
    return _array([[known[box] for box in candidate] for candidate in boxes])


def _is_partial(domain: Domain, placement: Placement) -> bool:
    return any(volume(own) and domain.is_partial(own) for own in placement.own)


def _hull(a: Array, b: Array) -> Array:
    both = np.stack([np.minimum(a[..., 0], b[..., 0]), np.maximum(a[..., 1], b[..., 1])], -1)
    no_a, no_b = volumes(a) == 0, volumes(b) == 0
    return np.where(no_a[..., None, None], b, np.where(no_b[..., None, None], a, both))
