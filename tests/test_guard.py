"""The arena's debug mode: who writes outside of a buffer is named, and what is read there is NaN."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fusetile.errors import PlanError
from fusetile.program import Run
from tests.graphs import Net, feeds
from tests.local_cluster import LocalCluster
from tests.test_programs import build, by_key
from tests.training import training_graph


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A small network for one device, and what it is fed."""
    net = Net((2, 3, 6, 5))
    graph = net.done(net.conv(net.relu(net.conv(net.x, 8)), 8, window=1))
    folder = build(graph, tmp_path_factory.mktemp("guard"), "single", 1)
    return folder, by_key(training_graph(graph), feeds(training_graph(graph)))


def broken(folder: Path, kernel: str, pointer: int, by_bytes: int) -> LocalCluster:
    """The network with one pointer of the first call of a kernel moved."""
    (device,) = (cluster := LocalCluster(folder)).devices
    (run,) = device.program.steps
    assert isinstance(run, Run)
    number = next(i for i, call in enumerate(run.calls) if kernel in call.kernel)
    at = list(run.calls[number].pointers)
    at[pointer] += by_bytes
    wrong = replace(run.calls[number], pointers=tuple(at))
    device.program = replace(device.program, steps=(Run((*run.calls[:number], wrong, *run.calls[number + 1 :])),))
    return cluster


def test_a_good_program_passes(made: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, fed = made
    cluster = LocalCluster(folder)
    assert np.isfinite([cluster.step(fed) for _ in range(3)]).all()


@pytest.mark.parametrize(("by_bytes", "where"), [(-64, "before"), (64, "behind")])
def test_a_write_outside_is_found_with_its_kernel_and_buffer(made, by_bytes: int, where: str) -> None:
    folder, fed = made
    message = rf"elementwise_meansquarederrorgrad .* wrote up to 64 bytes {where} the buffer 'conv3'"
    with pytest.raises(PlanError, match=message):
        broken(folder, "elementwise_meansquarederrorgrad", 2, by_bytes).step(fed)


def test_a_read_outside_is_nan(made: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, fed = made
    assert np.isnan(broken(folder, "squared", 0, -128).step(fed))


def test_what_is_dead_is_nan(made: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, fed = made
    (device,) = (cluster := LocalCluster(folder)).devices
    cluster.step(fed)
    end = (len(device.program.steps), 0)
    living = [zone for zone in device.program.zones if zone.last == end]
    assert 0 < len(living) < len(device.program.zones)
    dead = np.ones(device.arena.size, bool)
    for zone in living:
        dead[zone.offset_bytes : zone.offset_bytes + zone.size_bytes] = False
    assert (device.arena[dead] == 0xFF).all()
