"""Derive every tensor's layout from the placements, and the moves that bring it to its readers.

    y: device 0 has rows 0..7, device 1 rows 7..13        delivery of y to conv2: need 0..8 | 6..13,
    conv2 on device 0 reads rows 0..8                     moves 1 -> 0: row 7, 0 -> 1: row 6

A delivery is one set of needed boxes of a tensor, shared by all readers that it serves: one buffer and one exchange for
the forward and the backward op that need the same halo. Where what a device has and what it needs lie close together
the delivery is *in place*: it fills up the producer's buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np

from fusetile.box import Box, contains, empty, hull, volume, whole
from fusetile.cluster import Link
from fusetile.graph import Graph, Op, Tensor
from fusetile.ops import domain_of
from fusetile.passes.keep import is_left_out, originals
from fusetile.plan import Layout, Move, Plan, redistribute
from fusetile.program import Buffer

PART_elements, MOST_parts = 1 << 14, 8
"""Weights and their gradients travel in moves of so many elements, or so many moves."""
LOGGED = "(the log)"
"""Stands among the readers of the loss, which every device may log at the end of the step, and of `Graph.logged`."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """`need[d]` of a tensor on every device d, for the ops `readers`. `in_place[d]`: in the producer's buffer. With a
    source layout of `sum` the moves are contributions, to be added in their order. `fed` tensors need no moves."""

    tensor: str
    need: tuple[Box, ...]
    in_place: tuple[bool, ...]
    moves: tuple[Move, ...]
    readers: tuple[str, ...]

    def transfers(self) -> tuple[Move, ...]:
        """The moves that cross the network."""
        return tuple(move for move in self.moves if move.source != move.target)


@dataclass(frozen=True, slots=True)
class Communication:
    """`layouts` of all tensors that ops write or that persist; `deliveries` in the order in which their tensors are
    written; `reads[op, tensor]`: the delivery through which an op reads a tensor."""

    layouts: dict[str, Layout]
    deliveries: tuple[Delivery, ...]
    reads: dict[tuple[str, str], int]


@dataclass(frozen=True, slots=True)
class Held:
    """Parameters that a program holds for another routine of its: the layouts of those that change, and per device
    the buffers of all."""

    layouts: Mapping[str, Layout]
    buffers: tuple[Mapping[str, Buffer], ...]

    def room(self, name: str) -> tuple[Box, ...] | None:
        """Per device, what there is of a parameter that changes; None if it is no such parameter."""
        if name not in self.layouts:
            return None
        nothing = empty(len(self.layouts[name].own[0]))
        return tuple(there[name].box if name in there else nothing for there in self.buffers)


def communicate(graph: Graph, plan: Plan, *, block: int, held: Held | None = None) -> Communication:
    """`graph` must be in topological order. `held`: what is where already when the routine begins. Raises PlanError
    where a layout is not legal."""
    layouts = _layouts(graph, plan)
    if held:
        layouts |= {name: layout for name, layout in held.layouts.items() if name in graph.parameters}
    for name, layout in layouts.items():
        layout.check(whole(graph.tensors[name].shape), name)
    deliveries: list[Delivery] = []
    reads: dict[tuple[str, str], int] = {}
    readers, kept = graph.consumers(), _kept(graph, plan)
    written = [name for op in graph.ops.values() for name in op.outputs if name not in kept]
    for name in [*graph.parameters, *sorted(graph.fed()), *written]:
        read_as = {op.name: same for same in (name, *_repeats(kept, name)) for op in readers[same]}
        needs = {op: _needs(graph, plan, graph.ops[op], same, block) for op, same in read_as.items()}
        if name == graph.loss:
            needs[LOGGED] = (whole(graph.tensors[name].shape),) * plan.nodes
        elif name in graph.logged:
            everything = whole(graph.tensors[name].shape)
            needs[LOGGED] = (everything, *[empty(len(everything))] * (plan.nodes - 1))
        if (summed := layouts.get(name)) is not None and summed.combine == "sum":
            apart = tuple(op for op in needs if op in plan.placements and plan.placements[op].partial)
            if apart:  # every device reads what it has made itself
                reads.update({(op, read_as[op]): len(deliveries) for op in apart})
                there = tuple(volume(have) > 0 for have in summed.have)
                deliveries.append(Delivery(name, summed.have, there, (), apart))
                needs = {op: need for op, need in needs.items() if op not in apart}
        constant = name in graph.parameters and name not in layouts
        for need, served in _merge(needs, force=constant):
            for op_name in served:
                reads[op_name, read_as.get(op_name, name)] = len(deliveries)
            room = held.room(name) if held else None
            divided = name in graph.parameters or name in graph.gradients.values()
            source = layouts.get(name)
            deliveries.append(_delivery(name, source, need, served, block, room=room, divided=divided))
    return Communication(layouts, tuple(deliveries), reads)


def _kept(graph: Graph, plan: Plan) -> dict[str, str]:
    """Tensors that nobody computes again -> what was kept instead."""
    kept: dict[str, str] = {}
    for name, first in originals(graph).items():
        if is_left_out(plan.placements[name]):
            kept.update(zip(graph.ops[name].outputs, first.outputs, strict=True))
    return kept


def _repeats(kept: dict[str, str], name: str) -> list[str]:
    return [repeated for repeated, original in kept.items() if original == name]


def _layouts(graph: Graph, plan: Plan) -> dict[str, Layout]:
    layouts = {}
    repeated = originals(graph)
    for op in graph.ops.values():
        if op.name in repeated and is_left_out(plan.placements[op.name]):
            continue
        domain, placement = domain_of(graph, op), plan.placements[op.name]
        partial = placement.partial or any(volume(box) and domain.is_partial(box) for box in placement.own)
        for i, name in enumerate(op.outputs):
            own = tuple(domain.output(box, i) for box in placement.own)
            have = own if partial else tuple(domain.output(box, i) for box in placement.compute)
            layouts[name] = Layout(have, own, "sum" if partial else "pick")
    for parameter, new in graph.next_value.items():
        layouts[parameter] = layouts[new]  # the step starts with what the last one left
    return layouts


def _needs(graph: Graph, plan: Plan, op: Op, name: str, block: int) -> tuple[Box, ...]:
    """Per device, the box of a tensor that an op reads, at whole channel blocks."""
    domain, tensor = domain_of(graph, op), graph.tensors[name]
    nothing = empty(len(tensor.shape))
    boxes = []
    for compute in plan.placements[op.name].compute:
        parts = [domain.need(compute, i) for i, read in enumerate(op.inputs) if read == name]
        boxes.append(aligned(hull(parts), tensor, block) if volume(compute) else nothing)
    return tuple(boxes)


def aligned(box: Box, tensor: Tensor, block: int) -> Box:
    """`box` extended to whole channel blocks: dimension 1 of maps, 0 of vectors, 0 and 1 of filters."""
    if volume(box) == 0 or tensor.dtype == "int32" or not box:
        return box
    whole_blocks = list(box)
    for axis in (0, 1) if tensor.kind == "filter" else (min(1, len(box) - 1),):
        start, stop = box[axis]
        whole_blocks[axis] = (start // block * block, min(tensor.shape[axis], -(-stop // block) * block))
    return tuple(whole_blocks)


def _merge(needs: dict[str, tuple[Box, ...]], *, force: bool) -> list[tuple[tuple[Box, ...], tuple[str, ...]]]:
    """Readers whose needs fit into one box per device without waste share a delivery; the largest needs come first.
    With `force` all share one."""
    groups: list[tuple[tuple[Box, ...], tuple[str, ...]]] = []
    for name, need in sorted(needs.items(), key=lambda item: -sum(map(volume, item[1]))):
        for i, (held, names) in enumerate(groups):
            both = tuple(hull([a, b]) for a, b in zip(held, need, strict=True))
            if force or sum(map(volume, both)) <= sum(map(volume, held)) + sum(map(volume, need)):
                groups[i] = (both, (*names, name))
                break
        else:
            groups.append((need, (name,)))
    return groups


def _delivery(
    name: str,
    source: Layout | None,
    need: tuple[Box, ...],
    readers: tuple[str, ...],
    block: int,
    *,
    room: tuple[Box, ...] | None,
    divided: bool,
) -> Delivery:
    """`room`: the boxes of the producer's buffer, if they are given and not to be chosen. `divided`: large moves are
    to be several."""
    if source is None:  # fed by the runtime, or a constant: everybody has what he needs
        return Delivery(name, need, (False,) * len(need), (), readers)
    moves: Sequence[Move] = redistribute(source, need)
    if divided:
        moves = [part for move in moves for part in _parts(move, block)]
    if room is not None:
        in_place = tuple(contains(box, wanted) for box, wanted in zip(room, need, strict=True))
    else:
        in_place = tuple(
            source.combine == "pick" and volume(hull([have, wanted])) <= volume(have) + volume(wanted)
            for have, wanted in zip(source.have, need, strict=True)
        )
    moves = [move for move in moves if move.source != move.target or not in_place[move.target]]
    return Delivery(name, need, in_place, tuple(moves), readers)


def _parts(move: Move, block: int) -> list[Move]:
    """A move of weights or their gradients as several: in short messages they give way to what is more urgent."""
    if len(move.box) < 2 or move.source == move.target:
        return [move]
    count = min(MOST_parts, -(-volume(move.box) // PART_elements))
    axis = max(range(2), key=lambda i: move.box[i][1] - move.box[i][0])
    start, stop = move.box[axis]
    blocks = -(-(stop - start) // block)
    ends = [min(stop, start + blocks * i // count * block) for i in range(count + 1)]
    return [
        Move(move.source, move.target, (*move.box[:axis], part, *move.box[axis + 1 :]))
        for part in pairwise(ends)
        if part[0] < part[1]
    ]


def wire_dtype(graph: Graph, name: str, link: Link) -> str:
    """As what a tensor's values travel: with a wire of fp16, maps and their gradients, and those of filters, as
    float16; everything else (weights, given or computed, sums over channels or pixels, statistics, losses) as it is."""
    tensor = graph.tensors[name]
    if link.wire == "fp32" or tensor.dtype != "float32":
        return tensor.dtype
    if name in graph.parameters or name in {*graph.next_value.values()} - {*graph.gradients.values()}:
        narrow = False
    elif tensor.kind == "filter":
        narrow = name not in graph.ops or graph.ops[name].kind != "FilterOf"
    else:
        images, *sizes = tensor.shape
        batch = graph.tensors[graph.inputs[0]].shape[0]
        narrow = images == batch and len(sizes) > 1 and sizes[0] > 1 and prod(sizes[1:]) > 1
    return "float16" if narrow else tensor.dtype


def busiest(graph: Graph, delivery: Delivery, link: Link) -> tuple[int, int]:
    """Bytes and messages of a delivery on the link direction that carries most."""
    size = np.dtype(wire_dtype(graph, delivery.tensor, link)).itemsize
    sizes: dict[tuple[str, int], list[int]] = {}
    for move in delivery.transfers():
        for end in (("out", move.source), ("in", move.target)):
            sizes.setdefault(end, []).append(size * volume(move.box))
    return max(map(sum, sizes.values()), default=0), max(map(len, sizes.values()), default=0)


def moved_bytes(graph: Graph, delivery: Delivery, link: Link) -> int:
    """Bytes that a delivery puts on the wire, over all devices."""
    size = np.dtype(wire_dtype(graph, delivery.tensor, link)).itemsize
    return sum(size * volume(move.box) for move in delivery.transfers())
