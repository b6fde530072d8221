"""Order every device's work: one global order of ops, and around each op the transfers that it needs or starts.

    device 0: Compute conv1 | Pack 3, Ship 3, Post 4 | Compute wgrad2 | Await 3 4, Place y | Compute conv2 ...

All devices follow the one global order, each leaving out what is not its part. A transfer is shipped, and its receive
posted, where its tensor is written; it is awaited, on both sides, where its first reader stands. So of all
devices the one that is furthest behind can always go on: there is no deadlock, and `check` proves it for each schedule.
Input gradients come before weight gradients; an update whose gradient crosses the network waits for one more layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fusetile.box import volume
from fusetile.errors import PlanError
from fusetile.graph import UPDATE, Graph
from fusetile.passes.communicate import Communication
from fusetile.plan import Move, Plan

SMALL_bytes = 16_384
"""Up to here the cost of a message is that of its existence, not of its bytes."""


@dataclass(frozen=True, slots=True)
class Part:
    """A move of a delivery."""

    delivery: int
    move: Move


@dataclass(frozen=True, slots=True)
class Transfer:
    """One message of a step: one move, or several small ones of the same moment (the parameters that a step begins
    with). `dtypes` are those of the parts on the wire; the lower `priority`, the sooner the target waits for it."""

    tag: int
    source: int
    target: int
    parts: tuple[Part, ...]
    dtypes: tuple[str, ...]
    priority: int


@dataclass(frozen=True, slots=True)
class Compute:
    """Run this device's iterations of an op."""

    op: str


@dataclass(frozen=True, slots=True)
class Pack:
    """Copy a transfer's box out of the source buffer, unless it can be sent from there."""

    tag: int


@dataclass(frozen=True, slots=True)
class Ship:
    """Start sending a transfer."""

    tag: int


@dataclass(frozen=True, slots=True)
class Post:
    """Make a transfer's target ready."""

    tag: int


