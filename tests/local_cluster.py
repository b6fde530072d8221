"""Run the programs of all devices in this process: real kernels and arenas, no sockets.

Devices take turns: each runs until it waits for something that has not come. A transfer is done when it is both posted
and sent; sends are read when they are awaited, so that a buffer reused too early gives wrong results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from fusetile.box import slices, whole
from fusetile.program import Program, Recv, Run, Send, Wait, from_json
from fusetile.runtime.executor import gradient_values
from fusetile.runtime.guard import Guard
from fusetile.runtime.native import Library
from fusetile.runtime.safetensors import load
from fusetile.runtime.storage import make_arena, pack, unpack


class Device:
    """One bundle, loaded."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.program: Program = from_json((folder / "program.json").read_text())
        self.arena = make_arena(self.program.arena_bytes)
        self.arena[:] = 0xFF  # what is not written is NaN
        weights, _ = load(folder / "weights.safetensors")
        for holder in (*self.program.shards, *self.program.feeds):
            # what pads parameters and inputs is zero from the start
            start = holder.buffer.offset_bytes
            self.arena[start : start + holder.buffer.size_bytes] = 0
        for shard in self.program.shards:
            pack(self.arena, shard.buffer, shard.box, weights[shard.parameter])
        self.library = Library(folder / self.program.library, threads=threads)
        self.guard = Guard(self.program.training, self.arena) if self.program.zones else None

    def guarded(self, index: int, action: Callable[..., None]) -> Callable[..., None]:
        """A step of the program, watched if the program has guards."""
        return action if self.guard is None else self.guard.around(action, index)

    def feed(self, values: Mapping[str, np.ndarray]) -> None:
        """`values` by key of a feed, or by its role for controls; whole batches."""
        for feed in self.program.feeds:
            value = values[feed.key or feed.role]
            pack(self.arena, feed.buffer, feed.buffer.box, np.ascontiguousarray(value[slices(feed.buffer.box)]))


class LocalCluster:
    """All devices of a build."""

    def __init__(self, build: Path, threads: int = 1) -> None:
        folders = list((build / "nodes").iterdir())
        self.devices = sorted((Device(folder, threads) for folder in folders), key=lambda device: device.program.rank)

    def step(self, values: Mapping[str, np.ndarray]) -> float:
        """One training step; returns the loss."""
        self.gradients: dict[str, np.ndarray] = {}
        for device in self.devices:
            device.feed(values)
            if device.guard:
                device.guard.begin_step()
        sent: dict[int, tuple[Device, Send]] = {}
        posted: dict[int, tuple[Device, Recv]] = {}
        done: set[int] = set()
        runners = [self._run(device, sent, posted, done) for device in self.devices]
        while runners:
            left = []
            for runner in runners:
                try:
                    next(runner)
                    left.append(runner)
                except StopIteration:
                    pass
            runners = left
        losses = [float(unpack(d.arena, d.program.loss, ((0, 1),))[0]) for d in self.devices if d.program.loss]
        assert len(set(losses)) == 1, losses
        return losses[0]

    def _run(self, device: Device, sent: dict, posted: dict, done: set[int]):
        for index, step in enumerate(device.program.steps):
            match step:
                case Run(calls):
                    segment = device.guarded(index, device.library.segment(calls, device.arena))
                    cuts = sorted({0, len(calls), *(g.call for g in device.program.gradients if g.step == index)})
                    for start, stop in pairwise(cuts):
                        self._snapshot(device, index, start)
                        segment(start, stop)
                case Send():
                    sent[step.tag] = (device, step)
                    device.guarded(index, lambda: None)()
                case Recv():
                    device.guarded(index, lambda: None)()
                    posted[step.tag] = (device, step)
                case Wait(tags):
                    while not all(tag in sent and tag in posted for tag in tags):
                        yield
                    for tag in set(tags) - done:
                        (source, out), (target, into) = sent[tag], posted[tag]
                        assert out.size_bytes == into.size_bytes
                        data = source.arena[out.offset_bytes :][: out.size_bytes]
                        target.arena[into.offset_bytes :][: into.size_bytes] = data
                        done.add(tag)
                    device.guarded(index, lambda: None)()

    def _snapshot(self, device: Device, step: int, call: int) -> None:
        for gradient in device.program.gradients:
            if (gradient.step, gradient.call) == (step, call):
                total = self.gradients.setdefault(gradient.parameter, np.zeros(gradient.shape, np.float32))
                total[slices(gradient.box)] = gradient_values(device.arena, gradient)

    def parameters(self) -> dict[str, np.ndarray]:
        """Every updated parameter, assembled from its shards."""
        found: dict[str, np.ndarray] = {}
        for device in self.devices:
            for shard in device.program.shards:
                if shard.updated:
                    total = found.setdefault(shard.parameter, np.full(shard.shape, np.nan, np.float32))
                    total[slices(shard.box, whole(shard.shape))] = unpack(device.arena, shard.buffer, shard.box)
        return found
