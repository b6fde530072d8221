"""plan.json: what was decided, in one document: options, devices, groups, every op's boxes, every transfer, memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fusetile.box import Box, volume
from fusetile.cluster import Cluster
from fusetile.codegen.laid_out import LaidOut
from fusetile.cost import cost_of, seconds_on
from fusetile.graph import UPDATE, Graph, Op
from fusetile.ops import domain_of
from fusetile.options import Training
from fusetile.passes.communicate import Communication, busiest
from fusetile.passes.economize import Saving
from fusetile.passes.plan_memory import MemoryPlan
from fusetile.passes.schedule import Action, Compute, Part, Schedule, Transfer
from fusetile.plan import Placement, Plan
from fusetile.planner.clock import Timeline
from fusetile.planner.simulate import simulate
from fusetile.program import SCHEMA_VERSION

Description = dict[str, Any]


def describe(
    laid: LaidOut,
    memories: Sequence[MemoryPlan],
    saving: Saving,
    *,
    cluster: Cluster,
    training: Training,
    block: int,
) -> Description:
    """The document; everything in it is plain JSON."""
    graph, order = laid.graph, laid.order
    timeline = simulate(laid.communication, order, cluster)
    options = {
        "batch": graph.tensors[graph.inputs[0]].shape[0],
        "loss": training.objective,
        "loss_model": training.loss_model and training.loss_model.name,
    }
    return {
        "schema": SCHEMA_VERSION,
        "model": graph.name,
        "training": asdict(training) | options,
        "channel_block": block,
        "link": asdict(cluster.link),
        "step_seconds": timeline.seconds,
        "search": _search(laid.plan),
        "parameter_bytes": sum(graph.parameters[name].value.nbytes for name in graph.gradients),
        "recomputed": {"maps": saving.maps, "seconds": saving.seconds},
        "nodes": _nodes(laid, memories, saving, cluster),
        "groups": _groups(laid, timeline, cluster),
        "ops": [_op(graph.ops[name], laid.plan.placements[name]) for name in order.order],
        "transfers": [_transfer(laid.communication, transfer) for transfer in order.transfers],
        "timeline": {
            "works": [
                [(_rounded(start), _rounded(stop), _op_of(actions[index])) for start, stop, index in works]
                for works, actions in zip(timeline.works, order.actions, strict=True)
            ],
            "messages": [(_rounded(start), _rounded(stop)) for start, stop in timeline.messages],
        },
    }


def _nodes(laid: LaidOut, memories: Sequence[MemoryPlan], saving: Saving, cluster: Cluster) -> list[Description]:
    seconds = predicted_seconds(laid.graph, laid.plan, cluster)
    return [
        {
            "name": node.name,
            "address": node.address,
            "device": node.device.kind,
            "cores": node.device.cores,
            "memory_bytes": node.device.memory_bytes,
            "arena_bytes": memory.arena_bytes,
            "saved_bytes": saving.saved_bytes[rank],
            "compute_seconds": seconds[rank],
            "sent_bytes": _sent(laid.order, rank),
        }
        for rank, (node, memory) in enumerate(zip(cluster.nodes, memories, strict=True))
    ]


def _op(op: Op, placement: Placement) -> Description:
    return {
        "name": op.name,
        "kind": op.kind,
        "phase": op.phase,
        "origin": op.origin,
        "compute": [list(box) if volume(box) else None for box in placement.compute],
        "own": [list(box) if volume(box) else None for box in placement.own],
    }


def _rounded(seconds: float) -> float:
    return round(seconds, 6)


def _op_of(action: Action) -> str:
    return action.op if isinstance(action, Compute) else ""


def _search(plan: Plan) -> Description | None:
    """What the planner knows of the plan that it chose: seconds per step; bound and gap of the analytic model."""
    estimate = plan.estimate
    if estimate is None:
        return None
    return {
        "chosen": estimate.rule,
        "model_seconds": estimate.model_seconds,
        "bound_seconds": estimate.bound_seconds,
        "gap": estimate.gap,
        "simulated_seconds": dict(estimate.others),
    }


def hash_of(description: Description, model: bytes) -> str:
    """Identifies a plan together with its model: nodes only work with peers that have the same. Addresses are not part
    of it: a local run takes whatever ports are free, and its results, which hold the hash, must be the same bits."""
    nodes = [{key: value for key, value in node.items() if key != "address"} for node in description["nodes"]]
    document = json.dumps({**description, "nodes": nodes}, sort_keys=True)
    return hashlib.sha256(document.encode() + model).hexdigest()


def predicted_seconds(graph: Graph, plan: Plan, cluster: Cluster) -> list[float]:
    """Per device, the time of its own computation in a step."""
    return [
        sum(seconds_on(cost_of(graph, op, plan.placements[op.name].compute[rank]), node) for op in graph.ops.values())
        for rank, node in enumerate(cluster.nodes)
    ]


def part_bytes(part: Part, dtype: str) -> int:
    """Bytes of values of one part."""
    return volume(part.move.box) * np.dtype(dtype).itemsize


def _sent(schedule: Schedule, rank: int) -> int:
    return sum(transfer.size_bytes for transfer in schedule.transfers if transfer.source == rank)


def _transfer(communication: Communication, transfer: Transfer) -> Description:
    return {
        "tag": transfer.tag,
        "source": transfer.source,
        "target": transfer.target,
        "priority": transfer.priority,
        "bytes": transfer.size_bytes,
        "parts": [
            {
                "tensor": communication.deliveries[part.delivery].tensor,
                "box": list(part.move.box),
                "dtype": dtype,
            }
            for part, dtype in zip(transfer.parts, transfer.dtypes, strict=True)
        ],
    }


# -- groups ------------------------------------------------------------------------------------------------------------


def _groups(laid: LaidOut, timeline: Timeline, cluster: Cluster) -> list[Description]:
    """Maximal runs of ops that no feature map is moved for, forward and backward; updates are left out. Seconds are
    those of the device that computes most, of the one that waits most, and of the busiest link for the maps."""
    graph, plan, communication, schedule = laid.graph, laid.plan, laid.communication, laid.order
    waits = _waits(schedule, timeline)
    arriving: dict[int, int] = {}  # bytes by delivery
    for transfer in schedule.transfers:
        for part, dtype in zip(transfer.parts, transfer.dtypes, strict=True):
            arriving[part.delivery] = arriving.get(part.delivery, 0) + part_bytes(part, dtype)
    groups: list[Description] = []
    seen: set[int] = set()
    for name in schedule.order:
        op = graph.ops[name]
        if op.phase == UPDATE:
            continue
        new = {communication.reads[name, tensor] for tensor in op.inputs} - seen
        seen |= new
        maps = [i for i in new if is_feature_map(graph, communication.deliveries[i].tensor)]
        received = sum(arriving.get(i, 0) for i in maps)
        if received or not groups or groups[-1]["phase"] != op.phase:
            groups.append(
                {"phase": op.phase, "ops": [], "received_bytes": 0, "needed_flops": 0.0, "computed_flops": 0.0}
                | {"compute_seconds": 0.0, "waited_seconds": 0.0, "transfer_seconds": 0.0}
            )
        groups[-1]["ops"].append(name)
        groups[-1]["received_bytes"] += received
        groups[-1]["compute_seconds"] += max(schedule.seconds[name])
        groups[-1]["waited_seconds"] += waits.get(name, 0.0)
        moved = sum(busiest(graph, communication.deliveries[i], cluster.link)[0] for i in maps)
        groups[-1]["transfer_seconds"] += moved / cluster.link.bytes_per_second
        groups[-1]["needed_flops"] += _flops(graph, op, plan.placements[name].own)
        groups[-1]["computed_flops"] += _flops(graph, op, plan.placements[name].compute)
    for found in groups:
        maps_written = [name for name in found["ops"] if is_feature_map(graph, graph.ops[name].outputs[0])]
        last = (maps_written or found["ops"])[-1]
        found["boxes"] = [_output(graph, plan, last, device) for device in range(plan.nodes)]
    return groups


def _waits(schedule: Schedule, timeline: Timeline) -> dict[str, float]:
    """Per op, how long the device that waits most is idle before it."""
    longest: dict[str, float] = {}
    for works, actions in zip(timeline.works, schedule.actions, strict=True):
        free, waited = 0.0, 0.0
        for start, stop, index in works:
            waited += start - free
            free = stop
            if name := _op_of(actions[index]):
                longest[name] = max(longest.get(name, 0.0), waited)
                waited = 0.0
    return longest


def _flops(graph: Graph, op: Op, boxes: Sequence[Box]) -> float:
    return sum(cost_of(graph, op, box).flops for box in boxes)


def _output(graph: Graph, plan: Plan, name: str, device: int) -> list[list[int]] | None:
    box: Box = plan.placements[name].own[device]
    return [list(part) for part in domain_of(graph, graph.ops[name]).output(box)] if volume(box) else None


def is_feature_map(graph: Graph, name: str) -> bool:
    """Whether a tensor is a map or a gradient of one: float32 with the batch as its first dimension."""
    tensor = graph.tensors[name]
    batch = graph.tensors[graph.inputs[0]].shape[0]
    small = name in graph.parameters or name == graph.loss or len(tensor.shape) < 2
    return not small and tensor.kind == "map" and tensor.dtype != "float64" and tensor.shape[0] == batch
