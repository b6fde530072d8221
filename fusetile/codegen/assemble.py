"""Drafts -> programs: lifetimes, addresses, and runs of kernel calls joined to segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fusetile.box import volume, whole
from fusetile.cluster import Cluster
from fusetile.codegen.calls import KernelCall, Ref
from fusetile.codegen.emit import Draft, DraftRecv, DraftSend
from fusetile.graph import Graph, Op
from fusetile.ops.loss import CLASS_LOSSES
from fusetile.ops.yolo import classes_of
from fusetile.passes.buffers import DeviceBuffers
from fusetile.passes.communicate import Communication
from fusetile.passes.plan_memory import MemoryPlan, plan_memory
from fusetile.plan import Plan
from fusetile.program import (
    Buffer,
    Call,
    Feed,
    Gradient,
    Program,
    Recv,
    REDZONE_bytes,
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


def lifetimes(draft: Draft) -> dict[str, tuple[int, int]]:
    """Per buffer the first and last step of the draft that touch it."""
    end = len(draft.steps)
    live: dict[str, tuple[int, int]] = {}
    moving: dict[int, str] = {}

    def touch(name: str, at: int) -> None:
        first, last = live.get(name, (at, at))
        live[name] = (min(first, at), max(last, at))

    for name in draft.persistent:
        live[name] = (-1, end)
    for name in draft.fed:
        touch(name, -1)
    for name in draft.logged:
        touch(name, end)
    for at, step in enumerate(draft.steps):
        match step:
            case KernelCall():
                for pointer in step.pointers:
                    touch(pointer.buffer, at)
            case DraftSend() | DraftRecv():
                touch(step.at.buffer, at)
                moving[step.tag] = step.at.buffer
            case Wait(tags):
                for tag in tags:
                    touch(moving[tag], at)
    return live


def memory_of(draft: Draft, *, guard: bool = False) -> MemoryPlan:
    """The arena of a draft; with `guard` there are redzones around all buffers."""
    return plan_memory(draft.buffers.values(), lifetimes(draft), redzone_bytes=REDZONE_bytes if guard else 0)


def assemble(
    graph: Graph,
    plan: Plan,
    communication: Communication,
    draft: Draft,
    storage: DeviceBuffers,
    memory: MemoryPlan,
    *,
    cluster: Cluster,
    rank: int,
    library: str,
    identity: Identity,
    seconds: float,
) -> Program:
    """The program of one device; `seconds` of computation are predicted for a step."""
    steps, where = _steps(draft, memory)

    def placed(buffer: Buffer) -> Buffer:
        return replace(buffer, offset_bytes=memory.offsets[buffer.name])

    loss = next(i for i, d in enumerate(communication.deliveries) if d.tensor == graph.loss)
    return Program(
        rank=rank,
        nodes=plan.nodes,
        name=cluster.nodes[rank].name,
        addresses=tuple(node.address for node in cluster.nodes),
        plan_hash=identity.plan_hash,
        model_hash=identity.model_hash,
        library=library,
        batch=identity.batch,
        seed=identity.seed,
        arena_bytes=memory.arena_bytes,
        steps=steps,
        feeds=tuple(
            replace(feed, buffer=placed(feed.buffer))
            for feed in _feeds(graph, communication, storage)
            if feed.buffer.name in memory.offsets
        ),
        shards=tuple(
            replace(shard, buffer=placed(shard.buffer)) for shard in _shards(graph, communication, storage, rank)
        ),
        gradients=tuple(
            replace(gradient, buffer=placed(gradient.buffer)) for gradient in _gradients(graph, draft, where)
        ),
        loss=placed(storage.delivered[loss]),
        segment_seconds=seconds,
        rates=identity.rates,
        peers=tuple(sorted({step.peer for step in steps if isinstance(step, Send | Recv)})),
        zones=_zones(draft, memory, where, len(steps)) if memory.redzone_bytes else (),
    )


def _steps(draft: Draft, memory: MemoryPlan) -> tuple[tuple[Step, ...], list[tuple[int, int]]]:
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
            pointers = tuple(map(address, step.pointers))
            calls.append(Call(step.kernel.symbol, step.split, pointers, step.ints, step.floats, step.op))
            continue
        close()
        where.append((len(steps), 0))
        match step:
            case DraftSend(peer, tag, at, size_bytes, priority):
                steps.append(Send(peer, tag, address(at), size_bytes, priority))
            case DraftRecv(peer, tag, at, size_bytes):
                steps.append(Recv(peer, tag, address(at), size_bytes))
            case Wait():
                steps.append(step)
    close()
    return tuple(steps), where


def _zones(draft: Draft, memory: MemoryPlan, where: list[tuple[int, int]], end: int) -> tuple[Zone, ...]:
    def moment(at: int) -> tuple[int, int]:
        return (-1, 0) if at < 0 else where[at] if at < len(where) else (end, 0)

    return tuple(
        Zone(name, offset, draft.buffers[name].size_bytes, *map(moment, memory.live[name]))
        for name, offset in memory.offsets.items()
    )


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
            anchors = graph.tensors[op.inputs[2]].shape[0] // 2
            feed = replace(feed, classes=classes_of(channels, anchors), boxes=True)
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
                shards.append(Shard(name, onnx_name, shape, original.transposed, box, buffer, updated))
    return shards


def _gradients(graph: Graph, draft: Draft, where: list[tuple[int, int]]) -> list[Gradient]:
    """Where each gradient can be read: just before the update, in the update's shards, piece by piece."""
    found = []
    producers = graph.producers()
    for name in graph.gradients:
        for piece in draft.pieces.get(producers[graph.next_value[name]].name, []):
            shape, parameter = graph.tensors[name].shape, graph.parameters[name]
            step, call = where[piece.at]
            found.append(
                Gradient(name, parameter.onnx_name, shape, parameter.transposed, piece.box, piece.buffer, step, call)
            )
    return found
