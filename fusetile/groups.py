"""Groups of a plan: runs of layers for which no feature map moves, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusetile.box import Box, extents, intersect, volume
from fusetile.cluster import Cluster
from fusetile.codegen.calls import KernelCall
from fusetile.codegen.laid_out import LaidOut
from fusetile.cost import cost_of
from fusetile.graph import UPDATE, Graph, Op
from fusetile.ops import domain_of
from fusetile.passes.communicate import busiest
from fusetile.passes.schedule import Compute, Part, Schedule
from fusetile.plan import Move
from fusetile.planner.clock import Timeline

Group = dict[str, Any]
AXES = {"n": "samples", "k": "output channels", "c": "channels", "h": "rows", "w": "columns"}


def groups_of(laid: LaidOut, timeline: Timeline, cluster: Cluster) -> list[Group]:
    """Maximal runs of ops that no feature map is moved for, forward and backward; updates are left out. Bytes are those
    that all devices receive. Seconds are those of the device that computes most, of the one that waits most, and of the
    busiest link for the maps; memory is the most that a device's buffers take while it computes the group."""
    graph, plan, communication, schedule = laid.graph, laid.plan, laid.communication, laid.order
    waits, live = _waits(schedule, timeline), _live_bytes(laid)
    arriving: dict[int, list[tuple[Move, int]]] = {}  # by delivery
    for transfer in schedule.transfers:
        for part, dtype in zip(transfer.parts, transfer.dtypes, strict=True):
            arriving.setdefault(part.delivery, []).append((part.move, part_bytes(part, dtype)))
    groups: list[Group] = []
    seen: set[int] = set()
    for name in schedule.order:
        op = graph.ops[name]
        if op.phase == UPDATE:
            continue
        new = {communication.reads[name, tensor] for tensor in op.inputs} - seen
        seen |= new
        maps = [i for i in new if is_feature_map(graph, communication.deliveries[i].tensor)]
        moves = [(i, move, size) for i in maps for move, size in arriving.get(i, ())]
        if moves or not groups or groups[-1]["phase"] != op.phase:
            groups.append(_empty(op.phase))
        group = groups[-1]
        group["ops"].append(name)
        group["received_bytes"] += sum(size for _, _, size in moves)
        group["halo_bytes"] += sum(size for i, move, size in moves if _is_halo(laid, i, move))
        group["compute_seconds"] += max(schedule.seconds[name])
        group["waited_seconds"] += waits.get(name, 0.0)
        moved = sum(busiest(graph, communication.deliveries[i], cluster.link)[0] for i in maps)
        group["transfer_seconds"] += moved / cluster.link.bytes_per_second
        group["needed_flops"] += _flops(graph, op, plan.placements[name].own)
        group["computed_flops"] += _flops(graph, op, plan.placements[name].compute)
        group["memory_bytes"] = max(group["memory_bytes"], live.get(name, 0))
    for group in groups:
        last = _last(laid, group["ops"])
        group["split"] = _split(laid, last)
        group["boxes"] = [_output(laid, last, device) for device in range(plan.nodes)]
    return groups


def _empty(phase: str) -> Group:
    counts = dict.fromkeys(("received_bytes", "halo_bytes", "memory_bytes"), 0)
    sums = ("needed_flops", "computed_flops", "compute_seconds", "waited_seconds", "transfer_seconds")
    return {"phase": phase, "ops": [], **counts, **dict.fromkeys(sums, 0.0)}


def part_bytes(part: Part, dtype: str) -> int:
    """Bytes of values of one part of a message."""
    return volume(part.move.box) * np.dtype(dtype).itemsize


def _is_halo(laid: LaidOut, delivery: int, move: Move) -> bool:
    """Whether a move brings a border: the target has most of the rows and columns that it needs, and all the rest."""
    found = laid.communication.deliveries[delivery]
    layout, need = laid.communication.layouts.get(found.tensor), found.need[move.target]
    if layout is None or layout.combine == "sum":
        return False
    there = intersect(layout.have[move.target], need)
    most = (2 * has > needs for has, needs in zip(extents(there), extents(need), strict=True))
    return there[:2] == need[:2] and all(most)


def _waits(schedule: Schedule, timeline: Timeline) -> dict[str, float]:
    """Per op, how long the device that waits most is idle before it."""
    longest: dict[str, float] = {}
    for works, actions in zip(timeline.works, schedule.actions, strict=True):
        free, waited = 0.0, 0.0
        for start, stop, index in works:
            waited += start - free
            free, action = stop, actions[index]
            if isinstance(action, Compute):
                longest[action.op] = max(longest.get(action.op, 0.0), waited)
                waited = 0.0
    return longest


def _live_bytes(laid: LaidOut) -> dict[str, int]:
    """Per op, the most that the buffers of a device take while it is computed."""
    most: dict[str, int] = {}
    for draft, memory in zip(laid.drafts, laid.memories, strict=True):
        change = np.zeros(len(draft.steps) + 2, np.int64)
        for name, (first, last) in memory.live.items():
            change[max(first, 0)] += memory.sizes_bytes[name]
            change[last + 1] -= memory.sizes_bytes[name]
        for step, live in zip(draft.steps, np.cumsum(change).tolist(), strict=False):
            if isinstance(step, KernelCall) and step.op:
                most[step.op] = max(most.get(step.op, 0), live)
    return most


def _flops(graph: Graph, op: Op, boxes: Sequence[Box]) -> float:
    return sum(cost_of(graph, op, box).flops for box in boxes)


def _last(laid: LaidOut, names: Sequence[str]) -> str:
    """The last op of a group that makes a map on some device; or else the last."""
    made = [
        name
        for name in names
        if is_feature_map(laid.graph, laid.graph.ops[name].outputs[0]) and any(map(volume, _own(laid, name)))
    ]
    return (made or names)[-1]


def _own(laid: LaidOut, name: str) -> Sequence[Box]:
    return laid.plan.placements[name].own


def _split(laid: LaidOut, name: str) -> dict[str, int]:
    """By which dimensions an op's iterations are split, and into how many parts."""
    axes = domain_of(laid.graph, laid.graph.ops[name]).axes
    boxes = [box for box in _own(laid, name) if volume(box)]
    summed = "k" in {axis.name for axis in axes}  # channels of the input, then
    parts = {}
    for i, axis in enumerate(axes):
        count = len({box[i] for box in boxes})
        if count > 1:
            what = AXES.get(axis.name, axis.name)
            parts["input channels" if summed and axis.name == "c" else what] = count
    return parts


def _output(laid: LaidOut, name: str, device: int) -> list[list[int]] | None:
    box = _own(laid, name)[device]
    return [list(part) for part in domain_of(laid.graph, laid.graph.ops[name]).output(box)] if volume(box) else None


def is_feature_map(graph: Graph, name: str) -> bool:
    """Whether a tensor is a map or a gradient of one: float32 with the batch as its first dimension."""
    tensor = graph.tensors[name]
    batch = graph.tensors[graph.inputs[0]].shape[0]
    small = name in graph.parameters or name == graph.loss or len(tensor.shape) < 2
    return not small and tensor.kind == "map" and tensor.dtype != "float64" and tensor.shape[0] == batch
