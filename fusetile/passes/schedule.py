"""Order every device's work: one global order of ops, and around each op the transfers that it needs or starts.

    device 0: Compute conv1 | Pack 3, Ship 3, Post 4 | Compute wgrad2 | Await 3 4, Place y | Compute conv2 ...

All devices follow the one global order, each leaving out what is not its part. A transfer is shipped, and its receive
posted, where its tensor is written, or, if it can wait, with the op that order.py says; it is awaited, on both sides,
where its first reader stands. So of all
devices the one that is furthest behind can always go on: there is no deadlock, and `check` proves it for each schedule.
The order itself is made in order.py.

Tiles are not cut into an interior, computed while the halo is under way, and a rest: by the simulation that gains
nothing (0.998 to 1.000 times the step of YOLOv2-16, VGG-16 and U-Net at batch 1 on six Pi 3). Halos are small; what is
waited for are whole maps where the split changes, sums of BatchNorm, and weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusetile.box import Box, contains, hull, volume
from fusetile.cluster import Cluster, Link
from fusetile.cost import op_seconds
from fusetile.errors import PlanError
from fusetile.graph import UPDATE, Graph
from fusetile.ops import domain_of
from fusetile.passes.communicate import Communication, wire_dtype
from fusetile.passes.order import Order, order_ops, turn
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
    with). `dtypes` are those of the parts on the wire, `size_bytes` is that of all their values; the lower `priority`,
    the sooner the target waits for it."""

    tag: int
    source: int
    target: int
    parts: tuple[Part, ...]
    dtypes: tuple[str, ...]
    size_bytes: int
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
    """`order`: the names of all ops, `seconds`: what each device is expected to take for its part of them; `actions`:
    per device what to do, in order."""

    order: tuple[str, ...]
    seconds: Mapping[str, tuple[float, ...]]
    transfers: tuple[Transfer, ...]
    actions: tuple[tuple[Action, ...], ...]


def schedule(graph: Graph, plan: Plan, communication: Communication, *, cluster: Cluster) -> Schedule:
    """Raises PlanError if the result could block."""
    seconds = op_seconds(graph, plan, cluster)
    waiting = _waiting(graph, plan, communication)
    order = order_ops(graph, communication, cluster.link, seconds, waiting)
    position = {name: i for i, name in enumerate(order.ops)}
    readers = _first_readers(communication, plan.nodes, position, waiting)
    transfers = _transfers(graph, communication, order, readers, cluster.link)
    actions = _actions(graph, plan, communication, order, transfers, readers)
    result = Schedule(order.ops, seconds, transfers, actions)
    check(result, plan.nodes)
    return result


def _transfers(
    graph: Graph,
    communication: Communication,
    order: Order,
    readers: dict[tuple[int, int], int],
    link: Link,
) -> tuple[Transfer, ...]:
    """Moves as messages. Small ones with the same ends that begin at the same moment share one."""
    written = {tensor: at for at, name in enumerate(order.ops) for tensor in graph.ops[name].outputs}
    messages: dict[tuple[int, int, tuple[str, int]], list[Part]] = {}
    for number, part in enumerate(_moves(communication)):
        if _size_bytes(graph, communication, part, link) > SMALL_bytes:
            moment = ("alone", number)
        elif (begin := _begin(part, communication, order)) is not None:
            moment = ("with", begin)
        else:
            moment = ("behind", written[communication.deliveries[part.delivery].tensor])
        messages.setdefault((part.move.source, part.move.target, moment), []).append(part)
    return tuple(
        Transfer(
            tag,
            source,
            target,
            tuple(parts),
            tuple(wire_dtype(graph, communication.deliveries[part.delivery].tensor, link) for part in parts),
            sum(_size_bytes(graph, communication, part, link) for part in parts),
            min(readers[part.delivery, target] for part in parts),
        )
        for tag, ((source, target, _), parts) in enumerate(messages.items())
    )


def _begin(part: Part, communication: Communication, order: Order) -> int | None:
    """With the op at which position a move begins; None if it begins when it is written."""
    nodes = len(communication.deliveries[part.delivery].need)
    return order.begins.get((part.delivery, turn(part.move, nodes)))


def _size_bytes(graph: Graph, communication: Communication, part: Part, link: Link) -> int:
    dtype = wire_dtype(graph, communication.deliveries[part.delivery].tensor, link)
    return volume(part.move.box) * np.dtype(dtype).itemsize


