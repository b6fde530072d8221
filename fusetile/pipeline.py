"""The pipeline, top to bottom: an ONNX model becomes one bundle per device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fusetile.bundle import check_replaceable, write_bundle
from fusetile.cluster import Cluster
from fusetile.codegen.draft import layers_of, memory_beside, memory_of
from fusetile.codegen.emit import emit
from fusetile.codegen.laid_out import LaidOut
from fusetile.codegen.targets import Target, target_named
from fusetile.graph import Graph
from fusetile.onnx_import import import_onnx
from fusetile.options import Training
from fusetile.passes.accumulate import accumulate, micro, place_sums
from fusetile.passes.add_optimizer import add_optimizer
from fusetile.passes.assign import assign
from fusetile.passes.buffers import buffers
from fusetile.passes.communicate import Held, communicate
from fusetile.passes.differentiate import add_loss, differentiate
from fusetile.passes.economize import Books, Saving, economize
from fusetile.passes.fit import fit, room_bytes
from fusetile.passes.freeze import freeze
from fusetile.passes.fuse import fuse
from fusetile.passes.group import group
from fusetile.passes.infer import infer
from fusetile.passes.plan_memory import MemoryPlan
from fusetile.passes.prune import prune
from fusetile.passes.rematerialize import cheap, place_copies, rematerialize
from fusetile.passes.schedule import schedule
from fusetile.plan import Plan
from fusetile.report import Description, describe, predicted_seconds
from fusetile.trace import Trace

PASSES = (
    "import_onnx",
    "freeze",
    "differentiate",
    "add_optimizer",
    "prune",
    "fuse",
    "rematerialize",
    "assign",
    "accumulate",
    "group",
    "communicate",
    "schedule",
    "buffers",
    "emit",
    "plan_memory",
    "economize",
    "micro",
    "infer",
    "bundle",
)
FREE_share = 0.025
"""Of a step's predicted computation: for less memory so much more is computed even where there is enough."""
TRIES = 3


def compile_model(
    model: Path, *, cluster: Cluster, training: Training, build: Path, trace: Trace | None = None
) -> Path:
    """Compile `model` for `cluster` into the folder `build` (replaced only once all is done) and return it.

    Raises UserError for a model, cluster or option that can't be trained, DoesNotFit if a device has too little memory.
    """
    trace = trace or Trace()
    check_replaceable(build)
    graph = imported(model, training=training, trace=trace)
    return compile_graph(graph, model=model, cluster=cluster, training=training, build=build, trace=trace)


def imported(model: Path, *, training: Training, trace: Trace) -> Graph:
    """The forward graph of an ONNX file."""
    with trace.stage("import_onnx") as seen:
        graph = seen(
            import_onnx(
                model,
                batch=training.batch,
                bn=training.bn,
                dropout=training.dropout,
                seed=training.seed,
                loss=training.loss_model,
            )
        )
        for note in graph.notes:
            trace.on_note(note)
    return graph


def compile_graph(
    graph: Graph, *, model: Path, cluster: Cluster, training: Training, build: Path, trace: Trace
) -> Path:
    """All that comes after the import; `model` is the file that the graph came from."""
    planned = plan_graph(graph, cluster=cluster, training=training, trace=trace)
    with trace.stage("bundle"):
        write_planned(planned, build, model=model, cluster=cluster, training=training, trace=trace)
    return build


@dataclass(frozen=True, slots=True)
class Planned:
    """All that is decided before kernels are compiled. `whole` is the graph in which nothing is computed twice;
    `others` are the routines besides the training step, `memories` the larger arenas of all; `description` is what
    plan.json will say."""

    whole: Graph
    laid: LaidOut
    others: Mapping[str, LaidOut]
    memories: Sequence[MemoryPlan]
    description: Description


