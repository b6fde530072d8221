"""Drafts -> programs: addresses, and runs of kernel calls joined to segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fusetile.box import Box, volume, whole
from fusetile.cluster import Cluster
from fusetile.codegen.calls import KernelCall, Ref
from fusetile.codegen.draft import Draft, DraftRecv, DraftSend
from fusetile.codegen.laid_out import LaidOut
from fusetile.graph import Graph, Op
from fusetile.ops import domain_of
from fusetile.ops.loss import CLASS_LOSSES
from fusetile.ops.yolo import classes_of
from fusetile.passes.buffers import DeviceBuffers
from fusetile.passes.communicate import LOGGED, Communication
from fusetile.passes.plan_memory import MemoryPlan
from fusetile.program import (
    Buffer,
    Call,
    Feed,
    Gradient,
    Measure,
    Program,
    Recv,
    Routine,
    Run,
    Send,
    Shard,
    Step,
    Wait,
    Zone,
)
from fusetile.rates import Rates


@dataclass(frozen=True, slots=True)
class Identity:
    """What programs of one compilation have in common."""

    plan_hash: str
    model_hash: str
    batch: int
    seed: int
    rates: Rates
    accumulate: int = 1


def assemble(
    laid: LaidOut,
    *,
    cluster: Cluster,
    rank: int,
    library: str,
    identity: Identity,
    seconds: float,
    others: Mapping[str, LaidOut],
) -> Program:
    """The program of one device; `seconds` of computation are predicted for a step. `others`: "micro" and "validation",
    if there are such routines."""
    graph, communication = laid.graph, laid.communication
    draft, storage, memory = laid.drafts[rank], laid.storage[rank], laid.memories[rank]
    steps, where = _steps(draft, memory)
    first_tag = len(laid.order.transfers)
    routines: dict[str, Routine] = {}
    for name, other in others.items():
        routines[name] = _routine(other, rank, first_tag)
        first_tag += len(other.order.transfers)
    moving = [step for each in (steps, *(other.steps for other in routines.values())) for step in each]

    def placed(buffer: Buffer) -> Buffer:
        return replace(buffer, offset_bytes=memory.offsets[buffer.name])

    loss = next(i for i, d in enumerate(communication.deliveries) if d.tensor == graph.loss)
    return Program(
        rank=rank,
        nodes=laid.plan.nodes,
        name=cluster.nodes[rank].name,
        addresses=tuple(node.address for node in cluster.nodes),
        plan_hash=identity.plan_hash,
        model_hash=identity.model_hash,
        library=library,
        batch=identity.batch,
        seed=identity.seed,
        arena_bytes=max(each.memories[rank].arena_bytes for each in (laid, *others.values())),
        steps=steps,
        feeds=_placed_feeds(graph, communication, storage, memory),
        shards=tuple(
            replace(shard, buffer=placed(shard.buffer)) for shard in _shards(graph, communication, storage, rank)
        ),
        gradients=tuple(
            replace(
                gradient,
                buffer=placed(gradient.buffer),
                factor=placed(gradient.factor) if gradient.factor else None,
            )
            for gradient in _gradients(graph, draft, where)
        ),
        loss=placed(storage.delivered[loss]),
        segment_seconds=seconds,
        rates=identity.rates,
        peers=tuple(sorted({step.peer for step in moving if isinstance(step, Send | Recv)})),
        zones=_zones(draft, memory, where, len(steps)) if memory.redzone_bytes else (),
        accumulate=identity.accumulate,
        source=cluster.source,
        samples=tuple(sample_feeds(graph)),
        micro=routines.get("micro"),
        validation=routines.get("validation"),
    )


def _routine(laid: LaidOut, rank: int, first_tag: int) -> Routine:
    """A routine besides the training step; its transfers' tags begin at `first_tag`."""
    graph, communication = laid.graph, laid.communication
    draft, storage, memory = laid.drafts[rank], laid.storage[rank], laid.memories[rank]
    steps, where = _steps(draft, memory, first_tag)
    losses = [i for i, d in enumerate(communication.deliveries) if d.tensor == graph.loss]

    def placed(buffer: Buffer) -> Buffer:
        return replace(buffer, offset_bytes=memory.offsets[buffer.name])

    def compared(op: Op, i: int) -> tuple[Buffer, Box] | None:
        box = laid.plan.placements[op.name].compute[rank]
        buffer = storage.delivered.get(communication.reads[op.name, op.inputs[i]])
        return (placed(buffer), domain_of(graph, op).need(box, i)) if buffer and volume(box) else None

    measures = []
    for term in graph.terms if graph.logged else ():
        op = graph.ops[term.op] if term.op else None
        output, target = (compared(op, 0), compared(op, 1)) if op else (None, None)
        loss = _logged(communication, storage, term.loss) if rank == 0 else None
        weight = _logged(communication, storage, term.weight) if rank == 0 else None
        measures.append(
            Measure(
                op.kind if op else "",
                dict(op.attrs) if op else {},
                graph.tensors[op.inputs[0]].shape if op else (),
                factor=term.factor,
                loss=placed(loss) if loss else None,
                weight=placed(weight) if weight else None,
                output=output[0] if output else None,
                target=target[0] if target else None,
                output_box=output[1] if output else (),
                target_box=target[1] if target else (),
            )
        )
    return Routine(
        steps,
        _placed_feeds(graph, communication, storage, memory),
        placed(storage.delivered[losses[0]]) if losses else None,
        _zones(draft, memory, where, len(steps)) if memory.redzone_bytes else (),
        tuple(measures),
    )