def _moves(communication: Communication) -> Iterator[Part]:
    """All moves over the network; each source serves its targets in its own turn, so that links do not collide."""
    for index, delivery in enumerate(communication.deliveries):
        nodes = len(delivery.need)
        rotated = sorted(delivery.transfers(), key=lambda move: (turn(move, nodes), move.source))
        yield from (Part(index, move) for move in rotated)


def _waiting(graph: Graph, plan: Plan, communication: Communication) -> list[dict[str, tuple[int, ...]]]:
    """Per delivery: its readers -> the devices on which they read more of it than these have anyway. A reader for which
    no device waits is not among them."""
    waiting = []
    for index, delivery in enumerate(communication.deliveries):
        found = {}
        for name in delivery.readers if delivery.moves else ():
            if name in graph.ops:
                devices = range(plan.nodes)
                lacking = (device for device in devices if _lacks(graph, plan, communication, index, name, device))
                found[name] = tuple(lacking)
        waiting.append({name: devices for name, devices in found.items() if devices})
    return waiting


def _lacks(graph: Graph, plan: Plan, communication: Communication, index: int, name: str, device: int) -> bool:
    """Whether an op reads more of a delivery on a device than what the device has anyway."""
    box, delivery = plan.placements[name].compute[device], communication.deliveries[index]
    if volume(box) == 0:
        return False
    if not delivery.in_place[device]:
        return True
    domain, reads = domain_of(graph, graph.ops[name]), communication.reads
    needs: list[Box] = [
        domain.need(box, i) for i, read in enumerate(graph.ops[name].inputs) if reads[name, read] == index
    ]
    return not contains(communication.layouts[delivery.tensor].have[device], hull(needs))


def _first_readers(
    communication: Communication,
    nodes: int,
    position: Mapping[str, int],
    waiting: Sequence[Mapping[str, Sequence[int]]],
) -> dict[tuple[int, int], int]:
    """(delivery, device) -> position of the first op on the device that waits for it; the loss is read at the end."""
    first = {
        (index, device): len(position) for index in range(len(communication.deliveries)) for device in range(nodes)
    }
    for index, readers in enumerate(waiting):
        for name, devices in readers.items():
            for device in devices:
                first[index, device] = min(first[index, device], position[name])
    return first


def _actions(
    graph: Graph,
    plan: Plan,
    communication: Communication,
    order: Order,
    transfers: tuple[Transfer, ...],
    readers: dict[tuple[int, int], int],
) -> tuple[tuple[Action, ...], ...]:
    behind: dict[str, list[Transfer]] = {}  # tensor -> what begins when it is written
    begins: dict[int, list[Transfer]] = {}  # position -> what begins with that op
    awaited: dict[tuple[int, int], list[int]] = {}  # (device, position) -> tags
    for transfer in transfers:
        first = transfer.parts[0]
        begin = _begin(first, communication, order)
        if begin is not None:
            begins.setdefault(begin, []).append(transfer)
        else:
            behind.setdefault(communication.deliveries[first.delivery].tensor, []).append(transfer)
        for device in (transfer.source, transfer.target):
            awaited.setdefault((device, transfer.priority), []).append(transfer.tag)
    placed: dict[tuple[int, int], list[int]] = {}
    for index, delivery in enumerate(communication.deliveries):
        for device in {move.target for move in delivery.moves}:
            placed.setdefault((device, readers[index, device]), []).append(index)
    actions = []
    for device in range(plan.nodes):
        steps: list[Action] = []
        for at in range(len(order.ops) + 1):
            update = at < len(order.ops) and graph.ops[order.ops[at]].phase == UPDATE  # it may wait
            soon = [t for t in begins.get(at, []) if update or t.priority == at]
            steps += _started(device, soon)
            if (device, at) in awaited:
                steps.append(Await(tuple(awaited[device, at])))
            steps += [Place(index) for index in placed.get((device, at), [])]
            if at == len(order.ops):
                break
            steps += _started(device, [t for t in begins.get(at, []) if t not in soon])
            if volume(plan.placements[order.ops[at]].compute[device]):
                steps.append(Compute(order.ops[at]))
            written = graph.ops[order.ops[at]].outputs
            steps += _started(device, [t for name in written for t in behind.get(name, [])])
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
