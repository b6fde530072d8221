"""`fusetile profile`: fits find what they should, and what is measured reaches the planner."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fusetile.cluster import Link, read_cluster
from fusetile.cost import Cost, kind_of, seconds_on
from fusetile.errors import UserError
from fusetile.onnx_import import import_onnx
from fusetile.runtime.profile_file import LinkSpeed, Measured, Probe, fit, toml
from models import lenet, probe
from tests.commands import fusetile, save
from tests.training import training_graph

FLOPS, BANDWIDTH, OVERHEAD = 2e9, 5e8, 1e-4
WORK = [(1e6, 1e4), (3e7, 2e6), (5e8, 1e6), (2e7, 3e7), (1e9, 5e7)]


def exact(kind: str, flops: float, traffic_bytes: float) -> Probe:
    return Probe(kind, flops, traffic_bytes, OVERHEAD + flops / FLOPS + traffic_bytes / BANDWIDTH)


def measured(link: LinkSpeed | None = None) -> Measured:
    return Measured(
        name="kitchen",
        nodes=2,
        target="pi4",
        threads=4,
        probes=[exact(kind, *work) for kind in ("conv 3x3", "conv_weight_grad 3x3") for work in WORK],
        scale=1.0,
        copy_bandwidth=3e9,
        link=link,
        parallel_efficiency=0.9,
        message_seconds=1e-4,
    )


def cluster_toml(folder: Path, *names: str, more: str = "") -> Path:
    nodes = [
        f'[[node]]\nname = "{n}"\naddress = "127.0.0.1:73{i:02}"\nprofile = "{n}.toml"\n' for i, n in enumerate(names)
    ]
    path = folder / "cluster.toml"
    path.write_text("".join(nodes) + more)
    return path


def test_a_fit_finds_rates_and_overhead() -> None:
    found = fit([exact("conv", *work) for work in WORK], computes=True)
    assert (found.flops, found.bandwidth, found.overhead_seconds) == pytest.approx((FLOPS, BANDWIDTH, OVERHEAD))
    assert found.error < 1e-9
    moving = fit(
        [Probe("max_pool", 1e12, size, size / BANDWIDTH + OVERHEAD) for size in (1e5, 1e6, 1e7)], computes=False
    )
    assert moving.flops == float("inf") and moving.bandwidth == pytest.approx(BANDWIDTH)
    one = fit([Probe("conv", 1e6, 1e9, 2e-3)], computes=True)
    assert one.flops == pytest.approx(5e8) and one.overhead_seconds == 0


def test_a_fit_is_never_negative() -> None:
    found = fit([Probe("conv", flops, 1e9 / flops, flops / FLOPS) for flops in (1e3, 1e5, 1e7, 1e8)], computes=True)
    assert found.flops > 0 and found.bandwidth > 0 and found.overhead_seconds >= 0


def test_the_planner_reads_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "kitchen.toml").write_text(toml(measured(LinkSpeed(5e6, 1.1e-3, 2e-4, 1e-9))))
    (tmp_path / "attic.toml").write_text(toml(measured(LinkSpeed(6e6, 2.1e-3, 2e-4, 1e-9))))
    cluster = read_cluster(cluster_toml(tmp_path, "kitchen", "attic"))
    node = cluster.nodes[0]
    assert cluster.link == Link(pytest.approx(5e6), pytest.approx(2e-3)), "the slowest of each"
    assert seconds_on(Cost("conv 3x3", 4e7, 1e6), node) == pytest.approx(OVERHEAD + 0.02 + 0.002, rel=1e-3)
    assert seconds_on(Cost("conv 3x3", 0, 0), node) == 0
    assert seconds_on(Cost("max_pool", 1.0, 6e6), node) == pytest.approx(2e-3), "not measured: the general rate"
    assert node.device.messaging.message_seconds == pytest.approx(2e-4)
    half = node.device.with_cores(2)
    assert dict(half.speeds)["conv 3x3"].flops == pytest.approx(FLOPS / 2, rel=1e-3)
    given = read_cluster(cluster_toml(tmp_path, "kitchen", more='[link]\nrate = "1Gbit/s"\n'))
    assert given.link.bytes_per_second == 125e6


@pytest.mark.parametrize(
    ("content", "saying"),
    [
        (None, "kitchen.toml: No such file.*fusetile-runtime profile"),
        ("version = [", "kitchen.toml: not a TOML file"),
        ("version = 99", "not a profile of version 1"),
        ('version = 1\nname = "kitchen"', "not a whole profile.*target"),
        (toml(measured()).replace("cores = 4", "cores = 0"), "not a whole profile.*cores = 0"),
        (toml(measured()) + '[messaging]\nbyte_seconds = "few"\n', "not a whole profile.*few"),
    ],
)
def test_broken_profiles_are_refused(content: str | None, saying: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "kitchen.toml").write_text(content)
    with pytest.raises(UserError, match=saying):
        read_cluster(cluster_toml(tmp_path, "kitchen"))


def test_a_profile_and_a_device_are_too_much(tmp_path: Path) -> None:
    path = cluster_toml(tmp_path, "kitchen", more='device = "pi3"\n')
    with pytest.raises(UserError, match="a profile says what device would"):
        read_cluster(path)


def test_the_probe_has_convolutions_of_all_kinds(tmp_path: Path) -> None:
    """Each of them at several sizes, or there would be nothing to fit."""
    graph = training_graph(import_onnx(save(probe.build(), tmp_path / "probe.onnx"), batch=1))
    counts = Counter(kind_of(graph, op) for op in graph.ops.values())
    for family in ("conv", "conv_input_grad", "conv_weight_grad"):
        for sort, least in (("3x3", 10), ("1x1", 5), ("grouped", 3), ("other", 3)):
            assert counts[f"{family} {sort}"] >= least, (family, sort)
    assert counts["conv few"] >= 2 and counts["conv_weight_grad few"] >= 2


def test_measuring_this_computer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes, with a small network: kernels, link and processor time are found, and a plan is made of them."""
    model = lenet.build(size=16, classes=5, width=0.5)
    monkeypatch.setattr(probe, "build", lambda: model)
    assert fusetile("profile", "--nodes", 2, "--here", "--seconds", 0.05, "-o", tmp_path / "out") == 0
    cluster = read_cluster(cluster_toml(tmp_path / "out", "node0", "node1"))
    for node in cluster.nodes:
        kinds = dict(node.device.speeds)
        assert {"max_pool", "update"} < set(kinds) and any(kind.startswith("conv_weight_grad") for kind in kinds)
        assert node.device.messaging.message_seconds > 0
    assert 1e5 < cluster.link.bytes_per_second < 1e11
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert fusetile("simulate", tmp_path / "model.onnx", "--cluster", tmp_path / "out" / "cluster.toml") == 0
    assert fusetile("profile", "--nodes", 2, "--target", "pi3", "--here", "-o", tmp_path / "no") == 2
