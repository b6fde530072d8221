"""`fusetile simulate`: predictions agree with each other; programs that are rehearsed here compute the right loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusetile import rehearsal
from fusetile.cluster import Cluster, Link, local_cluster
from fusetile.options import Training
from fusetile.runtime.storage import unpack
from fusetile.simulation import Prediction, simulate_model
from fusetile.trace import Trace
from models import lenet
from tests.commands import fusetile, save

PI3 = local_cluster(2, target="pi3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(lenet.build(size=16, classes=5, width=0.5), tmp_path_factory.mktemp("model") / "model.onnx")


def predicted(
    model: Path, cluster: Cluster, *, plan: str = "batch", traced: bool = False, **options: Any
) -> Prediction:
    training = Training(batch=4, plan=plan, **options)
    return simulate_model(model, cluster=cluster, training=training, traced=traced, trace=Trace())


def test_the_command_prints_what_adds_up(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(model.parent.iterdir())
    options = ("--nodes", 3, "--target", "pi3", "--batch", 4)
    assert fusetile("simulate", model, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["source"] == "profiles" and len(found["nodes"]) == 3
    for node in found["nodes"]:
        assert node["compute_seconds"] + node["wait_seconds"] == pytest.approx(found["step_seconds"])
        assert 0 < node["arena_bytes"] < node["memory_bytes"]
    assert found["speedup_over_one_core"] > found["speedup_over_one_device"] > 0
    assert fusetile("simulate", model, *options) == 0
    assert "times as fast as node0 alone" in capsys.readouterr().out
    assert sorted(model.parent.iterdir()) == before


def test_one_device_alone_is_one_times_as_fast_and_slower_links_are_slower(model: Path) -> None:
    alone = predicted(model, local_cluster(1, target="pi3"), plan="single")
    assert alone.step_seconds == pytest.approx(alone.one_device_seconds)
    slow = Cluster(PI3.nodes, Link(1e5, 1e-3))
    assert predicted(model, slow).step_seconds > 2 * predicted(model, PI3).step_seconds


def test_samples_that_one_device_sends_and_batches_of_a_step_take_time(model: Path) -> None:
    slow = Cluster(PI3.nodes, Link(1e6, 1e-3))
    plain, fed = predicted(model, slow), predicted(model, slow, source="node1")
    more = fed.nodes[1].send_seconds - plain.nodes[1].send_seconds
    assert more > 2 * 16 * 16 * 4 / 1e6 and fed.nodes[0].send_seconds == plain.nodes[0].send_seconds
    assert plain.step_seconds <= fed.step_seconds < plain.step_seconds + 2 * more, "it goes where the link is idle"
    three = predicted(model, slow, accumulate=3)
    assert plain.step_seconds < three.step_seconds < 3 * plain.step_seconds, "weights are sent once"
    assert 3 <= three.one_device_seconds / plain.one_device_seconds < 4, "gradients are added up"
    for node in three.nodes:
        assert node.compute_seconds + node.wait_seconds == pytest.approx(three.step_seconds)


def test_a_trace_is_scaled_to_the_profiles(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With times that do not depend on the computer: devices twice as fast compute in half the time."""
    losses: list[float] = []

    def step(actors: list[rehearsal._Actor]) -> None:
        real_step(actors)
        for actor in actors:
            loss = actor.program.loss
            assert loss is not None
            losses.append(unpack(actor.arena, loss, loss.box).item())

    def timed(segment: rehearsal.Segment, start: int, stop: int) -> float:
        segment(start, stop)
        return 1e-3 * (stop - start)

    real_step = rehearsal.step
    monkeypatch.setattr(rehearsal, "step", step)
    monkeypatch.setattr(rehearsal, "_timed", timed)
    found = predicted(model, PI3, traced=True)
    assert found.source == "trace" and len(losses) == 3 * (1 + 2)
    assert all(0 < loss < 10 for loss in losses) and losses[-1] == losses[-2], "both devices log the whole batch's loss"
    device = PI3.nodes[0].device
    device = replace(device, core_flops=2 * device.core_flops, bandwidth=2 * device.bandwidth)
    fast = Cluster(tuple(replace(node, device=device) for node in PI3.nodes), PI3.link)
    for slow, quick in zip(found.nodes, predicted(model, fast, traced=True).nodes, strict=True):
        assert quick.compute_seconds == pytest.approx(slow.compute_seconds / 2)
