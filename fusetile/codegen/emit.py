"""Actions -> a draft of each device's program: kernel calls on named buffers, sends, receives and waits.

What is left to do then is memory: `plan_memory` gives every buffer its place in the arena.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

from fusetile.box import Box, volume
from fusetile.codegen.calls import KernelCall, Lowered, Ref, ref
from fusetile.codegen.draft import Draft, DraftRecv, DraftSend, Piece
from fusetile.codegen.job import Job, Numerics
from fusetile.codegen.laid_out import LaidOut
from fusetile.codegen.lower import lower
from fusetile.codegen.move import accumulate, copy, zero, zero_border
from fusetile.codegen.narrow import SCALE_bytes, decode, encode, partials_bytes
from fusetile.codegen.updating import lower_updating, updating
from fusetile.graph import Op
from fusetile.ops import domain_of, row
from fusetile.passes.buffers import channel_block
from fusetile.passes.communicate import LOGGED
from fusetile.passes.schedule import Action, Await, Compute, Pack, Part, Place, Post, Ship, Transfer
from fusetile.program import ALIGNMENT_bytes, Buffer, Wait


def emit(laid: LaidOut, *, block: int, numerics: Numerics = "fast") -> tuple[Draft, ...]:
    """A draft per device, for its target; `numerics` as in `Job`."""
    return tuple(_Emitter(laid, device, block, numerics).run() for device in range(laid.plan.nodes))


class _Emitter:
    def __init__(self, laid: LaidOut, device: int, block: int, numerics: Numerics) -> None:
        self.graph, self.plan, self.communication = laid.graph, laid.plan, laid.communication
        self.schedule, self.storage, self.device = laid.order, laid.storage[device], device
        self.target, self.block, self.numerics, self.lean = laid.targets[device], block, numerics, laid.lean
        self.compared = self.graph.compared()
        self.draft = Draft()
        self.prepared: dict[str, tuple[KernelCall, Ref]] = {}  # by op: what makes scratch of the weights, and where
        self.actions = self.schedule.actions[device]
        self.updating = updating(self.graph, self.plan, self.communication, self.storage, self.actions, device)
        self.taken = {op.name: op.inputs[1] for op in self.graph.ops.values() if row(op.kind).kernel == "update"}
        self.incoming: dict[int, list[Transfer]] = {}  # by delivery
        for transfer in self.schedule.transfers:
            for index in {part.delivery for part in transfer.parts} if transfer.target == device else ():
                self.incoming.setdefault(index, []).append(transfer)

    def run(self) -> Draft:
        for name in self.graph.parameters:
            self._adopt(name, parameter=True)
        for name in sorted(self.graph.fed()):
            self._adopt(name, parameter=False)
        for action in self.actions:
            self._act(action)
        deliveries = self.communication.deliveries
        self.draft.logged = {
            buffer.name
            for i, buffer in self.storage.delivered.items()
            if LOGGED in deliveries[i].readers or deliveries[i].tensor in self.compared
        } & set(self.draft.buffers)
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
            case Compute(op) if op in self.updating:
                self._compute_updating(self.updating[op], op)
            case Compute(op, box) if op not in self.updating.values():
                self._compute(op, box)
            case Pack(tag):
                self._pack(self.schedule.transfers[tag])
            case Ship(tag):
                transfer = self.schedule.transfers[tag]
                at, size_bytes = self._end(transfer, self._direct_source(transfer))
                self.draft.steps.append(DraftSend(transfer.target, tag, at, size_bytes, transfer.priority))
            case Post(tag):
                transfer = self.schedule.transfers[tag]
                at, size_bytes = self._end(transfer, self._direct_target(transfer))
                self.draft.steps.append(DraftRecv(transfer.source, tag, at, size_bytes))
            case Await(tags):
                self.draft.steps.append(Wait(tags))
            case Place(delivery):
                self._place(delivery)

    def _compute(self, name: str, box: Box) -> None:
        """Iterations of an op."""
        op, gradient = self.graph.ops[name], self.taken.get(name)
        job = self._job(op, box, op.outputs)
        if gradient in self.graph.gradients.values():
            place = job.inputs[op.inputs.index(gradient)]
            self.draft.pieces[name] = Piece(job.written(), len(self.draft.steps), place)
        self._lowered(name, lower(job))

    def _compute_updating(self, name: str, update: str) -> None:
        """An op that makes a gradient, and the update that takes it."""
        op, taking, gradient = self.graph.ops[name], self.graph.ops[update], self.taken[update]
        job = self._job(op, self.plan.placements[name].compute[self.device], taking.outputs)
        others = [self._input(update, tensor) for tensor in taking.inputs if tensor != gradient]
        if gradient in self.graph.gradients.values():
            x, dy = job.inputs
            self.draft.pieces[update] = Piece(job.written(), len(self.draft.steps), dy, x)
        self._lowered(name, lower_updating(job, taking, others))

    def _job(self, op: Op, box: Box, outputs: Sequence[str]) -> Job:
        """Iterations of an op, to these tensors."""
        inputs = [self._input(op.name, tensor) for tensor in op.inputs]
        results = [self._use(self.storage.home[tensor]) for tensor in outputs]
        return Job(op, domain_of(self.graph, op), box, inputs, results, self.target, self.numerics, self.lean)

    def _lowered(self, name: str, lowered: Lowered) -> None:
        """Append the calls of an op, and make their scratch known."""
        known = self.draft.scratch_bytes
        piece = f", step {len(self.draft.steps)}" if name in known else ""  # an op in pieces has scratch for each
        names = {buffer.name: Ref(f"{buffer.name} of {name}{piece}") for buffer in lowered.scratch}
        known[name] = max(known.get(name, 0), sum(buffer.size_bytes for buffer in lowered.scratch))
        calls = list(lowered.calls)
        if lowered.prepared:  # once for all pieces
            call, made = self.prepared.setdefault(name, (calls[0], names[lowered.prepared]))
            if piece and call == calls[0]:
                calls.pop(0)
                names[lowered.prepared] = made
        for buffer in lowered.scratch:
            label = names[buffer.name].buffer
            self.draft.buffers[label] = replace(buffer, name=label)
        for call in calls:
            self._call(replace(call, op=name), names)

    def _call(self, call: KernelCall, places: Mapping[str, Ref]) -> None:
        """Append a call; buffers in `places` lie at that address of another one."""
        pointers = []
        for pointer in call.pointers:
            base = places.get(pointer.buffer, Ref(pointer.buffer))
            pointers.append(Ref(base.buffer, base.offset_bytes + pointer.offset_bytes))
        self.draft.steps.append(replace(call, pointers=tuple(pointers)))

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

    def _tensor(self, part: Part) -> str:
        return self.communication.deliveries[part.delivery].tensor

    def _parts(self, transfer: Transfer) -> Iterator[tuple[Part, Buffer, Ref]]:
        """Each part with a buffer for exactly its box, which is what travels, and where that lies in the message. A
        part of float16 is followed by its scale."""
        offset = 0
        for i, (part, dtype) in enumerate(zip(transfer.parts, transfer.dtypes, strict=True)):
            block = channel_block(self.graph, self.graph.tensors[self._tensor(part)], self.block)
            stage = Buffer(f"part {i} of message {transfer.tag}", part.move.box, dtype, block)
            yield part, stage, Ref(f"message {transfer.tag}", offset)
            offset += -(-_part_bytes(stage) // ALIGNMENT_bytes) * ALIGNMENT_bytes

    def _message(self, transfer: Transfer) -> Buffer:
        *_, (_, stage, at) = self._parts(transfer)
        return Buffer(at.buffer, ((0, at.offset_bytes + _part_bytes(stage)),), "uint8")

    def _end(self, transfer: Transfer, direct: Buffer | None) -> tuple[Ref, int]:
        """Where a message lies on this device, and its size."""
        message = self._message(transfer)
        if direct:
            return ref(self._use(direct), transfer.parts[0].move.box), message.size_bytes
        return ref(self._use(message)), message.size_bytes

    def _direct_source(self, transfer: Transfer) -> Buffer | None:
        """The buffer that a message can be sent from without packing."""
        home = self.storage.home[self._tensor(transfer.parts[0])]
        alone = len(transfer.parts) == 1 and transfer.dtypes[0] == home.dtype
        return home if alone and is_contiguous(home, transfer.parts[0].move.box) else None

    def _direct_target(self, transfer: Transfer) -> Buffer | None:
        """The buffer that a message can be received into without unpacking."""
        part = transfer.parts[0]
        target = self.storage.delivered[part.delivery]
        picked = self.communication.layouts[self._tensor(part)].combine == "pick"
        alone = picked and len(transfer.parts) == 1 and transfer.dtypes[0] == target.dtype
        return target if alone and is_contiguous(target, part.move.box) else None

    def _pack(self, transfer: Transfer) -> None:
        if self._direct_source(transfer):
            return
        self._use(self._message(transfer))
        for part, stage, at in self._parts(transfer):
            home, box = self.storage.home[self._tensor(part)], part.move.box
            if stage.dtype == home.dtype:
                self._call(copy(home, stage, box), {stage.name: at})
                continue
            partials = Buffer(f"partials of {stage.name}", ((0, partials_bytes(home, box)),), "uint8")
            for call in encode(home, stage, box, ref(self._use(partials)), _scale(stage)):
                self._call(call, {stage.name: at})

    def _place(self, index: int) -> None:
        delivery = self.communication.deliveries[index]
        target = self._use(self.storage.delivered[index])
        adding = self.communication.layouts[delivery.tensor].combine == "sum"
        came = {
            part.move: (transfer, stage, at)
            for transfer in self.incoming.get(index, ())
            for part, stage, at in self._parts(transfer)
            if part.delivery == index
        }
        moves = [move for move in delivery.moves if move.target == self.device]
        whole = bool(moves) and moves[0].box == delivery.need[self.device]
        if adding and not whole:
            self._call(zero(target), {})
        for i, move in enumerate(moves):
            add = accumulate if adding and not (whole and i == 0) else copy
            if move not in came:
                self._call(add(self.storage.home[delivery.tensor], target, move.box), {})
                continue
            transfer, stage, at = came[move]
            if stage.dtype != target.dtype:
                self._call(decode(stage, target, move.box, _scale(stage), add=add is accumulate), {stage.name: at})
            elif not self._direct_target(transfer):
                self._call(add(stage, target, move.box), {stage.name: at})


def _part_bytes(stage: Buffer) -> int:
    """Bytes of a part of a message: its values, and the scale of values that were narrowed."""
    return stage.size_bytes + (SCALE_bytes if stage.dtype == "float16" else 0)


def _scale(stage: Buffer) -> Ref:
    return Ref(stage.name, stage.size_bytes)


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
