"""Real nodes in a laboratory: measured step times against predicted ones, and beside PyTorch's DDP.

    python -m benchmarks.cluster --lab PATH/picluster.py [--nodes 1 2 4 6] [--batch 1 8] [--size 160]

The laboratory is a Python file that makes a cluster out of this computer: its class `Cluster(nodes, cpu, rate, ...)`
gives every node a network namespace with a shaped link and a share of a core. It needs root, cgroup v1 and iproute2. In
each cluster `fusetile-runtime profile` measures nodes and link, a plan is made by that, and the nodes train YOLOv2-16.
DDP runs where the nodes divide the batch. "foreign" is what other work took of this computer meanwhile, in cores: above
a few hundredths the times are not to be trusted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

from fusetile.cluster import Cluster, Node, local_cluster, read_cluster
from fusetile.device import read_profile
from fusetile.explain import read_plan
from fusetile.options import Training
from fusetile.pipeline import compile_model
from fusetile.profiling import write_probes
from fusetile.trace import Trace
from models import yolov2

PORT = 7300
WARM_UP = 2  # steps
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Run:
    """One line of the table, in seconds; `ddp` is None where it can't run."""

    nodes: int
    batch: int
    rule: str
    predicted: float
    measured: float
    ddp: float | None
    foreign_cores: float


def main() -> None:
    """Read the command line, run, print."""
    lines = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lines.add_argument("--lab", type=Path, required=True)
    lines.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 6])
    lines.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    lines.add_argument("--size", type=int, default=160, help="of the images")
    lines.add_argument("--steps", type=int, default=8, help="of which the first two do not count")
    lines.add_argument("--cpu", type=float, default=0.25, help="share of a core that a node has")
    lines.add_argument("--rate", default="100mbit", help="of every link, both ways")
    lines.add_argument("--wire", choices=["fp32", "fp16"], default="fp32")
    lines.add_argument("--keep", type=Path, metavar="FOLDER", help="leave profiles and the last build there")
    lines.add_argument("--no-ddp", dest="ddp", action="store_false")
    options = lines.parse_args()
    lab = load_lab(options.lab)
    console, runs = Console(width=130), []
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        onnx.save(yolov2.build(size=options.size), folder / "model.onnx")
        for nodes in options.nodes:
            with lab.Cluster(nodes, options.cpu, options.rate, ref=options.cpu) as there:
                cluster = profiled(there, nodes, folder / f"profile{nodes}")
                link = f"{8e-6 * cluster.link.bytes_per_second:.1f} Mbit/s, {1e3 * cluster.link.latency_seconds:.2f} ms"
                console.print(
                    f"{nodes} nodes: {cluster.nodes[0].flops / 1e9:.1f} GFLOP/s each, link {link}", style="dim"
                )
                for batch in options.batch:
                    runs.append(measured(there, cluster, batch, folder, options))
                    console.print(str(runs[-1]), style="dim", highlight=False)
    console.print(table(runs, options))


