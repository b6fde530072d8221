"""Whole nodes as real processes over TCP on 127.0.0.1: results, failures, mistakes, stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusetile.philox import permutation
from fusetile.program import SCHEMA_VERSION, Program
from fusetile.runtime import safetensors
from fusetile.runtime.node import main
from tests.runtime import toy

SLOW = {"nap_us": 20_000_000, "nap_step": 3}  # rank 1 is inside a kernel of step 3 when something happens to it
Start = Callable[..., "Cluster"]


class Cluster:
    """The processes of one run. `finish` gives (exit status, stderr) of each, by rank."""

    def __init__(self, folder: Path, nodes: list[subprocess.Popen[str]]) -> None:
        self.folder, self.nodes = folder, nodes

    def finish(self, *ranks: int, timeout: float = 20) -> list[tuple[int, str]]:
        ranks = ranks or tuple(range(len(self.nodes)))
        ends = [(self.nodes[rank].communicate(timeout=timeout)[1], self.nodes[rank].returncode) for rank in ranks]
        return [(status, stderr) for stderr, status in ends]

    def log(self, rank: int) -> list[dict[str, Any]]:
        path = self.folder / f"{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def reach(self, steps: int, rank: int = 0) -> None:
        """Wait until a node has logged so many steps, and is well inside the next."""
        end = time.monotonic() + 15
        while len(self.log(rank)) < steps:
            assert time.monotonic() < end and self.nodes[rank].poll() is None, self.nodes[rank].communicate()
            time.sleep(0.02)
        time.sleep(0.1)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.build_library(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def start(tmp_path: Path, library: Path) -> Iterator[Start]:
    """Start a run of some nodes; `change(program)` may alter the programs, `without` leaves ranks out."""
    running: list[subprocess.Popen[str]] = []

    def start_nodes(
        count: int,
        *options: str,
        change: Callable[[Program], Program] = lambda program: program,
        without: tuple[int, ...] = (),
        deadline: float = 2,
        **arguments: int,
    ) -> Cluster:
        addresses = toy.free_addresses(count)
        toy.write_data(tmp_path / "data.npz")
        nodes = []
        for rank in range(count):
            made = change(toy.program(rank, addresses, **arguments))
            bundle = toy.write_bundle(tmp_path, made, library)
            own = ("--log", str(tmp_path / f"{rank}.jsonl"), "--deadline", str(deadline), *options)
            if rank not in without:
                nodes.append(toy.launch(bundle, tmp_path / "data.npz", *own))
        running.extend(nodes)
        return Cluster(tmp_path, nodes)

    yield start_nodes
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()


def expected(steps: int, *, shuffle: bool = True, batch: int = 8) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Losses, last gradient and final weights of the toy's training."""
    x = np.random.default_rng(0).integers(-8, 8, (40, toy.COLUMNS)).astype(np.float32)
    w, losses, gradient = toy.start_weights(), [], np.zeros(toy.COLUMNS, np.float32)
    for step in range(steps):
        epoch, position = divmod(step, 40 // batch)
        order = permutation(seed=3, epoch=epoch, count=40) if shuffle else np.arange(40)
        gradient = x[order[position * batch : (position + 1) * batch]].sum(axis=0)
        losses.append(float(gradient.sum()))
        w = w - np.float32(toy.LEARNING_RATE) * gradient
    return losses, gradient, w


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_run_on_any_number_of_nodes_is_the_same(start: Start, tmp_path: Path, count: int) -> None:
    cluster = start(count, "--steps", "7", "--save-gradients", str(tmp_path / "g.npz"), blob_bytes=300_000, deadline=30)
    assert cluster.finish() == [(0, "")] * count
    losses, gradient, w = expected(7)
    for rank in range(count):
        assert [record["loss"] for record in cluster.log(rank)] == losses
        assert [record["step"] for record in cluster.log(rank)] == list(range(1, 8))
        assert {record["samples"] for record in cluster.log(rank)} == {8}
    arrays, metadata = safetensors.load(tmp_path / "a" / "run" / "trained.safetensors")
    assert metadata == {"model_hash": "model-1", "plan_hash": "plan-1", "steps": "7"}
    np.testing.assert_array_equal(arrays["weight"], w)
    np.testing.assert_array_equal(np.load(tmp_path / "g.npz")["weight"], gradient)
    assert sorted(path.name for path in (tmp_path / "a" / "run").iterdir()) == ["trained.safetensors"]


def test_an_epoch_in_order_is_the_default_length(start: Start, tmp_path: Path) -> None:
    cluster = start(2, "--no-shuffle", "--out", str(tmp_path / "deep" / "out"), deadline=30)
    assert cluster.finish() == [(0, "")] * 2
    assert [record["loss"] for record in cluster.log(0)] == expected(5, shuffle=False)[0]
    assert (tmp_path / "deep" / "out" / "trained.safetensors").exists()


def test_a_killed_node_ends_the_others_at_once(start: Start) -> None:
    cluster = start(3, "--steps", "9", **SLOW)
    cluster.reach(2)
    cluster.nodes[1].kill()
    began = time.monotonic()
    ends = cluster.finish(0, 2)
    assert time.monotonic() - began < 3
    for (status, message), name in zip(ends, "ac", strict=True):
        assert status == 1 and message.count("\n") == 1
        assert "node 'b' (rank 1, 127.0.0.1:" in message and f"node {name!r}" in message
        assert "at step 3, waiting for transfer" in message and "from 'b'" in message
    assert not (cluster.folder / "a" / "run" / "trained.safetensors").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_node_ends_the_others_by_the_deadline(start: Start, victim: int) -> None:
    cluster = start(3, "--steps", "9", **SLOW)
    cluster.reach(2, rank=2)
    cluster.nodes[victim].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    others = [rank for rank in range(3) if rank != victim and not (victim == 0 and rank == 1)]
    for status, message in cluster.finish(*others):
        assert status == 1
        assert f"node {'ab'[victim]!r} (rank {victim}," in message and "sent nothing for" in message
        assert "at step 3" in message
    assert 1 < time.monotonic() - began < 6
    cluster.nodes[victim].send_signal(signal.SIGCONT)
    if victim == 0:
        assert cluster.finish(0)[0][0] == 1  # it wakes, hears that the others are gone, and ends as well


def test_a_node_stuck_in_a_kernel_is_told_apart_from_those_that_wait_for_it(start: Start) -> None:
    cluster = start(3, "--steps", "9", **SLOW)
    cluster.reach(2)
    ends = cluster.finish(timeout=15)
    for status, message in ends:
        assert status == 1 and "node 'b' (rank 1," in message and "made no progress for" in message


@pytest.mark.parametrize(("number", "expected_status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_node_says_so_to_the_others(start: Start, number: int, expected_status: int) -> None:
    cluster = start(3, "--steps", "100000", deadline=10)
    cluster.reach(2)
    cluster.nodes[1].send_signal(number)
    (a_status, a_message), (b_status, b_message), (c_status, c_message) = cluster.finish()
    assert (a_status, b_status, c_status) == (1, expected_status, 1)
    assert f"stopped by {signal.Signals(number).name} at step" in b_message
    for message in (a_message, c_message):
        assert "node 'b' (rank 1, " in message and "was stopped by its user at step" in message
    assert not (cluster.folder / "a" / "run" / "trained.safetensors").exists()


def test_a_single_node_stops_cleanly(start: Start) -> None:
    cluster = start(1, "--steps", "1000000")
    cluster.reach(2)
    cluster.nodes[0].send_signal(signal.SIGTERM)
    assert cluster.finish() == [(143, "fusetile-runtime: error: stopped by SIGTERM\n")]


def test_a_node_that_waits_for_others_can_be_stopped(start: Start) -> None:
    cluster = start(2, without=(1,))
    assert cluster.nodes[0].stdout is not None
    assert "waits for" in cluster.nodes[0].stdout.readline()
    cluster.nodes[0].send_signal(signal.SIGINT)
    assert cluster.finish() == [(130, "fusetile-runtime: error: stopped by SIGINT\n")]


def test_a_node_that_never_comes(start: Start) -> None:
    cluster = start(3, "--connect-timeout", "1", without=(1,))
    for status, message in cluster.finish():
        assert status == 1 and "no connection with rank 1 (127.0.0.1:" in message and "--connect-timeout" in message


def test_bundles_of_different_plans(start: Start) -> None:
    def change(program: Program) -> Program:
        return replace(program, plan_hash="plan-2") if program.rank == 1 else program

    for status, message in start(2, change=change).finish():
        assert status == 2
        assert "plan-1" in message and "plan-2" in message and "'a'" in message and "'b'" in message


def test_different_options_are_refused(start: Start, tmp_path: Path, library: Path) -> None:
    addresses = toy.free_addresses(2)
    toy.write_data(tmp_path / "data.npz")
    nodes = [
        toy.launch(
            toy.write_bundle(tmp_path, toy.program(rank, addresses), library), tmp_path / "data.npz", "--steps", n
        )
        for rank, n in enumerate(("10", "11"))
    ]
    for status, message in Cluster(tmp_path, nodes).finish():
        assert status == 2 and "steps = 10" in message and "steps = 11" in message


def test_port_in_use(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        cluster = start(
            2, change=lambda program: replace(program, addresses=(taken, program.addresses[1])), without=(1,)
        )
        ((status, message),) = cluster.finish()
    assert status == 2 and taken in message and "another program uses this port" in message


def test_a_stranger_on_the_port_is_ignored(start: Start) -> None:
    addresses: list[str] = []

    def change(program: Program) -> Program:
        addresses.append(program.addresses[0])
        return program

    cluster = start(2, change=change, without=(1,), deadline=30)
    host, port = addresses[0].split(":")
    end = time.monotonic() + 10
    while True:
        try:
            stranger = socket.create_connection((host, int(port)))
            break
        except ConnectionRefusedError:
            assert time.monotonic() < end
    with stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: me\r\n\r\n")
        second = toy.launch(cluster.folder / "b", cluster.folder / "data.npz")
        cluster.nodes.append(second)
        assert cluster.finish() == [(0, "")] * 2


def test_no_thread_port_or_file_is_left(start: Start) -> None:
    addresses: list[str] = []

    def change(program: Program) -> Program:
        addresses[:] = program.addresses
        return program

    cluster = start(2, "--steps", "9", change=change, **SLOW)
    cluster.reach(2)
    cluster.nodes[1].kill()
    cluster.finish()
    for address in addresses:
        host, port = address.split(":")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, int(port)))
    assert not list(cluster.folder.rglob("*.part"))
    assert all(not os.path.exists(f"/proc/{node.pid}") for node in cluster.nodes)


class Proxy:
    """A line between two devices that can be cut without anybody being told: bytes are no longer passed on."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            near, _ = self._listener.accept()
            host, port = self._target.split(":")
            try:
                far = socket.create_connection((host, int(port)))
            except ConnectionRefusedError:
                near.close()
                continue
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):  # a side has ended: its node says so itself
            while data := source.recv(65536):
                if self.cut.is_set():
                    time.sleep(60)
                target.sendall(data)
        target.close()


def test_a_cut_line_ends_both_sides_by_the_deadline(start: Start) -> None:
    proxies: list[Proxy] = []

    def change(program: Program) -> Program:
        if program.rank == 0:
            proxies.append(Proxy(program.addresses[0]))
            return program
        return replace(program, addresses=(proxies[0].address, program.addresses[1]))

    cluster = start(2, "--steps", "100000", change=change)
    cluster.reach(2)
    proxies[0].cut.set()
    began = time.monotonic()
    for (status, message), other in zip(cluster.finish(), "ba", strict=True):
        assert status == 1 and f"node {other!r}" in message and "sent nothing for 2." in message
        assert "at step" in message and "waiting for transfer" in message
    assert 1.5 < time.monotonic() - began < 6


def test_a_bundle_started_twice(start: Start) -> None:
    """On another device, where its port is free: the second is told, the run goes on."""
    cluster = start(3, "--connect-timeout", "8", without=(1,), deadline=30)
    bundle = cluster.folder / "c2"
    bundle.mkdir()
    for file in (cluster.folder / "c").iterdir():
        if file.is_file():
            os.link(file, bundle / file.name)
    assert cluster.nodes[1].stdout is not None
    cluster.nodes[1].stdout.readline()
    time.sleep(0.5)  # it has connected to rank 0
    second = toy.launch(bundle, cluster.folder / "data.npz")
    message = second.communicate(timeout=10)[1]
    assert second.returncode != 0
    assert "node 'c' (rank 2," in message and "is its bundle started twice?" in message
    cluster.nodes.append(toy.launch(cluster.folder / "b", cluster.folder / "data.npz"))
    assert cluster.finish() == [(0, "")] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "missing.npz"], "there is no data file missing.npz"),
        (["--data", "data.npz", "--log", "nowhere/log.jsonl"], "can't write to the folder nowhere"),
        (["--data", "data.npz", "--save-gradients", "nowhere/g.npz"], "can't write to the folder nowhere"),
        (["--data", "data.npz", "--save-gradients", "."], "there is a folder of that name"),
        (["--data", "data.npz", "--out", "data.npz/out"], "can't make the folder data.npz/out"),
    ],
)
def test_mistakes_of_the_user(
    tmp_path: Path,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    toy.write_data(tmp_path / "data.npz")
    bundle = toy.write_bundle(tmp_path, toy.program(0, ("127.0.0.1:1",)), library)
    assert main([str(bundle), *options]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("fusetile-runtime: error: ") and message in stderr and stderr.count("\n") == 1


def test_folders_that_are_no_bundles(tmp_path: Path, library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.write_data(tmp_path / "data.npz")
    assert main([str(tmp_path), "--data", str(tmp_path / "data.npz")]) == 2
    assert "is not a bundle: there is no program.json" in capsys.readouterr().err
    bundle = toy.write_bundle(tmp_path, toy.program(0, ("127.0.0.1:1",)), library)
    whole = (bundle / "program.json").read_text()
    for damaged in (
        whole[:200],
        whole.replace(f'"schema": {SCHEMA_VERSION}', '"schema": 99'),
        "[]",
        whole.replace('"rank"', '"range"'),
    ):
        (bundle / "program.json").write_text(damaged)
        assert main([str(bundle), "--data", str(tmp_path / "data.npz")]) == 2
        assert "can't read" in capsys.readouterr().err
    (bundle / "program.json").write_text(whole)
    (bundle / "kernels-toy.so").unlink()
    assert main([str(bundle), "--data", str(tmp_path / "data.npz")]) == 2
    assert "can't load the kernels" in capsys.readouterr().err
