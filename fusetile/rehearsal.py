"""Run the programs of all devices of a build on this computer, in this process, and time every op.

Devices take turns on one core: each runs until it waits for something that has not come; what it sends is copied from
its arena to the other's. So every program computes what it would compute in the cluster, on random data.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from fusetile.box import extents
from fusetile.program import Call, Feed, Program, Recv, Run, Send, Wait
from fusetile.runtime.native import Library, Segment
from fusetile.runtime.node import load_program
from fusetile.runtime.result import load_weights
from fusetile.runtime.storage import make_arena, pack

ROUNDS = 3
Part = tuple[str, float]
"""An op ("" for what only moves data on the device) and the seconds of its calls in a row: the least of all rounds."""


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """A device's program and for every step of it what was timed; nothing for steps that compute nothing."""

    program: Program
    parts: tuple[tuple[Part, ...], ...]


def rehearse(build: Path, *, rounds: int = ROUNDS) -> tuple[Rehearsed, ...]:
    """All devices of a build whose kernels are for this computer, by rank."""
    folders = sorted((build / "nodes").iterdir(), key=lambda folder: load_program(folder).rank)
    with Library(folders[0] / load_program(folders[0]).library, threads=1) as library:
        actors = [_Actor(folder, library) for folder in folders]
        for _ in range(rounds):
            step(actors)
    return tuple(actor.result() for actor in actors)


class _Actor:
    """A device: its program, its memory, and the least seconds of every op so far."""

    def __init__(self, folder: Path, library: Library) -> None:
        self.program = load_program(folder)
        self.arena = make_arena(self.program.arena_bytes)
        load_weights(folder / "weights.safetensors", self.program, self.arena)
        self.segments = {
            index: library.segment(one.calls, self.arena)
            for index, one in enumerate(self.program.steps)
            if isinstance(one, Run)
        }
        self.least: dict[tuple[int, int], Part] = {}
        self.random = np.random.default_rng(self.program.rank)

    def feed(self) -> None:
        """Random inputs and boxes; classes and other whole numbers are 0."""
        for feed in self.program.feeds:
            pack(self.arena, feed.buffer, feed.buffer.box, self._values(feed))

    def _values(self, feed: Feed) -> np.ndarray:
        sizes = extents(feed.buffer.box)
        controls = self.program.rates.controls(1, 1)
        if feed.role in controls:
            return np.full(sizes, controls[feed.role])
        if feed.boxes:
            return self.random.uniform(0.1, 0.9, sizes) * (np.arange(sizes[2]) > 0)
        return np.zeros(sizes) if feed.buffer.dtype == "int32" else self.random.standard_normal(sizes)

    def run(self, index: int, calls: tuple[Call, ...]) -> None:
        """A segment, op by op."""
        at = 0
        for op, members in groupby(calls, key=lambda call: call.op):
            count = len(list(members))
            seconds = _timed(self.segments[index], at, at + count)
            _, before = self.least.get((index, at), (op, seconds))
            self.least[index, at] = (op, min(seconds, before))
            at += count

    def result(self) -> Rehearsed:
        parts: list[list[Part]] = [[] for _ in self.program.steps]
        for (index, _), part in sorted(self.least.items()):
            parts[index].append(part)
        return Rehearsed(self.program, tuple(map(tuple, parts)))


def _timed(segment: Segment, start: int, stop: int) -> float:
    began = time.perf_counter()
    segment(start, stop)
    return time.perf_counter() - began


@dataclass(slots=True)
class _Post:
    """What has been sent and made ready so far, by tag, and what has been carried."""

    sent: dict[int, np.ndarray] = field(default_factory=dict)
    ready: dict[int, np.ndarray] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)

    def carry(self, tag: int) -> bool:
        """Whether a transfer is complete; it is as soon as both ends want it."""
        if tag not in self.done and tag in self.sent and tag in self.ready:
            self.ready[tag][:] = self.sent[tag]
            self.done.add(tag)
        return tag in self.done


def step(actors: list[_Actor]) -> None:
    """One training step of all devices."""
    post = _Post()
    turns = []
    for actor in actors:
        actor.feed()
        turns.append(_turns(actor, post))
    while turns:
        turns = [turn for turn in turns if next(turn, None) is not None]


def _turns(actor: _Actor, post: _Post) -> Iterator[bool]:
    """Run until something has not come; again after each."""
    for index, one in enumerate(actor.program.steps):
        match one:
            case Run(calls):
                actor.run(index, calls)
            case Send():
                post.sent[one.tag] = actor.arena[one.offset_bytes :][: one.size_bytes]
            case Recv():
                post.ready[one.tag] = actor.arena[one.offset_bytes :][: one.size_bytes]
            case Wait(tags):
                while not all(post.carry(tag) for tag in tags):
                    yield True
