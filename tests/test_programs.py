"""Compiled programs with real kernels, all devices in this process: every step equals the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import fusetile.pipeline as pipeline_module
from fusetile.cluster import Cluster, Node, local_cluster
from fusetile.codegen.calls import KernelCall
from fusetile.codegen.targets import host
from fusetile.device import PROFILES
from fusetile.graph import Graph
from fusetile.onnx_import import import_onnx
from fusetile.options import Training
from fusetile.passes import pieces
from fusetile.passes.add_optimizer import Optimizer
from fusetile.pipeline import compile_graph
from fusetile.program import Buffer, Run
from fusetile.reference import evaluate
from fusetile.runtime.storage import unpack
from fusetile.trace import Trace
from models import lenet, mobilenetv2, resnet18, vgg_small, yolov2
from tests.graphs import NETWORKS, Net, feeds
from tests.local_cluster import Device, LocalCluster
from tests.onnx_tools import save
from tests.random_graphs import random_graph
from tests.training import OPTIMIZER, loss_of, training_graph, worst

TOLERANCE = 1e-4  # relative to the largest element of a tensor


def build(graph: Graph, folder: Path, plan: str, cluster: Cluster | int, **options: Any) -> Path:
    """Compile with the options that `training_graph` has, and others."""
    folder.mkdir(exist_ok=True)
    model = folder / "model.onnx"
    model.write_bytes(b"")  # an empty ONNX file stands in: nothing is imported, and only its hash is used
    training = Training(
        loss=loss_of(graph),
        batch=graph.tensors["x"].shape[0],
        learning_rate=0.05,
        plan=plan,
        guard=True,
        **({"momentum": 0.9, "weight_decay": 1e-3} | options),
    )
    cluster = local_cluster(cluster) if isinstance(cluster, int) else cluster
    return compile_graph(graph, model=model, cluster=cluster, training=training, build=folder / "build", trace=Trace())


def by_key(graph: Graph, fed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the reference is fed, under the names that programs use."""
    return {graph.targets.get(name, graph.controls.get(name, name)): value for name, value in fed.items()}


def check_steps(
    graph: Graph,
    cluster: LocalCluster,
    steps: int,
    tolerance: float = TOLERANCE,
    optimizer: Optimizer = OPTIMIZER,
) -> None:
    """Train and compare after every step; the reference goes on from its own parameters."""
    graph = training_graph(graph, optimizer=optimizer)
    state: dict[str, np.ndarray] = {}
    for step in range(1, steps + 1):
        fed = feeds(graph, seed=step) | {
            name: np.array([step], np.int32) for name, r in graph.controls.items() if r == "step"
        }
        values = evaluate(graph, fed | state)
        loss = cluster.step(by_key(graph, fed))
        state = {name: values[new] for name, new in graph.next_value.items()}
        found = {"loss": np.array([loss]), **{f"grad {name}": value for name, value in cluster.gradients.items()}}
        expected = {"loss": values[graph.loss], **{f"grad {name}": values[g] for name, g in graph.gradients.items()}}
        found |= cluster.parameters()
        assert set(found) == set(expected) | set(state)
        error, where = worst(found, expected | state)
        limit = max(tolerance * step, 3 * rounding_of(graph, fed, values) if step == 1 else 0)
        assert error < limit, f"step {step}: {where} is off by {error}"
    for device in cluster.devices:
        for shard in device.program.shards:
            assert_pads_are_zero(device, shard.buffer)


def rounding_of(graph: Graph, fed: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray]) -> float:
    """What float32 itself loses: a bias before BatchNorm has no gradient but rounding errors."""
    exact = evaluate(graph, fed, exact=True)
    return worst({name: values[name] for name in (graph.loss, *graph.gradients.values())}, exact)[0]


