"""Actions -> a draft of each device's program: kernel calls on named buffers, sends, receives and waits.

What is left to do then is memory: `plan_memory` gives every buffer its place in the arena.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

from fusetile.box import Box, volume
from fusetile.codegen.calls import KernelCall, Ref, ref
from fusetile.codegen.lower import lower
from fusetile.codegen.move import accumulate, copy, zero, zero_border
from fusetile.codegen.targets import Target
from fusetile.graph import Graph
from fusetile.ops import domain_of
from fusetile.passes.buffers import DeviceBuffers, channel_block
from fusetile.passes.communicate import Communication
from fusetile.passes.schedule import Action, Await, Compute, Pack, Place, Post, Schedule, Ship, Transfer
from fusetile.plan import Plan
from fusetile.program import Buffer, Wait


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


DraftStep = KernelCall | DraftSend | DraftRecv | Wait


@dataclass(slots=True)
class Draft:
    """One device's program on named buffers. `persistent` ones keep their content for ever, `fed` ones are filled
    before each step, `logged` ones read after it. `first_call[op]` is the index in `steps` of an op's first call."""

    steps: list[DraftStep] = field(default_factory=list)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    persistent: set[str] = field(default_factory=set)
    fed: set[str] = field(default_factory=set)
    logged: set[str] = field(default_factory=set)
    first_call: dict[str, int] = field(default_factory=dict)


def emit(
    graph: Graph,
    plan: Plan,
    communication: Communication,
    schedule: Schedule,
    storage: Sequence[DeviceBuffers],
    *,
    targets: Sequence[Target],
    block: int,
) -> tuple[Draft, ...]:
    """A draft per device, for its target."""
    return tuple(
        _Emitter(graph, plan, communication, schedule, storage[device], device, targets[device], block).run()
        for device in range(plan.nodes)
    )