@dataclass(frozen=True, slots=True)
class Await:
    """Wait until transfers are complete."""

    tags: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Put together what has come for a delivery: copies, or sums in rank order."""

    delivery: int


Action = Compute | Pack | Ship | Post | Await | Place


@dataclass(frozen=True, slots=True)
class Schedule:
    """`order`: the names of all ops; `actions`: per device what to do, in order."""

    order: tuple[str, ...]
    transfers: tuple[Transfer, ...]
    actions: tuple[tuple[Action, ...], ...]


def schedule(graph: Graph, plan: Plan, communication: Communication) -> Schedule:
    """Raises PlanError if the result could block."""
    order = _order(graph, communication)
    position = {name: i for i, name in enumerate(order)}
    readers = _first_readers(plan, communication, position)
    transfers = _transfers(graph, communication, position, readers)
    result = Schedule(order, transfers, _actions(graph, plan, communication, order, transfers, readers))
    check(result, plan.nodes)
    return result


def _transfers(
    graph: Graph, communication: Communication, position: dict[str, int], readers: dict[tuple[int, int], int]
) -> tuple[Transfer, ...]:
    """Moves as messages; small ones with the same ends and the same moment of writing share one."""
    producers = graph.producers()
    messages: dict[tuple[int, ...], list[Part]] = {}
    for number, part in enumerate(_moves(communication)):
        tensor = graph.tensors[communication.deliveries[part.delivery].tensor]
        written = position[producers[tensor.name].name] if tensor.name in producers else -1
        small = volume(part.move.box) * np.dtype(tensor.dtype).itemsize <= SMALL_bytes
        ends = (part.move.source, part.move.target, written)
        messages.setdefault(ends if small else (*ends, number), []).append(part)
    return tuple(
        Transfer(
            tag,
            source,
            target,
            tuple(parts),
            tuple(graph.tensors[communication.deliveries[part.delivery].tensor].dtype for part in parts),
            min(readers[part.delivery, target] for part in parts),
        )
        for tag, ((source, target, *_), parts) in enumerate(messages.items())
    )


def _moves(communication: Communication) -> Iterator[Part]:
    """All moves over the network; each source serves its targets in its own turn, so that links do not collide."""
    for index, delivery in enumerate(communication.deliveries):
        nodes = len(delivery.need)
        rotated = sorted(delivery.transfers(), key=lambda move: ((move.target - move.source) % nodes, move.source))
        yield from (Part(index, move) for move in rotated)


def _order(graph: Graph, communication: Communication) -> tuple[str, ...]:
    names = [op.name for op in graph.topological() if op.phase != UPDATE]
    position = {name: i for i, name in enumerate(names)}
    readers, producers = graph.consumers(), graph.producers()
    after: dict[int, list[str]] = {}
    for op in graph.topological():
        if op.phase != UPDATE:
            continue
        before = [producers[name].name for name in op.inputs if name in producers]
        before += [reader.name for name in op.inputs if name in graph.parameters for reader in readers[name]]
        last = max((position[name] for name in before if name in position), default=len(names) - 1)
        crosses = any(communication.deliveries[communication.reads[op.name, name]].transfers() for name in op.inputs)
        position[op.name] = _next_weight_gradient(graph, names, last) if crosses else last
        after.setdefault(position[op.name], []).append(op.name)
    return tuple(name for i, op_name in enumerate(names) for name in (op_name, *after.get(i, [])))


def _next_weight_gradient(graph: Graph, names: list[str], start: int) -> int:
    later = [i for i in range(start + 1, len(names)) if graph.ops[names[i]].kind.endswith("WeightGrad")]
    return later[0] if later else len(names) - 1


def _first_readers(plan: Plan, communication: Communication, position: dict[str, int]) -> dict[tuple[int, int], int]:
    """(delivery, device) -> position of the first op on the device that reads it; the loss is read at the end."""
    first: dict[tuple[int, int], int] = {}
    for index, delivery in enumerate(communication.deliveries):
        for device in range(plan.nodes):
            places = [
                position[name]
                for name in delivery.readers
                if name in position and volume(plan.placements[name].compute[device])
            ]
            first[index, device] = min(places, default=len(position))
    return first


def _actions(
    graph: Graph,
    plan: Plan,
    communication: Communication,
    order: tuple[str, ...],
    transfers: tuple[Transfer, ...],
    readers: dict[tuple[int, int], int],
) -> tuple[tuple[Action, ...], ...]:
    of_tensor: dict[str, list[Transfer]] = {}
    awaited: dict[tuple[int, int], list[int]] = {}  # (device, position) -> tags
    for transfer in transfers:
        of_tensor.setdefault(communication.deliveries[transfer.parts[0].delivery].tensor, []).append(transfer)
        for device in (transfer.source, transfer.target):
            awaited.setdefault((device, transfer.priority), []).append(transfer.tag)
    placed: dict[tuple[int, int], list[int]] = {}
    for index, delivery in enumerate(communication.deliveries):
        for device in {move.target for move in delivery.moves}:
            placed.setdefault((device, readers[index, device]), []).append(index)
    actions = []
    for device in range(plan.nodes):
        steps = list(_started(device, [t for name in graph.parameters for t in of_tensor.get(name, [])]))
        for at in range(len(order) + 1):
            if (device, at) in awaited:
                steps.append(Await(tuple(awaited[device, at])))
            steps += [Place(index) for index in placed.get((device, at), [])]
            if at == len(order):
                break
            if volume(plan.placements[order[at]].compute[device]):
                steps.append(Compute(order[at]))
            written = graph.ops[order[at]].outputs
            steps += _started(device, [t for name in written for t in of_tensor.get(name, [])])
        actions.append(tuple(steps))
    return tuple(actions)


def _started(device: int, transfers: list[Transfer]) -> Iterator[Action]:
    """Receives first: a peer may only send what is posted."""
    yield from (Post(t.tag) for t in transfers if t.target == device)
    outgoing = [t.tag for t in transfers if t.source == device]
    yield from (Pack(tag) for tag in outgoing)
    yield from (Ship(tag) for tag in outgoing)


def check(result: Schedule, nodes: int) -> None:
    """Every transfer is shipped once and posted once, by the right devices, and no order of events can block."""
    shipped: set[int] = set()
    posted: set[int] = set()
    at = [0] * nodes
    progress = True
    while progress:
        progress = False
        for device, actions in enumerate(result.actions):
            while at[device] < len(actions):
                action = actions[at[device]]
                if isinstance(action, Await) and not set(action.tags) <= shipped & posted:
                    break
                if isinstance(action, Ship | Post):
                    done, end = (shipped, "source") if isinstance(action, Ship) else (posted, "target")
                    if action.tag in done or getattr(result.transfers[action.tag], end) != device:
                        raise PlanError(f"transfer {action.tag} is shipped or posted twice, or by a wrong device")
                    done.add(action.tag)
                at[device] += 1
                progress = True
    stuck = [device for device, actions in enumerate(result.actions) if at[device] < len(actions)]
    everything = {transfer.tag for transfer in result.transfers}
    if stuck or shipped != everything or posted != everything:
        raise PlanError(f"the schedule blocks on devices {stuck}, or leaves transfers unpaired")
