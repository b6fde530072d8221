"""The pipeline, top to bottom: an ONNX model becomes one bundle per device."""

from __future__ import annotations

from pathlib import Path

from fusetile.bundle import write_bundle
from fusetile.cluster import Cluster
from fusetile.codegen.assemble import memory_of
from fusetile.codegen.emit import emit
from fusetile.codegen.targets import target_named
from fusetile.graph import Graph
from fusetile.onnx_import import import_onnx
from fusetile.options import Training
from fusetile.passes.add_optimizer import add_optimizer
from fusetile.passes.assign import assign
from fusetile.passes.buffers import buffers
from fusetile.passes.communicate import communicate
from fusetile.passes.differentiate import differentiate
from fusetile.passes.fit import fit
from fusetile.passes.freeze import freeze
from fusetile.passes.fuse import fuse
from fusetile.passes.group import group
from fusetile.passes.prune import prune
from fusetile.passes.rematerialize import rematerialize
from fusetile.passes.schedule import schedule
from fusetile.report import describe
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
    "group",
    "communicate",
    "schedule",
    "buffers",
    "emit",
    "plan_memory",
    "bundle",
)


def compile_model(
    model: Path, *, cluster: Cluster, training: Training, build: Path, trace: Trace | None = None
) -> Path:
    """Compile `model` for `cluster` into the folder `build` (replaced only once all is done) and return it.

    Raises UserError for a model, cluster or option that can't be trained, DoesNotFit if a device has too little memory.
    """
    trace = trace or Trace()
    with trace.stage("import_onnx") as seen:
        graph = seen(
            import_onnx(model, batch=training.batch, bn=training.bn, dropout=training.dropout, seed=training.seed)
        )
    return compile_graph(graph, model=model, cluster=cluster, training=training, build=build, trace=trace)


def compile_graph(
    graph: Graph, *, model: Path, cluster: Cluster, training: Training, build: Path, trace: Trace
) -> Path:
    """All that comes after the import; `model` is the file that the graph came from."""
    targets = [target_named(node.device.target) for node in cluster.nodes]
    block = min(target.block for target in targets)
    with trace.stage("freeze") as seen:
        graph = seen(freeze(graph, frozen=training.freeze, trained=training.train))
    with trace.stage("differentiate") as seen:
        graph = seen(differentiate(graph, loss=training.loss, classes=training.classes))
    with trace.stage("add_optimizer") as seen:
        graph = seen(add_optimizer(graph, training.update))
    with trace.stage("prune") as seen:
        graph = seen(prune(graph))
    with trace.stage("fuse") as seen:
        graph = seen(fuse(graph))
    with trace.stage("rematerialize") as seen:
        graph = seen(rematerialize(graph))
    with trace.stage("assign"):
        plan = assign(
            graph,
            plan=training.plan,
            cluster=cluster,
            block=block,
            halo=training.halo,
            on_progress=trace.on_progress,
        )
    with trace.stage("group"):
        plan = group(graph, plan, cluster=cluster, halo=training.halo)
    with trace.stage("communicate"):
        communication = communicate(graph, plan, block=block)
    with trace.stage("schedule"):
        order = schedule(graph, plan, communication, cluster=cluster)
    with trace.stage("buffers"):
        storage = buffers(graph, plan, communication, order.order, block=block)
    with trace.stage("emit"):
        drafts = emit(
            graph, plan, communication, order, storage, targets=targets, block=block, numerics=training.numerics
        )
    with trace.stage("plan_memory"):
        memories = fit([memory_of(draft, guard=training.guard) for draft in drafts], cluster=cluster)
    with trace.stage("bundle"):
        description = describe(
            graph, plan, communication, order, memories, cluster=cluster, training=training, block=block
        )
        write_bundle(
            build,
            model=model,
            graph=graph,
            plan=plan,
            communication=communication,
            storage=storage,
            drafts=drafts,
            memories=memories,
            description=description,
            cluster=cluster,
            targets=targets,
            training=training,
            on_progress=trace.on_progress,
        )
    return build
