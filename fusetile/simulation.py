"""`fusetile simulate`: how long a step will take on a cluster that need not be there.

From profiles: the plan's computation by the rates of each device's profile. Or traced: every device's program runs on
this computer, op by op, and each op's time is scaled by what the profile says of such ops, over what this computer does
of such ops when it runs the whole network alone. Then both are played against the clock with all messages; if one
device alone has the data, with the next batch's samples, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from fusetile.box import volume
from fusetile.cluster import Cluster, MESSAGE_seconds, Node
from fusetile.codegen.laid_out import LaidOut
from fusetile.codegen.targets import host
from fusetile.cost import Cost, cost_of, is_convolution, seconds_on
from fusetile.device import Device, Speed
from fusetile.explain import megabytes
from fusetile.graph import Graph
from fusetile.local import temporary_folder
from fusetile.options import Training
from fusetile.passes.assign import assign
from fusetile.passes.rematerialize import cheap, rematerialize
from fusetile.passes.schedule import Schedule
from fusetile.pipeline import Planned, for_target, imported, plan_graph, write_planned
from fusetile.plan import Plan
from fusetile.planner.clock import Message, Timeline, Work, play
from fusetile.planner.simulate import works_of
from fusetile.program import Recv, Run, Send, Wait
from fusetile.rehearsal import Rehearsed, rehearse
from fusetile.report import predicted_seconds
from fusetile.trace import Trace

ENOUGH_bytes = 1 << 50  # for the plan of one device, which is there to compare with


@dataclass(frozen=True, slots=True)
class Usage:
    """What a device does in a step: seconds, and bytes of its arena and its memory. Both directions of its link are
    busy at the same time."""

    name: str
    device: str
    compute_seconds: float
    wait_seconds: float
    send_seconds: float
    receive_seconds: float
    arena_bytes: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """A step on the cluster, on its fastest device alone, and on one core of that. `source`: "profiles" or "trace"."""

    source: str
    plan: str
    step_seconds: float
    alone: str
    one_device_seconds: float
    one_core_seconds: float
    nodes: tuple[Usage, ...]

    def to_json(self) -> dict[str, object]:
        """With the speedups."""
        speedups = {
            "speedup_over_one_device": self.one_device_seconds / self.step_seconds,
            "speedup_over_one_core": self.one_core_seconds / self.step_seconds,
        }
        return asdict(self) | speedups


def simulate_model(model: Path, *, cluster: Cluster, training: Training, traced: bool, trace: Trace) -> Prediction:
    """Raises UserError and DoesNotFit as compiling does. A trace has the last batch of a step; those before it, with
    `--accumulate`, are played from the profiles."""
    cluster = cluster.with_source(training.source)
    graph = imported(model, training=training, trace=trace)
    planned = plan_graph(graph, cluster=cluster, training=training, trace=trace)
    fastest = max(cluster.nodes, key=lambda node: node.flops)
    messages = messages_of(planned.laid.order)
    if traced:
        alone, alone_training = _alone(fastest, cluster), replace(training, plan="single", source="")
        single = plan_graph(graph, cluster=alone, training=alone_training, trace=trace)
        here = _here(_run(single, model, alone, alone_training, trace)[0], single)
        runs = _run(planned, model, cluster, training, trace)
        works = [_works(run, planned, node, here) for run, node in zip(runs, cluster.nodes, strict=True)]
    else:
        works = works_of(planned.laid.communication, planned.laid.order, cluster, messages)
    routines = [_played(planned.laid, works, messages, cluster)]
    if (micro := planned.others.get("micro")) is not None:  # the batches of a step before its last
        messages = messages_of(micro.order)
        works = works_of(micro.communication, micro.order, cluster, messages)
        routines += [_played(micro, works, messages, cluster)] * (training.accumulate - 1)
    one, core = (_alone_seconds(planned.whole, node, cluster) for node in (fastest, one_core(fastest)))
    search = planned.description["search"]
    return Prediction(
        source="trace" if traced else "profiles",
        plan=search["chosen"] if search else training.plan,
        step_seconds=sum(routine.timeline.seconds for routine in routines),
        alone=fastest.name,
        one_device_seconds=one * training.accumulate,
        one_core_seconds=core * training.accumulate,
        nodes=_usage(planned, routines, cluster),
    )


@dataclass(frozen=True, slots=True)
class _Routine:
    """A batch, played with these messages."""

    timeline: Timeline
    messages: Sequence[Message]


def messages_of(order: Schedule) -> list[Message]:
    """The transfers of a schedule."""
    return [Message(t.source, t.target, t.size_bytes, t.priority) for t in order.transfers]


def _played(laid: LaidOut, works: Sequence[Sequence[Work]], messages: Sequence[Message], cluster: Cluster) -> _Routine:
    """With the samples of the next batch, which their source sends from the start and the others have at the end."""
    all_messages, all_works = [*messages], [[*mine] for mine in works]
    source, last = cluster.source, len(laid.order.order)
    if source is not None:
        for rank, mine in enumerate(all_works):
            if rank != source and (size_bytes := _sample_bytes(laid, rank)):
                tag = len(all_messages)
                all_messages.append(Message(source, rank, size_bytes, last))
                all_works[source].insert(0, Work(ships=(tag,)))
                mine.insert(0, Work(posts=(tag,)))
                mine.append(Work(awaits=(tag,)))
    messaging = [node.device.messaging for node in cluster.nodes]
    return _Routine(play(all_works, all_messages, cluster.link, messaging), all_messages)


def _sample_bytes(laid: LaidOut, rank: int) -> int:
    """What a device is fed of a batch: float32, or classes."""
    fed = {*laid.graph.inputs, *laid.graph.targets}
    tensors = laid.graph.tensors
    return sum(
        volume(delivery.need[rank]) * np.dtype(tensors[delivery.tensor].dtype).itemsize
        for delivery in laid.communication.deliveries
        if delivery.tensor in fed
    )


def one_core(node: Node) -> Node:
    """A device of which one core works."""
    return replace(node, device=node.device.with_cores(1))


def _alone(node: Node, cluster: Cluster) -> Cluster:
    return Cluster((replace(node, device=replace(node.device, memory_bytes=ENOUGH_bytes)),), cluster.link)


def _alone_seconds(whole: Graph, node: Node, cluster: Cluster) -> float:
    graph, alone = rematerialize(whole, cheap(whole)), _alone(node, cluster)
    return predicted_seconds(graph, assign(graph, plan="single", cluster=alone, block=1), alone)[0]


def _usage(planned: Planned, routines: Sequence[_Routine], cluster: Cluster) -> tuple[Usage, ...]:
    messages = [message for routine in routines for message in routine.messages]
    seconds = sum(routine.timeline.seconds for routine in routines)

    def carrying(end: str, rank: int) -> float:
        sizes = [message.size_bytes for message in messages if getattr(message, end) == rank]
        return sum(sizes) / cluster.link.bytes_per_second + len(sizes) * MESSAGE_seconds

    usages = []
    for rank, (node, memory) in enumerate(zip(cluster.nodes, planned.memories, strict=True)):
        busy = sum(stop - start for routine in routines for start, stop, _ in routine.timeline.works[rank])
        usages.append(
            Usage(
                name=node.name,
                device=node.device.kind,
                compute_seconds=busy,
                wait_seconds=seconds - busy,
                send_seconds=carrying("source", rank),
                receive_seconds=carrying("target", rank),
                arena_bytes=memory.arena_bytes,
                memory_bytes=node.device.memory_bytes,
            )
        )
    return tuple(usages)


# -- traced ------------------------------------------------------------------------------------------------------------


def _run(planned: Planned, model: Path, cluster: Cluster, training: Training, trace: Trace) -> tuple[Rehearsed, ...]:
    """All programs of a plan with this computer's kernels, timed."""
    with temporary_folder() as folder, trace.stage("rehearse"):
        build = folder / "build"
        ours = for_target(planned, host(), cluster=cluster, training=training)
        write_planned(ours, build, model=model, cluster=cluster, training=training, trace=trace)
        return rehearse(build)


