"""A draft: one device's program on named buffers, before these have addresses; and the arena that it needs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fusetile.box import Box
from fusetile.codegen.calls import KernelCall, Ref
from fusetile.graph import Graph
from fusetile.passes.plan_memory import ROUNDS, MemoryPlan, plan_memory
from fusetile.program import Buffer, REDZONE_bytes, Wait


@dataclass(frozen=True, slots=True)
class DraftSend:
    """`program.Send` before its buffer has an address."""

    peer: int
    tag: int
    at: Ref
    size_bytes: int
    priority: int


@dataclass(frozen=True, slots=True)
class DraftRecv:
    """`program.Recv` before its buffer has an address."""

    peer: int
    tag: int
    at: Ref
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a gradient, which is complete just before step `at` of the draft: in `buffer`, or as its product with
    `factor` (see `program.Gradient`)."""

    box: Box
    at: int
    buffer: Buffer
    factor: Buffer | None = None


DraftStep = KernelCall | DraftSend | DraftRecv | Wait


@dataclass(slots=True)
class Draft:
    """One device's program on named buffers. `persistent` ones keep their content for ever, `fed` ones are filled
    before each step, `logged` ones read after it. `pieces[op]`: the gradient that an update takes."""

    steps: list[DraftStep] = field(default_factory=list)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    persistent: set[str] = field(default_factory=set)
    fed: set[str] = field(default_factory=set)
    logged: set[str] = field(default_factory=set)
    pieces: dict[str, Piece] = field(default_factory=dict)
    scratch_bytes: dict[str, int] = field(default_factory=dict)  # by op


def layers_of(graph: Graph, draft: Draft) -> list[str]:
    """For every step of a draft, what it works for: the layer that its op came from, and the phase."""
    layers, name = [], ""
    for step in draft.steps:
        name = getattr(step, "op", "") or name
        op = graph.ops.get(name)
        layers.append(f"{op.origin or op.name} ({op.phase})" if op else "the start of the step")
    return layers


def lifetimes(draft: Draft) -> dict[str, tuple[int, int]]:
    """Per buffer the first and last step of the draft that touch it."""
    end = len(draft.steps)
    live: dict[str, tuple[int, int]] = {}
    moving: dict[int, str] = {}

    def touch(name: str, at: int) -> None:
        first, last = live.get(name, (at, at))
        live[name] = (min(first, at), max(last, at))

    for name in draft.persistent:
        live[name] = (-1, end)
    for name in draft.fed:
        touch(name, -1)
    for name in draft.logged:
        touch(name, end)
    for at, step in enumerate(draft.steps):
        match step:
            case KernelCall():
                for pointer in step.pointers:
                    touch(pointer.buffer, at)
            case DraftSend() | DraftRecv():
                touch(step.at.buffer, at)
                moving[step.tag] = step.at.buffer
            case Wait(tags):
                for tag in tags:
                    touch(moving[tag], at)
    return live


def memory_of(draft: Draft, *, guard: bool = False, lean: bool = False) -> MemoryPlan:
    """The arena of a draft; with `guard` there are redzones around all buffers, with `lean` it is packed well."""
    rounds, redzone_bytes = ROUNDS if lean else 1, REDZONE_bytes if guard else 0
    return plan_memory(draft.buffers.values(), lifetimes(draft), redzone_bytes=redzone_bytes, rounds=rounds)


def memory_beside(draft: Draft, first: Draft, memory: MemoryPlan) -> MemoryPlan:
    """The arena of another routine's draft, in which everything that `first` keeps between steps stays where it is."""
    live, buffers = lifetimes(draft), dict(draft.buffers)
    fixed: dict[str, int] = {}
    for name in sorted(first.persistent):
        kept = first.buffers[name]
        label = name if buffers.get(name) == kept else f"{name} between steps"
        buffers[label] = replace(kept, name=label)
        live[label], fixed[label] = (-1, len(draft.steps)), memory.offsets[name]
    return plan_memory(buffers.values(), live, redzone_bytes=memory.redzone_bytes, fixed=fixed)