def assert_pads_are_zero(device: Device, buffer: Buffer) -> None:
    """Nothing may have been written into the lanes that fill up the last blocks."""
    stored = device.arena[buffer.offset_bytes :][: buffer.size_bytes].view(buffer.dtype)
    inside = unpack(device.arena, buffer, buffer.box)
    assert np.isfinite(stored).all() and np.count_nonzero(stored) == np.count_nonzero(inside), buffer.name


PLANS = [
    ("single", 1),
    ("batch", 2),
    ("batch", 3),
    ("grid:2x1", 2),
    ("grid:2x2", 4),
    ("grid:3x2", 6),
    ("channel", 2),
    ("channel", 3),
    ("auto", 3),
    ("random:1", 2),
    ("random:2", 3),
    ("random:4", 4),
]


@pytest.mark.parametrize(("plan", "nodes"), PLANS, ids=[f"{plan}-{nodes}" for plan, nodes in PLANS])
@pytest.mark.parametrize("name", NETWORKS)
def test_programs_equal_the_reference(name: str, plan: str, nodes: int, tmp_path: Path) -> None:
    graph = NETWORKS[name](3)
    check_steps(graph, LocalCluster(build(graph, tmp_path, plan, nodes)), steps=2)


@pytest.mark.parametrize(("plan", "nodes"), [("grid:2x2", 4), ("grid:3x2", 6), ("channel", 3), ("random:4", 4)])
@pytest.mark.parametrize("name", ["plain", "normalized"])
def test_convolutions_in_pieces(
    name: str, plan: str, nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut wherever they can be: borders first, or first what does not wait."""
    monkeypatch.setattr(pieces, "LEAST_HIDDEN_seconds", -inf)
    monkeypatch.setattr(pieces, "STRIP", 1)
    graph = NETWORKS[name](3)
    cluster = LocalCluster(build(graph, tmp_path, plan, nodes, halo="exchange"))
    check_steps(graph, cluster, steps=2)


def test_pieces_of_a_convolution_prepare_its_weights_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformed ones of Winograd, or turned ones of an input gradient."""
    monkeypatch.setattr(pieces, "LEAST_HIDDEN_seconds", -inf)
    net = Net((1, 32, 40, 24))
    graph = net.done(net.conv(net.relu(net.batch_norm(net.conv(net.conv(net.x, 32), 32))), 32))
    cluster = LocalCluster(build(graph, tmp_path, "grid:2x1", 2, halo="exchange"))
    runs = [step for step in cluster.devices[0].program.steps if isinstance(step, Run)]
    kernels = [call.kernel for run in runs for call in run.calls if call.op == "conv1"]
    assert ["_filter" in kernel for kernel in kernels] in ([True, False, False], [False, False])  # or not at all
    check_steps(graph, cluster, steps=1)


def test_an_optimizer_with_state_average_and_clipping(tmp_path: Path) -> None:
    graph = NETWORKS["normalized"](3)
    options: dict[str, Any] = {"weight_decay": 0.1, "clip_norm": 0.05, "ema": 0.9}
    cluster = LocalCluster(build(graph, tmp_path, "random:3", 3, optimizer="adamw", momentum=None, **options))
    check_steps(graph, cluster, steps=2, optimizer=Optimizer(kind="adamw", **options))


@pytest.mark.parametrize("seed", range(8))
def test_random_networks(seed: int, tmp_path: Path) -> None:
    graph = random_graph(seed + 200, batch=2)
    nodes, plan = ((2, "grid:2x1"), (2, "channel"), (3, "batch"), (3, f"random:{seed}"))[seed % 4]
    check_steps(graph, LocalCluster(build(graph, tmp_path, plan, nodes)), steps=1)


MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], str, int]] = {
    "lenet": (lambda: lenet.build(size=14, width=0.5, classes=5), "grid:2x1", 2),
    "vgg_small": (lambda: vgg_small.build(size=16, width=0.125, classes=3), "auto", 3),
    "resnet18": (lambda: resnet18.build(size=33, width=0.06, classes=4), "grid:2x1", 2),
    "yolov2": (lambda: yolov2.build(size=48, width=1 / 32, layers=12), "grid:2x2", 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_reduced_models(name: str, tmp_path: Path) -> None:
    make, plan, nodes = MODELS[name]
    graph = import_onnx(save(make(), tmp_path), batch=2)
    check_steps(graph, LocalCluster(build(graph, tmp_path, plan, nodes)), steps=1)


@pytest.mark.parametrize(
    ("plan", "nodes"), [("single", 1), ("grid:2x1", 2), ("batch", 2), ("channel", 2), ("random:3", 3)]
)
def test_single_channels(plan: str, nodes: int, tmp_path: Path) -> None:
    """Vectors of one element are padded to a block like all others."""
    net = Net((2, 1, 9, 8))
    x = net.leaky(net.batch_norm(net.conv(net.x, 1, bias=True)))
    x = net.relu(net.batch_norm(net.conv(x, 1), frozen=True))
    graph = net.done(net.gemm(net.flatten(net.max_pool(net.conv(x, 1, bias=True))), 1))
    graph = net.done(net.conv(x, 1, bias=True)) if plan == "grid:2x1" else graph
    check_steps(graph, LocalCluster(build(graph, tmp_path, plan, nodes)), steps=2)


@pytest.mark.parametrize(("plan", "nodes", "fused"), [("single", 1, True), ("channel", 2, True), ("batch", 2, False)])
def test_gradients_of_matrices_that_are_never_in_memory(plan: str, nodes: int, fused: bool, tmp_path: Path) -> None:
    """Those whose device needs no other's part of them; rows and columns do not fill their last blocks."""
    net = Net((3, 21, 2, 3))
    x = net.relu(net.gemm(net.flatten(net.relu(net.conv(net.x, 21, bias=True))), 44))
    graph = net.done(net.gemm(x, 21, bias=False))
    cluster = LocalCluster(build(graph, tmp_path, plan, nodes))
    gradients = [gradient for device in cluster.devices for gradient in device.program.gradients]
    assert sum(gradient.factor is not None for gradient in gradients) == (2 * nodes if fused else 0)
    check_steps(graph, cluster, steps=2)


@pytest.mark.slow
def test_reduced_mobilenetv2(tmp_path: Path) -> None:
    """With BatchNorm frozen: over the 8 values that maps of 2x2 have, 52 of them in a row amplify rounding errors."""
    path = save(mobilenetv2.build(size=40, width=0.2, classes=4), tmp_path)
    graph = import_onnx(path, batch=2, bn="frozen")
    check_steps(graph, LocalCluster(build(graph, tmp_path, "grid:2x1", 2)), steps=1)


def test_a_plan_from_a_file_gives_the_same_programs(tmp_path: Path) -> None:
    graph = NETWORKS["plain"](3)
    first = LocalCluster(build(graph, tmp_path, "random:3", 3))
    saved = tmp_path / "plan.json"
    saved.write_bytes((tmp_path / "build" / "plan.json").read_bytes())
    again = LocalCluster(build(graph, tmp_path, str(saved), 3))
    for one, other in zip(first.devices, again.devices, strict=True):
        assert one.program.steps == other.program.steps and one.program.shards == other.program.shards
    check_steps(graph, again, steps=1)


def test_losses_of_several_steps(tmp_path: Path) -> None:
    """Momentum and weight decay over six steps."""
    graph = NETWORKS["plain"](4)
    check_steps(graph, LocalCluster(build(graph, tmp_path, "grid:2x1", 2)), steps=6)


def run(build_folder: Path, graph: Graph, threads: int) -> list[bytes]:
    """Bits of the losses, gradients and parameters of three steps."""
    cluster, bits = LocalCluster(build_folder, threads), []
    for step in range(1, 4):
        values = by_key(graph, feeds(graph, seed=step))
        bits += [np.float32(cluster.step(values)).tobytes()]
        bits += [value.tobytes() for _, value in sorted(cluster.gradients.items())]
    return bits + [value.tobytes() for _, value in sorted(cluster.parameters().items())]


@pytest.mark.parametrize("name", NETWORKS)
def test_bits_do_not_depend_on_threads_or_on_the_run(name: str, tmp_path: Path) -> None:
    graph = NETWORKS[name](3)
    folder = build(graph, tmp_path, "grid:2x1", 2)
    first = run(folder, training_graph(graph), threads=1)
    assert run(folder, training_graph(graph), threads=1) == first
    for threads in (2, 3):
        assert run(folder, training_graph(graph), threads=threads) == first


def cluster_of(*targets: str) -> Cluster:
    """Devices of this computer, with kernels for the CPUs named."""
    device = replace(PROFILES["host"], cores=1)
    return Cluster(tuple(Node(f"n{i}", f"h:{i + 1}", replace(device, target=t)) for i, t in enumerate(targets)))


@pytest.mark.parametrize("targets", [("avx2", "avx2"), ("avx512", "avx512"), ("avx512", "avx2")], ids="-".join)
@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_of_8_and_of_16_and_kinds_of_device_mixed(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    if "avx512" in targets and host().name != "avx512":
        pytest.skip("this computer has no AVX-512")
    if host().name not in ("avx512", "avx2"):
        pytest.skip("this computer is no x86-64")
    graph = NETWORKS[name](2)
    for plan in ("channel", "grid:2x1"):
        cluster = LocalCluster(build(graph, tmp_path, plan, cluster_of(*targets)))
        libraries = {device.program.library for device in cluster.devices}
        assert len(libraries) == len(set(targets))
        blocks = {max(s.buffer.block) for device in cluster.devices for s in device.program.shards}
        assert max(blocks) == (16 if set(targets) == {"avx512"} else 8)
        check_steps(graph, cluster, steps=1)


def test_uneven_devices(tmp_path: Path) -> None:
    graph = NETWORKS["normalized"](2)
    fast = replace(PROFILES["host"], core_flops=110e9)
    nodes = tuple(Node(f"n{i}", f"h:{i + 1}", device) for i, device in enumerate((fast, PROFILES["host"])))
    check_steps(graph, LocalCluster(build(graph, tmp_path, "grid:2x1", Cluster(nodes))), steps=1)


# -- the comparison sees mistakes ------------------------------------------------------------------------------------


def test_a_kernel_call_left_out_is_seen(tmp_path: Path) -> None:
    graph = NETWORKS["plain"](3)
    cluster = LocalCluster(build(graph, tmp_path, "grid:2x1", 2))
    device = cluster.devices[0]
    whole_program = device.program
    for index, step in enumerate(whole_program.steps):
        if isinstance(step, Run) and step.calls:
            steps = (*whole_program.steps[:index], Run(step.calls[:-1]), *whole_program.steps[index + 1 :])
            break
    device.program = replace(whole_program, steps=steps)
    with pytest.raises(AssertionError):
        check_steps(graph, cluster, steps=1)


def test_strict_numerics_reach_every_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the option to the kernels: F(4x4) is used unless it is forbidden."""
    used: dict[str, set[str]] = {}

    def kernels(build: Path, *, laid: Any, training: Training, **rest: Any) -> None:
        symbols = {step.kernel.symbol for draft in laid.drafts for step in draft.steps if isinstance(step, KernelCall)}
        used[training.numerics] = {symbol[:9] for symbol in symbols if symbol.startswith("winograd")}

    monkeypatch.setattr(pipeline_module, "write_bundle", kernels)
    for numerics in ("fast", "strict"):
        net = Net((1, 96, 20, 20))
        build(net.done(net.conv(net.conv(net.x, 96), 96)), tmp_path, "single", 1, numerics=numerics)
    assert used == {"fast": {"winograd4"}, "strict": {"winograd2"}}