def _logged(communication: Communication, storage: DeviceBuffers, name: str) -> Buffer | None:
    """Where a tensor is that is read at the end."""
    found = [i for i, d in enumerate(communication.deliveries) if d.tensor == name and LOGGED in d.readers]
    return storage.delivered[found[0]] if found else None


def _placed_feeds(
    graph: Graph, communication: Communication, storage: DeviceBuffers, memory: MemoryPlan
) -> tuple[Feed, ...]:
    return tuple(
        replace(feed, buffer=replace(feed.buffer, offset_bytes=memory.offsets[feed.buffer.name]))
        for feed in _feeds(graph, communication, storage)
        if feed.buffer.name in memory.offsets
    )


def _steps(draft: Draft, memory: MemoryPlan, first_tag: int = 0) -> tuple[tuple[Step, ...], list[tuple[int, int]]]:
    """The steps, and for every step of the draft its (step, call)."""

    def address(at: Ref) -> int:
        return memory.offsets[at.buffer] + at.offset_bytes

    steps: list[Step] = []
    calls: list[Call] = []
    where: list[tuple[int, int]] = []

    def close() -> None:
        if calls:
            steps.append(Run(tuple(calls)))
            calls.clear()

    for step in draft.steps:
        if isinstance(step, KernelCall):
            where.append((len(steps), len(calls)))
            calls.append(step.placed(memory.offsets))
            continue
        close()
        where.append((len(steps), 0))
        match step:
            case DraftSend(peer, tag, at, size_bytes, priority):
                steps.append(Send(peer, first_tag + tag, address(at), size_bytes, priority))
            case DraftRecv(peer, tag, at, size_bytes):
                steps.append(Recv(peer, first_tag + tag, address(at), size_bytes))
            case Wait(tags):
                steps.append(Wait(tuple(first_tag + tag for tag in tags)))
    close()
    return tuple(steps), where


def _zones(draft: Draft, memory: MemoryPlan, where: list[tuple[int, int]], end: int) -> tuple[Zone, ...]:
    def moment(at: int) -> tuple[int, int]:
        return (-1, 0) if at < 0 else where[at] if at < len(where) else (end, 0)

    return tuple(
        Zone(name, offset, _size_bytes(draft, memory, name), *map(moment, memory.live[name]))
        for name, offset in memory.offsets.items()
    )


def _size_bytes(draft: Draft, memory: MemoryPlan, name: str) -> int:
    """Of a buffer of a draft, or of something that is kept beside it."""
    if name in draft.buffers:
        return draft.buffers[name].size_bytes
    return memory.sizes_bytes[name] - 2 * memory.redzone_bytes


def _feeds(graph: Graph, communication: Communication, storage: DeviceBuffers) -> list[Feed]:
    feeds, readers = [], graph.consumers()
    for index, delivery in enumerate(communication.deliveries):
        name = delivery.tensor
        if name not in graph.fed() or index not in storage.delivered:
            continue
        shape, buffer = graph.tensors[name].shape, storage.delivered[index]
        if name in graph.controls:
            feeds.append(Feed(graph.controls[name], "", shape, buffer))
            continue
        feeds.append(_sample_feed(graph, name, buffer, readers[name]))
    return feeds


def _sample_feed(graph: Graph, name: str, buffer: Buffer, readers: Sequence[Op]) -> Feed:
    role, key = ("target", graph.targets[name]) if name in graph.targets else ("input", name)
    feed = Feed(role, key, graph.tensors[name].shape, buffer)
    for op in readers:
        channels = graph.tensors[op.inputs[0]].shape[1] if op.inputs[0] != name else 0
        if op.kind in CLASS_LOSSES.values():
            feed = replace(feed, classes=channels, ignore=op.attrs.get("ignore"))
        elif op.kind == "YoloV2":
            feed = replace(feed, classes=classes_of(channels, len(op.attrs["anchors"]) // 2), boxes=True)
    return feed


def sample_feeds(graph: Graph) -> list[Feed]:
    """What a graph with its loss is fed, as one device would get it."""
    readers = graph.consumers()
    return [
        _sample_feed(graph, name, Buffer(name, whole(graph.tensors[name].shape)), readers[name])
        for name in [*graph.inputs, *graph.targets]
        if readers[name]
    ]


def _shards(graph: Graph, communication: Communication, storage: DeviceBuffers, rank: int) -> list[Shard]:
    shards = []
    averaged = {parameter.average_of for parameter in graph.parameters.values()}
    for name, parameter in graph.parameters.items():
        original = graph.parameters[parameter.average_of] if parameter.average_of else parameter
        onnx_name = "" if name in averaged else original.onnx_name
        shape = graph.tensors[name].shape
        if name in communication.layouts:
            held = [(communication.layouts[name].own[rank], storage.home.get(name))]
        else:
            held = [
                (delivery.need[rank], storage.delivered.get(i))
                for i, delivery in enumerate(communication.deliveries)
                if delivery.tensor == name
            ]
        for box, buffer in held:
            if volume(box) and buffer:
                updated = name in graph.next_value
                shards.append(
                    Shard(name, onnx_name, shape, original.transposed, box, buffer, updated, parameter.lasting)
                )
    return shards


def _gradients(graph: Graph, draft: Draft, where: list[tuple[int, int]]) -> list[Gradient]:
    """Where each gradient can be read: just before the update, in the update's shards."""
    found = []
    producers = graph.producers()
    for name in graph.gradients:
        if piece := draft.pieces.get(producers[graph.next_value[name]].name):
            shape, parameter = graph.tensors[name].shape, graph.parameters[name]
            step, call = where[piece.at]
            names = (name, parameter.onnx_name, shape, parameter.transposed)
            found.append(Gradient(*names, piece.box, piece.buffer, step, call, piece.factor))
    return found