def plan_graph(graph: Graph, *, cluster: Cluster, training: Training, trace: Trace) -> Planned:
    """A graph as it was imported -> a plan that fits into the devices' memory."""
    cluster = cluster.with_wire(training.wire).with_source(training.source)
    with trace.stage("freeze") as seen:
        forward = seen(freeze(graph, frozen=training.freeze, trained=training.train))
    whole = training_graph(forward, training=training, trace=trace)
    with trace.stage("rematerialize") as seen:
        graph = seen(rematerialize(whole, cheap(whole)))
    with trace.stage("assign"):
        plan = assign(
            graph,
            plan=training.plan,
            cluster=cluster,
            block=block_of(cluster),
            halo=training.halo,
            on_progress=trace.on_progress,
        )
    if training.accumulate > 1:
        with trace.stage("accumulate") as seen:
            whole = seen(accumulate(whole, training.accumulate))
            graph = rematerialize(whole, cheap(whole))
        if any(op.kind == "BatchStatistics" for op in whole.ops.values()):
            trace.on_note(
                f"--accumulate {training.accumulate}: BatchNormalization takes the statistics of each of the "
                f"{training.accumulate} batches of a step by itself"
            )
    laid, saving = _fitted(whole, graph, plan, cluster=cluster, training=training, trace=trace)
    others = _others(forward, laid, cluster=cluster, training=training, trace=trace)
    routines = (laid, *others.values())
    for each in routines:
        fit(each.memories, cluster=cluster, layers=[layers_of(each.graph, draft) for draft in each.drafts])
    memories = [
        max((each.memories[rank] for each in routines), key=lambda memory: memory.arena_bytes)
        for rank in range(len(cluster.nodes))
    ]
    description = describe(laid, memories, saving, cluster=cluster, training=training, block=block_of(cluster))
    return Planned(whole, laid, others, memories, description)


def training_graph(graph: Graph, *, training: Training, trace: Trace) -> Graph:
    """A forward graph -> that of a step, in which nothing is computed twice."""
    with trace.stage("differentiate") as seen:
        graph = seen(differentiate(graph, training.criterion))
    with trace.stage("add_optimizer") as seen:
        graph = seen(add_optimizer(graph, training.update))
    with trace.stage("prune") as seen:
        graph = seen(prune(graph))
    with trace.stage("fuse") as seen:
        graph = seen(fuse(graph))
    return graph


def write_planned(
    planned: Planned, build: Path, *, model: Path, cluster: Cluster, training: Training, trace: Trace
) -> None:
    """Compile the kernels and write the bundles."""
    write_bundle(
        build,
        model=model,
        laid=planned.laid,
        others=planned.others,
        description=planned.description,
        cluster=cluster,
        training=training,
        on_progress=trace.on_progress,
    )


def block_of(cluster: Cluster) -> int:
    """The channel block that all devices share."""
    return min(target_named(node.device.target).block for node in cluster.nodes)


def for_target(planned: Planned, target: Target, *, cluster: Cluster, training: Training) -> Planned:
    """The same plan, of training steps alone, with kernels for another CPU on all devices."""
    laid = replace(planned.laid, targets=[target] * len(cluster.nodes))
    laid = _emitted(laid, cluster=cluster, training=training)
    return replace(planned, laid=laid, others={}, memories=laid.memories)


def _fitted(
    whole: Graph, graph: Graph, plan: Plan, *, cluster: Cluster, training: Training, trace: Trace
) -> tuple[LaidOut, Saving]:
    """The training step, with more computed again than in `graph` where the devices' memory needs it. Gradients of
    several batches are added up apart, on every device, if there is room for that."""
    for apart in (True, False) if training.accumulate > 1 else (False,):
        placed = place_sums(whole, plan, apart=apart)
        laid = lay_out(graph, placed, cluster=cluster, training=training, trace=trace)
        laid, saving = _economize(whole, placed, laid, cluster=cluster, training=training, trace=trace)
        if (laid.arena_bytes <= room_bytes(cluster)).all():
            break
    return laid, saving


