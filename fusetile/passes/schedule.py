"""Order every device's work: one global order of ops, and around each op the transfers that it needs or starts.

    device 0: Compute conv1 | Pack 3, Ship 3, Post 4 | Compute wgrad2 | Await 3 4, Place y | Compute conv2 ...

All devices follow the one global order, each leaving out what is not its part. A transfer is shipped, and its receive
posted, where its tensor is written, or, if it can wait, with the op that order.py says; it is awaited, on both sides,
where its first reader stands. So of all devices the one that is furthest behind can always go on: there is no deadlock,
and `check` proves it for each schedule. The order itself is made in order.py.

What takes long to come is not always waited for by all of an op, nor made by all of it: convolutions are computed in
pieces where that hides a transfer (pieces.py). What is sent leaves behind the piece that completes it; what comes is
awaited behind the piece that does not need it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fusetile.box import Box, contains, hull, intersect, volume
from fusetile.cluster import Cluster, Link
from fusetile.cost import op_seconds
from fusetile.errors import PlanError
from fusetile.graph import UPDATE, Graph, Op
from fusetile.ops import Domain, domain_of
from fusetile.passes.communicate import Communication, wire_dtype
from fusetile.passes.order import Order, can_wait, order_ops, turns_of
from fusetile.passes.pieces import Cut, Cuts, Piece, cuts
from fusetile.plan import Move, Plan

T = TypeVar("T")
SMALL_bytes = 16_384
"""Up to here the cost of a message is that of its existence, not of its bytes."""


@dataclass(frozen=True, slots=True)
class Part:
    """A move of a delivery, and its turn among those of it."""

    delivery: int
    move: Move
    turn: int


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
    """Run iterations of an op, which are predicted to take so long: all that this device does, or a piece."""

    op: str
    box: Box
    seconds: float


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
    urgent = {i: readers for i, readers in enumerate(waiting) if not can_wait(graph, communication, i, readers)}
    cut = cuts(graph, plan, communication, cluster, seconds, urgent)
    early = {name for (name, _), each in cut.items() if each.awaited is None}
    order = order_ops(graph, communication, cluster.link, seconds, waiting, early)
    position = {name: i for i, name in enumerate(order.ops)}
    readers = _first_readers(communication, plan.nodes, position, waiting)
    transfers = _transfers(graph, communication, order, readers, cluster.link)
    actions = _actions(graph, plan, communication, order, transfers, readers, seconds, cut)
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
    messages: dict[tuple[int, int, tuple[str, int]], list[tuple[Part, str, int]]] = {}
    for number, part in enumerate(_moves(communication)):
        tensor = communication.deliveries[part.delivery].tensor
        dtype = wire_dtype(graph, tensor, link)
        size_bytes = volume(part.move.box) * np.dtype(dtype).itemsize
        if size_bytes > SMALL_bytes:
            moment = ("alone", number)
        elif (begin := _begin(part, order)) is not None:
            moment = ("with", begin)
        else:
            moment = ("behind", written[tensor])
        messages.setdefault((part.move.source, part.move.target, moment), []).append((part, dtype, size_bytes))
    transfers = []
    for tag, ((source, target, _), found) in enumerate(messages.items()):
        parts, dtypes, sizes_bytes = zip(*found, strict=True)
        priority = min(readers[part.delivery, target] for part in parts)
        transfers.append(Transfer(tag, source, target, parts, dtypes, sum(sizes_bytes), priority))
    return tuple(transfers)


def _begin(part: Part, order: Order) -> int | None:
    """With the op at which position a move begins; None if it begins when it is written."""
    return order.begins.get((part.delivery, part.turn))


def _moves(communication: Communication) -> Iterator[Part]:
    """All moves over the network; each source serves its targets in its own turn, so that links do not collide."""
    for index, delivery in enumerate(communication.deliveries):
        rotated = sorted(turns_of(delivery).items(), key=lambda item: (item[1], item[0].source))
        yield from (Part(index, move, number) for move, number in rotated)


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
    seconds: Mapping[str, Sequence[float]],
    cut: Cuts,
) -> tuple[tuple[Action, ...], ...]:
    moments = _moments(communication, order, transfers, readers)
    actions = []
    for device in range(plan.nodes):
        steps: list[Action] = []
        for at, name in enumerate(order.ops):
            op, box = graph.ops[name], plan.placements[name].compute[device]
            whole = Cut((Piece(box, seconds[name][device]),) if volume(box) else ())
            how = cut.get((name, device), whole)
            beginning, (tags, indices) = moments.begins.get((device, at), []), moments.received(device, at)
            soon, later = _parted(beginning, [op.phase == UPDATE or t.priority == at for t in beginning])
            first, rest = _parted(tags, [any(p.delivery != how.awaited for p in transfers[tag].parts) for tag in tags])
            written = [t for tensor in op.outputs for t in moments.behind.get((device, tensor), [])]
            early, last = _parted(written, [(name, t.source) in cut for t in written])
            steps += _started(device, soon)
            steps += _received(first, [i for i in indices if i != how.awaited])
            steps += _started(device, later)
            steps += [Post(t.tag) for t in early if t.target == device]  # before their source has done all of the op
            between = _received(rest, [i for i in indices if i == how.awaited])
            leaving = [t for t in early if t.source == device]
            steps += _computed(op, domain_of(graph, op), leaving, how.pieces, between)
            steps += _started(device, last)
        end = len(order.ops)
        steps += _started(device, moments.begins.get((device, end), []))
        steps += _received(*moments.received(device, end))
        actions.append(tuple(steps))
    return tuple(actions)


@dataclass(frozen=True, slots=True)
class _Moments:
    """By device and: position of an op, what begins with it, tags that it awaits, deliveries that are put together for
    it; tensor, what begins when it is written."""

    begins: dict[tuple[int, int], list[Transfer]]
    awaited: dict[tuple[int, int], list[int]]
    placed: dict[tuple[int, int], list[int]]
    behind: dict[tuple[int, str], list[Transfer]]

    def received(self, device: int, at: int) -> tuple[list[int], list[int]]:
        return self.awaited.get((device, at), []), self.placed.get((device, at), [])


def _moments(
    communication: Communication,
    order: Order,
    transfers: Sequence[Transfer],
    readers: Mapping[tuple[int, int], int],
) -> _Moments:
    moments = _Moments({}, {}, {}, {})
    for transfer in transfers:
        first = transfer.parts[0]
        begin, tensor = _begin(first, order), communication.deliveries[first.delivery].tensor
        for device in (transfer.source, transfer.target):
            if begin is not None:
                moments.begins.setdefault((device, begin), []).append(transfer)
            else:
                moments.behind.setdefault((device, tensor), []).append(transfer)
            moments.awaited.setdefault((device, transfer.priority), []).append(transfer.tag)
    for index, delivery in enumerate(communication.deliveries):
        for device in {move.target for move in delivery.moves}:
            moments.placed.setdefault((device, readers[index, device]), []).append(index)
    return moments


def _received(tags: Sequence[int], deliveries: Sequence[int]) -> list[Action]:
    """Wait for transfers, then put deliveries together."""
    return [*([Await(tuple(tags))] if tags else []), *map(Place, deliveries)]


def _computed(
    op: Op, domain: Domain, leaving: Sequence[Transfer], pieces: Sequence[Piece], between: Sequence[Action]
) -> Iterator[Action]:
    """The pieces of an op, and behind each of them what can leave then; behind the first what the others wait for."""
    for i, piece in enumerate(pieces):
        yield Compute(op.name, piece.box, piece.seconds)
        missing = [domain.output(other.box) for other in pieces[i + 1 :]]
        waits = [any(volume(intersect(p.move.box, box)) for p in t.parts for box in missing) for t in leaving]
        leaving, ready = _parted(leaving, waits)
        yield from (Pack(t.tag) for t in ready)
        yield from (Ship(t.tag) for t in ready)
        if i == 0:
            yield from between


def _parted(items: Sequence[T], belongs: Sequence[bool]) -> tuple[list[T], list[T]]:
    """Those that belong, and those that do not."""
    parts: tuple[list[T], list[T]] = ([], [])
    for item, does in zip(items, belongs, strict=True):
        parts[not does].append(item)
    return parts


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
                if isinstance(action, Await) and not all(tag in shipped and tag in posted for tag in action.tags):
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