def load_lab(path: Path) -> Any:
    """The laboratory's module; ends with a message if it can't work here."""
    if not path.is_file():
        raise SystemExit(f"--lab {path}: there is no such file")
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise SystemExit("the laboratory needs root and iproute2 (the command ip)")
    spec = importlib.util.spec_from_file_location("lab", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"--lab {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.cgroup_base()
    except RuntimeError as error:
        raise SystemExit(f"the laboratory needs cgroup v1: {error}") from None
    return module


def on_all(there: Any, commands: Sequence[Sequence[str]]) -> None:
    """A Python command on every node at the same time; ends with the words of the first that fails."""
    environment = {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "eth0"}
    with ExitStack() as stack:
        processes = []
        for i, command in enumerate(commands):
            words = stack.enter_context(tempfile.TemporaryFile("w+"))
            line = [sys.executable, "-m", *command]
            processes.append((there.spawn(i, line, env=environment, stdout=subprocess.DEVNULL, stderr=words), words))
        while any(process.poll() is None for process, _ in processes):
            time.sleep(0.05)
            if any(process.poll() for process, _ in processes):
                break
        failed = [words for process, words in processes if process.poll()]
        if failed:
            for process, _ in processes:
                process.kill()
            failed[0].seek(0)
            raise SystemExit(failed[0].read().strip()[-1000:])


def profiled(there: Any, nodes: int, folder: Path) -> Cluster:
    """The cluster as its own profiles describe it. Nodes are alike: the profile of the middle one stands for all, with
    the medians of all that were measured of the link."""
    device = replace(local_cluster(1).nodes[0].device, cores=1)
    named = tuple(Node(f"node{i}", f"{address}:{PORT}", device) for i, address in enumerate(there.addrs))
    write_probes(Cluster(named), folder, trace=Trace())
    bundles = [folder / "nodes" / node.name for node in named]
    on_all(there, [["fusetile.runtime.node", "profile", str(bundle), "--threads", "1"] for bundle in bundles])
    paths = [bundle / "profile.toml" for bundle in bundles]
    profiles = [read_profile(path) for path in paths]
    middle = sorted(range(nodes), key=lambda i: profiles[i].device.core_flops)[nodes // 2]
    shutil.copy(paths[middle], folder / "middle.toml")
    entries = [
        f'[[node]]\nname = "{node.name}"\naddress = "{node.address}"\nprofile = "middle.toml"\n' for node in named
    ]
    (folder / "cluster.toml").write_text("".join(entries))
    found = read_cluster(folder / "cluster.toml")
    if links := [profile.link for profile in profiles if profile.link is not None]:
        rate, latency = (statistics.median(values) for values in zip(*links, strict=True))
        found = replace(found, link=replace(found.link, bytes_per_second=rate, latency_seconds=latency))
    return found


def measured(there: Any, cluster: Cluster, batch: int, folder: Path, options: argparse.Namespace) -> Run:
    """Compile, train, and the same with DDP."""
    nodes = len(cluster.nodes)
    training = Training(batch=batch, loss="mse", learning_rate=1e-4, wire=options.wire)
    build = compile_model(
        folder / "model.onnx", cluster=cluster, training=training, build=folder / "build", trace=Trace()
    )
    plan = read_plan(build)
    write_data(folder, batch)
    log, times = folder / "log.jsonl", folder / "ddp.json"
    rest = ["--data", str(folder / "data.npz"), "--steps", str(options.steps), "--threads", "1", "--quiet"]
    watch = Watch(there)
    on_all(
        there,
        [
            ["fusetile.runtime.node", str(build / "nodes" / node.name), *rest, *(["--log", str(log)] * (rank == 0))]
            for rank, node in enumerate(cluster.nodes)
        ],
    )
    foreign = watch.foreign_cores()
    ours = [json.loads(line)["seconds"] for line in log.read_text().splitlines()][WARM_UP:]
    ddp = None
    if options.ddp and batch % nodes == 0:
        words = ["benchmarks.ddp", str(folder), "mse", str(options.steps), str(times), there.addrs[0]]
        on_all(there, [[*words, str(rank), str(nodes)] for rank in range(nodes)])
        ddp = statistics.median(json.loads(times.read_text())[WARM_UP:])
    rule = plan["search"]["chosen"] if plan["search"] else "single"
    return Run(nodes, batch, rule, plan["step_seconds"], statistics.median(ours), ddp, foreign)


def write_data(folder: Path, batch: int) -> None:
    """One batch of noise for the model in the folder."""
    graph, random = onnx.load(folder / "model.onnx").graph, np.random.default_rng(0)
    shapes = [
        [dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]] for value in (*graph.input, *graph.output)
    ]
    x, y = (random.random((batch, *shape), np.float32) for shape in shapes)
    np.savez(folder / "data.npz", x=x, y=y)


class Watch:
    """What other work takes of this computer from now on."""

    def __init__(self, there: Any) -> None:
        self.there = there
        self.start = time.monotonic(), host_busy_seconds(), self._own()

    def _own(self) -> float:
        return sum(self.there.group(i).stats()["cpu_s"] for i in range(self.there.n))

    def foreign_cores(self) -> float:
        """Busy cores that were not the nodes'."""
        began, busy, own = self.start
        return max(0.0, (host_busy_seconds() - busy - self._own() + own) / (time.monotonic() - began))


def host_busy_seconds() -> float:
    """Processor seconds of this computer that were not idle, since some time. Linux counts idle time exactly, but busy
    time by ticks, which fall in step with the periods of a share of a core."""
    _, _, _, idle, waiting, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (os.cpu_count() or 1) * time.monotonic() - (idle + waiting) / os.sysconf("SC_CLK_TCK")


def table(runs: Sequence[Run], options: argparse.Namespace) -> Table:
    """Speedups are over the run with fewest nodes of the same batch."""
    made = Table(
        *("nodes", "batch", "plan", "predicted", "measured", "error", "speedup", "DDP", "its speedup", "foreign"),
        title=f"YOLOv2-16 at {options.size}, {options.cpu} cores a node, links of {options.rate}, {options.wire}",
    )
    first: dict[int, Run] = {}
    for run in runs:
        base = first.setdefault(run.batch, run)
        ddp = f"{run.ddp:.3f} s" if run.ddp else "-"
        made.add_row(
            *(str(run.nodes), str(run.batch), run.rule, f"{run.predicted:.3f} s", f"{run.measured:.3f} s"),
            *(f"{100 * (run.predicted / run.measured - 1):+.0f} %", f"{base.measured / run.measured:.2f}", ddp),
            *(f"{base.ddp / run.ddp:.2f}" if run.ddp and base.ddp else "-", f"{run.foreign_cores:.2f}"),
        )
    return made


if __name__ == "__main__":
    main()
