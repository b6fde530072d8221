"""`fusetile profile`: bundles that measure devices, and measuring on this computer.

A bundle holds the training step of `models.probe` for one device, and transfers around a ring of all devices.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import onnx

from fusetile.bundle import check_replaceable
from fusetile.cluster import Cluster, MESSAGE_seconds
from fusetile.cost import cost_of
from fusetile.device import PARALLEL_efficiency
from fusetile.errors import FusetileError
from fusetile.local import temporary_folder
from fusetile.options import Training
from fusetile.pipeline import Planned, imported, plan_graph, write_planned
from fusetile.program import ALIGNMENT_bytes, Program, Recv, Send, Step, Wait, to_json
from fusetile.runtime.files import check_makeable
from fusetile.runtime.node import load_program
from fusetile.runtime.profile import PROBES
from fusetile.trace import Trace
from models import probe

SMALL_bytes, SMALL_messages = 64, 17
LARGE_bytes = 2 << 20
TRAINING = Training(batch=1, plan="single")


def write_probes(cluster: Cluster, build: Path, *, trace: Trace) -> None:
    """A bundle per device, in BUILD/nodes. Devices of one kind share their kernels."""
    check_replaceable(build)
    build.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{build.name}.", dir=build.parent) as folder:
        model, aside = Path(folder) / "probe.onnx", Path(folder) / "build"
        onnx.save(probe.build(), model)
        made: dict[str, tuple[Path, Planned]] = {}
        for rank, node in enumerate(cluster.nodes):
            if node.device.target not in made:
                one = Path(folder) / node.device.target
                made[node.device.target] = (one, _compile(model, Cluster((node,), cluster.link), one, trace))
            one, planned = made[node.device.target]
            (source,) = (one / "nodes").iterdir()
            target = aside / "nodes" / node.name
            shutil.copytree(source, target)
            program = _ring(load_program(source), cluster, rank)
            (target / "program.json").write_text(to_json(program))
            (target / PROBES).write_text(json.dumps(_known(planned, node.device.target)))
        shutil.copy(one / "plan.json", aside)  # by which it is known as a build
        if build.exists():
            shutil.rmtree(build)
        aside.chmod(0o755)
        aside.rename(build)


def _compile(model: Path, alone: Cluster, build: Path, trace: Trace) -> Planned:
    planned = plan_graph(imported(model, training=TRAINING, trace=trace), cluster=alone, training=TRAINING, trace=trace)
    with trace.stage("bundle"):
        write_planned(planned, build, model=model, cluster=alone, training=TRAINING, trace=trace)
    return planned


def _known(planned: Planned, target: str) -> dict[str, object]:
    """What the device can't know: kind, operations and bytes of every op."""
    graph, placements = planned.laid.graph, planned.laid.plan.placements
    costs = {name: cost_of(graph, op, placements[name].compute[0]) for name, op in graph.ops.items()}
    constants = {
        "target": target,
        "parallel_efficiency": PARALLEL_efficiency,
        "message_seconds": MESSAGE_seconds,
    }
    return {
        "ops": {name: (cost.kind, cost.flops, cost.traffic_bytes) for name, cost in costs.items()},
        "constants": constants,
    }


def _ring(program: Program, cluster: Cluster, rank: int) -> Program:
    """The program as that of one device among others, with small transfers to the next and a large one."""
    nodes = len(cluster.nodes)
    steps: list[Step] = list(program.steps)
    left, right = (rank - 1) % nodes, (rank + 1) % nodes
    start = -(-program.arena_bytes // ALIGNMENT_bytes) * ALIGNMENT_bytes
    if nodes > 1:
        sizes = [SMALL_bytes] * SMALL_messages + [LARGE_bytes]
        recvs = [Recv(left, i * nodes + left, start, size) for i, size in enumerate(sizes)]
        sends = [Send(right, i * nodes + rank, start + LARGE_bytes, size) for i, size in enumerate(sizes)]
        steps += [*recvs, *sends, Wait(tuple(recv.tag for recv in recvs) + tuple(send.tag for send in sends))]
    return replace(
        program,
        rank=rank,
        nodes=nodes,
        name=cluster.nodes[rank].name,
        addresses=tuple(node.address for node in cluster.nodes),
        plan_hash=f"profile of {nodes}",
        arena_bytes=start + 2 * LARGE_bytes,
        steps=tuple(steps),
        peers=tuple(sorted({left, right} - {rank})),
    )


def profile_here(cluster: Cluster, out: Path, *, seconds: float, trace: Trace) -> list[Path]:
    """Measure all nodes, which are processes on this computer, for so long: OUT/NAME.toml."""
    check_makeable(out)
    with temporary_folder() as folder:
        build = folder / "build"
        write_probes(cluster, build, trace=trace)
        processes = []
        with trace.stage("measure"):
            for node in cluster.nodes:
                command = [sys.executable, "-m", "fusetile.runtime.node", "profile", str(build / "nodes" / node.name)]
                command += ["--threads", str(node.device.cores), "--seconds", str(seconds)]
                processes.append(
                    subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                )
            failed = [process.stderr.read() for process in processes if process.wait() and process.stderr]
        if failed:
            raise FusetileError(failed[0].strip().removeprefix("fusetile-runtime: error: "))
        out.mkdir(parents=True, exist_ok=True)
        made = [out / f"{node.name}.toml" for node in cluster.nodes]
        for node, path in zip(cluster.nodes, made, strict=True):
            shutil.copy(build / "nodes" / node.name / "profile.toml", path)
        return made
