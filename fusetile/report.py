"""plan.json: what was decided, in one document: options, devices, groups, every op's boxes, every transfer, memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fusetile.box import volume
from fusetile.cluster import Cluster
from fusetile.codegen.laid_out import LaidOut
from fusetile.cost import cost_of, seconds_on
from fusetile.graph import Graph, Op
from fusetile.groups import groups_of
from fusetile.options import Training
from fusetile.passes.communicate import Communication
from fusetile.passes.economize import Saving
from fusetile.passes.plan_memory import MemoryPlan
from fusetile.passes.schedule import Action, Compute, Schedule, Transfer
from fusetile.plan import Placement, Plan
from fusetile.planner.critical import Stretch, critical_path
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
        "groups": groups_of(laid, timeline, cluster),
        "ops": [_op(graph.ops[name], laid.plan.placements[name]) for name in order.order],
        "transfers": [_transfer(laid.communication, transfer) for transfer in order.transfers],
        "timeline": {
            "works": [
                [(_rounded(start), _rounded(stop), _op_of(actions[index])) for start, stop, index in works]
                for works, actions in zip(timeline.works, order.actions, strict=True)
            ],
            "messages": [(_rounded(start), _rounded(stop)) for start, stop in timeline.messages],
        },
        "critical_path": [_stretch(order, stretch) for stretch in critical_path(order, timeline)],
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


def _stretch(order: Schedule, stretch: Stretch) -> Description:
    """A node that computes an op ("" for copies), or message `tag` on its way to it."""
    place: Description = {"node": stretch.device, "start": _rounded(stretch.start), "stop": _rounded(stretch.stop)}
    if stretch.action is None:
        return place | {"tag": stretch.tag}
    return place | {"op": _op_of(order.actions[stretch.device][stretch.action])}


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