def _others(forward: Graph, laid: LaidOut, *, cluster: Cluster, training: Training, trace: Trace) -> dict[str, LaidOut]:
    """The routines besides the training step, by name: "micro" is a batch that is not a step's last."""
    others: dict[str, LaidOut] = {}
    if training.accumulate > 1:
        with trace.stage("micro") as seen:
            others["micro"] = _lay_out_beside(seen(micro(laid.graph)), laid, cluster=cluster, training=training)
    if training.validation:
        with trace.stage("infer") as seen:
            validation = seen(fuse(prune(infer(add_loss(forward, training.criterion), trained=laid.graph))))
            others["validation"] = _lay_out_beside(validation, laid, cluster=cluster, training=training)
    return others


def _lay_out_beside(graph: Graph, laid: LaidOut, *, cluster: Cluster, training: Training) -> LaidOut:
    """Another routine of the same programs: its ops are where those of the same names are in the training step."""
    placements = {op.name: laid.plan.placements[op.name] for op in graph.ops.values()}
    plan = replace(laid.plan, placements=placements)
    other = lay_out(graph, plan, cluster=cluster, training=training, trace=Trace(), held=laid.held(), lean=laid.lean)
    memories = list(map(memory_beside, other.drafts, laid.drafts, laid.memories))
    return replace(other, memories=memories)


def lay_out(
    graph: Graph,
    plan: Plan,
    *,
    cluster: Cluster,
    training: Training,
    trace: Trace,
    held: Held | None = None,
    lean: bool = False,
) -> LaidOut:
    """All that follows from a plan; `lean` as in `Job`."""
    targets = [target_named(node.device.target) for node in cluster.nodes]
    block = block_of(cluster)
    with trace.stage("group"):
        plan = group(graph, plan, cluster=cluster, halo=training.halo)
    with trace.stage("communicate"):
        communication = communicate(graph, plan, block=block, held=held)
    with trace.stage("schedule"):
        order = schedule(graph, plan, communication, cluster=cluster)
    with trace.stage("buffers"):
        storage = buffers(graph, plan, communication, order.order, block=block, held=held)
    laid = LaidOut(graph, plan, communication, order, storage, targets, lean=lean)
    return _emitted(laid, cluster=cluster, training=training, trace=trace)


def _emitted(laid: LaidOut, *, cluster: Cluster, training: Training, trace: Trace | None = None) -> LaidOut:
    """With drafts and arenas."""
    trace = trace or Trace()
    with trace.stage("emit"):
        drafts = emit(laid, block=block_of(cluster), numerics=training.numerics)
    with trace.stage("plan_memory"):
        memories = [memory_of(draft, guard=training.guard, lean=laid.lean) for draft in drafts]
    return replace(laid, drafts=drafts, memories=memories)


def _economize(
    whole: Graph, plan: Plan, laid: LaidOut, *, cluster: Cluster, training: Training, trace: Trace
) -> tuple[LaidOut, Saving]:
    """Lay the plan out again, with kernels that need less scratch and with more computed again, until its arenas fit
    into the devices' memory (three times at most); or once if they fit, for the memory that costs next to no time.
    `whole` is the graph without copies."""
    room = room_bytes(cluster)
    if (laid.arena_bytes > room).any():
        laid = _emitted(replace(laid, lean=True), cluster=cluster, training=training, trace=trace)
    start = again = cheap(whole)
    scratch = [draft.scratch_bytes for draft in laid.drafts]
    books = Books(whole, laid.plan, laid.communication, laid.order.order, laid.storage, scratch, cluster=cluster)
    free_seconds = FREE_share * max(predicted_seconds(laid.graph, laid.plan, cluster))
    scale = laid.arena_bytes / books.play(again, room).peak_bytes  # what gaps and messages add
    for _ in range(TRIES):
        with trace.stage("economize"):
            choice = economize(books, start, room / scale, free_seconds=free_seconds)
        if choice.again == again:
            break
        more = rematerialize(whole, choice.again)
        placed = place_copies(more, plan)
        tried = lay_out(more, placed, cluster=cluster, training=training, trace=trace, lean=laid.lean)
        scale = np.maximum(scale, tried.arena_bytes / choice.peak_bytes)
        if (tried.arena_bytes / room).max() < (laid.arena_bytes / room).max():
            laid, again = tried, choice.again
        if (laid.arena_bytes <= room).all():
            break
    return laid, books.saving(again, scale)
