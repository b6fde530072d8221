"""Hand-made bundles for the runtime's tests: a training that numpy can follow, on any number of nodes.

The batch of x [batch, COLUMNS] is split over the nodes. Each sums its rows, sends the sums to all others, adds what
comes in rank order; the total is the loss, the sums are the gradient of w [COLUMNS], of which each node owns a part.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from fusetile.box import Box
from fusetile.program import Buffer, Call, Feed, Gradient, Program, Recv, Run, Send, Shard, Wait, to_json
from fusetile.rates import Rates
from fusetile.runtime import safetensors

COLUMNS = 12
LEARNING_RATE = 0.125
SOURCE = Path(__file__).with_suffix(".c")


def build_library(folder: Path) -> Path:
    """Compile toy.c."""
    compiler = [shutil.which("cc")] if shutil.which("cc") else [sys.executable, "-m", "ziglang", "cc"]
    path = folder / "kernels-toy.so"
    subprocess.run([*map(str, compiler), "-O2", "-shared", "-fPIC", "-o", str(path), str(SOURCE)], check=True)
    return path


def free_addresses(count: int) -> tuple[str, ...]:
    """Addresses on this machine at which nobody listens."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = tuple(f"127.0.0.1:{listener.getsockname()[1]}" for listener in sockets)
    for listener in sockets:
        listener.close()
    return addresses


@dataclass
class Memory:
    """An arena that grows."""

    size: int = 0

    def buffer(self, name: str, box: Box, dtype: str = "float32") -> Buffer:
        buffer = Buffer(name, box, dtype, offset_bytes=self.size)
        self.size += -(-buffer.size_bytes // 64) * 64
        return buffer


def split(size: int, parts: int) -> list[tuple[int, int]]:
    """[0, size) in equal parts, the last ones shorter."""
    cuts = [size * part // parts for part in range(parts + 1)]
    return list(pairwise(cuts))


def program(
    rank: int, addresses: tuple[str, ...], *, batch: int = 8, blob_bytes: int = 0, nap_us: int = 0, nap_step: int = 0
) -> Program:
    """The program of one node. With `blob_bytes` each node also sends a block of that size to the next one, queued
    before the sums, with low priority. `nap_us` makes the second rank slow in step `nap_step` (0: in each)."""
    nodes = len(addresses)
    memory = Memory()
    rows = split(batch, nodes)[rank]
    part = split(COLUMNS, nodes)[rank]
    x = memory.buffer("x", (rows, (0, COLUMNS)))
    rate, step = memory.buffer("rate", ()), memory.buffer("step", (), "int32")
    mine, sums = memory.buffer("mine", ((0, COLUMNS),)), memory.buffer("sums", ((0, COLUMNS),))
    others = {peer: memory.buffer(f"from{peer}", ((0, COLUMNS),)) for peer in range(nodes) if peer != rank}
    loss, w = memory.buffer("loss", ()), memory.buffer("w", (part,))
    blobs = [memory.buffer(name, ((0, blob_bytes // 4),)) for name in ("blob_out", "blob_in")] if blob_bytes else []
    size = mine.size_bytes
    steps: list[Run | Send | Recv | Wait] = [
        Recv(peer, _tag(peer, rank), buffer.offset_bytes, size) for peer, buffer in others.items()
    ]
    if blobs and nodes > 1:
        after, before = (rank + 1) % nodes, (rank - 1) % nodes
        steps += [
            Recv(before, 1000 + before, blobs[1].offset_bytes, blob_bytes),
            Send(after, 1000 + rank, blobs[0].offset_bytes, blob_bytes, priority=9),
        ]
    calls = [Call("column_sum", COLUMNS, (x.offset_bytes, mine.offset_bytes), (rows[1] - rows[0], COLUMNS))]
    if nap_us and rank == 1:
        calls.append(Call("nap", 1, (step.offset_bytes,), (nap_us, nap_step)))
    steps.append(Run(tuple(calls)))
    steps += [Send(peer, _tag(rank, peer), mine.offset_bytes, size) for peer in others]
    if others:
        steps.append(Wait(tuple(_tag(peer, rank) for peer in others)))
    contributions = {**others, rank: mine}
    adds = [
        Call("add", COLUMNS, (contributions[source].offset_bytes, sums.offset_bytes))
        for source in sorted(contributions)
    ]
    gradient = replace(sums, box=(part,), offset_bytes=sums.offset_bytes + 4 * part[0])
    update = Call("sgd", part[1] - part[0], (w.offset_bytes, gradient.offset_bytes, rate.offset_bytes))
    zero = Call("scale", COLUMNS, (sums.offset_bytes, sums.offset_bytes), floats=(0.0,))
    steps.append(
        Run((zero, *adds, Call("total", 1, (sums.offset_bytes, loss.offset_bytes), (COLUMNS,)), update)),
    )
    return Program(
        rank=rank,
        nodes=nodes,
        name=chr(ord("a") + rank),
        addresses=addresses,
        plan_hash="plan-1",
        model_hash="model-1",
        library="kernels-toy.so",
        batch=batch,
        seed=3,
        arena_bytes=memory.size,
        steps=tuple(steps),
        feeds=(
            Feed("input", "image", (batch, COLUMNS), x),
            Feed("learning_rate", "", (), rate),
            Feed("step", "", (), step),
        ),
        shards=(Shard("w", "weight", (COLUMNS,), False, (part,), w),),
        gradients=(Gradient("w", "weight", (COLUMNS,), False, (part,), gradient, len(steps) - 1, 2 + len(adds)),),
        loss=loss,
        rates=Rates(learning_rate=LEARNING_RATE),
        peers=tuple(others),
    )


def _tag(source: int, target: int) -> int:
    return 100 * source + target


def start_weights() -> np.ndarray:
    """w before the training."""
    return np.arange(COLUMNS, dtype=np.float32) / 4


def write_bundle(folder: Path, made: Program, library: Path) -> Path:
    """BUILD/nodes/NAME."""
    bundle = folder / made.name
    bundle.mkdir()
    os.link(library, bundle / made.library)
    (bundle / "program.json").write_text(to_json(made))
    (box,) = made.shards[0].box
    safetensors.save(
        bundle / "weights.safetensors",
        {"w": start_weights()[slice(*box)]},
        {"boxes": json.dumps({"w": made.shards[0].box})},
    )
    return bundle


def write_data(path: Path, count: int = 40) -> np.ndarray:
    """x: small integers, so that sums are exact in any order."""
    x = np.random.default_rng(0).integers(-8, 8, (count, COLUMNS)).astype(np.float32)
    np.savez(path, x=x)
    return x


def launch(bundle: Path, data: Path, *options: str) -> subprocess.Popen[str]:
    """A node as a process of its own."""
    command = [sys.executable, "-m", "fusetile.runtime.node", str(bundle), "--data", str(data), "--threads", "1"]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