class _Emitter:
    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        communication: Communication,
        schedule: Schedule,
        storage: DeviceBuffers,
        device: int,
        target: Target,
        block: int,
    ) -> None:
        self.graph, self.plan, self.communication = graph, plan, communication
        self.schedule, self.storage, self.device = schedule, storage, device
        self.target, self.block = target, block
        self.draft = Draft()

    def run(self) -> Draft:
        for name in self.graph.parameters:
            self._adopt(name, parameter=True)
        for name in sorted(self.graph.fed()):
            self._adopt(name, parameter=False)
        for action in self.schedule.actions[self.device]:
            self._act(action)
        deliveries = self.communication.deliveries
        self.draft.logged = {
            buffer.name for i, buffer in self.storage.delivered.items() if deliveries[i].tensor == self.graph.loss
        }
        return self.draft

    def _adopt(self, name: str, *, parameter: bool) -> None:
        """Buffers that hold something when the step begins. What pads them is zero from the first step on."""
        held = [self.storage.home[name]] if name in self.storage.home else []
        if name not in self.communication.layouts:
            deliveries = self.communication.deliveries
            held = [b for i, b in self.storage.delivered.items() if deliveries[i].tensor == name]
        for buffer in held:
            self.draft.buffers[buffer.name] = buffer
            if parameter or is_padded(buffer):
                self.draft.persistent.add(buffer.name)
            else:
                self.draft.fed.add(buffer.name)

    def _use(self, buffer: Buffer) -> Buffer:
        """Make a buffer known; before it is used for the first time its border is cleared."""
        if buffer.name not in self.draft.buffers:
            self.draft.buffers[buffer.name] = buffer
            if buffer.border != (0, 0):
                self.draft.steps.append(zero_border(buffer))
        return buffer

    def _act(self, action: Action) -> None:
        match action:
            case Compute(op):
                self._compute(op)
            case Pack(tag):
                self._pack(self.schedule.transfers[tag])
            case Ship(tag):
                transfer = self.schedule.transfers[tag]
                at, size_bytes = self._source(transfer)
                self.draft.steps.append(DraftSend(transfer.move.target, tag, at, size_bytes, transfer.priority))
            case Post(tag):
                transfer = self.schedule.transfers[tag]
                at, size_bytes = self._destination(transfer)
                self.draft.steps.append(DraftRecv(transfer.move.source, tag, at, size_bytes))
            case Await(tags):
                self.draft.steps.append(Wait(tags))
            case Place(delivery):
                self._place(delivery)

    def _compute(self, name: str) -> None:
        op = self.graph.ops[name]
        domain, box = domain_of(self.graph, op), self.plan.placements[name].compute[self.device]
        inputs = [self._input(name, tensor) for tensor in op.inputs]
        outputs = [self._use(self.storage.home[tensor]) for tensor in op.outputs]
        lowered = lower(op, domain, box, inputs, outputs, target=self.target)
        names = {buffer.name: f"{buffer.name} of {name}" for buffer in lowered.scratch}
        for buffer in lowered.scratch:
            self.draft.buffers[names[buffer.name]] = replace(buffer, name=names[buffer.name])
        self.draft.first_call[name] = len(self.draft.steps)
        for call in lowered.calls:
            pointers = tuple(Ref(names.get(p.buffer, p.buffer), p.offset_bytes) for p in call.pointers)
            self.draft.steps.append(replace(call, pointers=pointers))

    def _input(self, op: str, tensor: str) -> Buffer:
        index = self.communication.reads[op, tensor]
        if index in self.storage.delivered:
            return self._use(self.storage.delivered[index])
        # nothing of it is read here, but the call still has a pointer for it
        known = self.graph.tensors[tensor]
        box = tuple((0, min(size, self.block)) for size in known.shape)
        block = channel_block(self.graph, known, self.block)
        return self._use(Buffer(f"nothing of {tensor}", box, known.dtype, block))

    # -- transfers ----------------------------------------------------------------------------------------------------

    def _stage(self, transfer: Transfer) -> Buffer:
        """A buffer for exactly the moved box, which is what travels."""
        tensor = self.graph.tensors[self._tensor(transfer)]
        block = channel_block(self.graph, tensor, self.block)
        return Buffer(f"message {transfer.tag}", transfer.move.box, transfer.dtype, block)

    def _tensor(self, transfer: Transfer) -> str:
        return self.communication.deliveries[transfer.delivery].tensor

    def _source(self, transfer: Transfer) -> tuple[Ref, int]:
        stage, home = self._stage(transfer), self.storage.home[self._tensor(transfer)]
        if is_contiguous(home, transfer.move.box):
            return ref(home, transfer.move.box), stage.size_bytes
        return ref(self._use(stage)), stage.size_bytes

    def _pack(self, transfer: Transfer) -> None:
        home = self.storage.home[self._tensor(transfer)]
        if not is_contiguous(home, transfer.move.box):
            self.draft.steps.append(copy(home, self._use(self._stage(transfer)), transfer.move.box))

    def _direct(self, transfer: Transfer) -> Buffer | None:
        """Where a transfer can be received without staging."""
        target = self.storage.delivered[transfer.delivery]
        picked = self.communication.layouts[self._tensor(transfer)].combine == "pick"
        return target if picked and is_contiguous(target, transfer.move.box) else None

    def _destination(self, transfer: Transfer) -> tuple[Ref, int]:
        stage, direct = self._stage(transfer), self._direct(transfer)
        if direct:
            return ref(self._use(direct), transfer.move.box), stage.size_bytes
        return ref(self._use(stage)), stage.size_bytes

    def _place(self, index: int) -> None:
        delivery = self.communication.deliveries[index]
        target = self._use(self.storage.delivered[index])
        adding = self.communication.layouts[delivery.tensor].combine == "sum"
        by_move = {t.move: t for t in self.schedule.transfers if t.delivery == index}
        moves = [move for move in delivery.moves if move.target == self.device]
        for i, move in enumerate(moves):
            if move in by_move and self._direct(by_move[move]):
                continue
            source = self._stage(by_move[move]) if move in by_move else self.storage.home[delivery.tensor]
            if adding and i == 0 and move.box != delivery.need[self.device]:
                self.draft.steps.append(zero(target))
            first = i == 0 and move.box == delivery.need[self.device]
            self.draft.steps.append((accumulate if adding and not first else copy)(source, target, move.box))


def is_padded(buffer: Buffer) -> bool:
    """Whether a buffer has more elements than its box: a border, or channels that do not fill their block."""
    return prod(buffer.storage_shape) > volume(buffer.box)


def is_contiguous(buffer: Buffer, box: Box) -> bool:
    """Whether a box lies in a buffer just as it would in a buffer of its own without a border."""
    if volume(box) == 0:
        return False
    own = Buffer("", box, buffer.dtype, buffer.block)
    counts = own.storage_shape[:4]
    matters = [i for i, count in enumerate(counts) if count > 1]
    return all(own.strides[i] == buffer.strides[i] for i in matters)