def _cost(graph: Graph, plan: Plan, name: str, rank: int) -> Cost | None:
    """What an op costs on a device; nothing is known of what only moves data."""
    return cost_of(graph, graph.ops[name], plan.placements[name].compute[rank]) if name else None


def _here(run: Rehearsed, planned: Planned) -> Node:
    """This computer, as it does the whole network on one core: a rate for every kind of convolution that there is, and
    one for memory."""
    graph, plan = planned.laid.graph, planned.laid.plan
    work: dict[str, list[tuple[float, float]]] = {}
    for name, seconds in (part for parts in run.parts for part in parts):
        if (cost := _cost(graph, plan, name, 0)) is not None:
            computes = is_convolution(cost.kind)
            amount = cost.flops if computes else cost.traffic_bytes
            work.setdefault(cost.kind if computes else "", []).append((amount, seconds))
    rates = {kind: sum(a for a, _ in parts) / sum(s for _, s in parts) for kind, parts in work.items()}
    bandwidth = rates.pop("")
    speeds = tuple((kind, Speed(rate, float("inf"))) for kind, rate in rates.items())
    return Node("here", "", Device("here", "host", 1, float("inf"), bandwidth, 0, speeds))


def _works(run: Rehearsed, planned: Planned, node: Node, here: Node) -> list[Work]:
    graph, plan = planned.laid.graph, planned.laid.plan

    def scaled(part: tuple[str, float]) -> float:
        name, seconds = part
        cost = _cost(graph, plan, name, run.program.rank)
        if cost is None or not seconds_on(cost, here):
            return seconds * here.device.bandwidth / node.device.bandwidth
        return seconds * seconds_on(cost, node) / seconds_on(cost, here)

    works = []
    for step, parts in zip(run.program.steps, run.parts, strict=True):
        match step:
            case Run():
                works.append(Work(sum(map(scaled, parts))))
            case Send():
                works.append(Work(ships=(step.tag,)))
            case Recv():
                works.append(Work(posts=(step.tag,)))
            case Wait(tags):
                works.append(Work(awaits=tags))
    return works


# -- shown -------------------------------------------------------------------------------------------------------------


def show(prediction: Prediction, console: Console) -> None:
    """A table of the devices and the speedups."""
    table = Table(
        *("node", "device", "computes", "waits", "link: sends", "receives", "arena", "of memory"),
        title=f"A step, by {'this computer and the' if prediction.source == 'trace' else 'the'} profiles",
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for node in prediction.nodes:
        seconds = (node.compute_seconds, node.wait_seconds, node.send_seconds, node.receive_seconds)
        share = f"{100 * node.arena_bytes / node.memory_bytes:.1f} %"
        table.add_row(node.name, node.device, *map(_text, seconds), megabytes(node.arena_bytes), share)
    console.print(table)
    one, core, step = prediction.one_device_seconds, prediction.one_core_seconds, prediction.step_seconds
    console.print(
        f"Predicted step, plan {prediction.plan}: {_text(step)}, "
        f"{one / step:.2f} times as fast as {prediction.alone} alone ({_text(one)}), "
        f"{core / step:.2f} times as fast as one core of it ({_text(core)})",
        highlight=False,
        soft_wrap=True,
    )


def _text(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"
