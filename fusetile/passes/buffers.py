"""Give every tensor that a device holds a buffer: its box, channel block and border.

    y on device 0: rows 0..7 computed, row 7 received in place, conv2 pads by 1     box rows 0..8, border 1

A tensor lies in its *home*: what the device computes, grown to what deliveries add in place. Other deliveries have
buffers of their own. Parameters and their next values share a home, which is how updates are in place. So do a map and
what is computed from it element by element, if nothing reads the map afterwards: a gradient of 50 MB before a
normalization is one of 50 MB behind it, not both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusetile.box import Box, contains, hull, volume
from fusetile.errors import PlanError
from fusetile.graph import Graph, Op, Tensor
from fusetile.ops import domain_of, overwritten, row
from fusetile.passes.communicate import Communication, Delivery, Held, aligned
from fusetile.plan import Plan
from fusetile.program import Buffer

_CONVOLUTIONS = ("Conv", "ConvWeightGrad", "Gemm", "GemmWeightGrad")


@dataclass(frozen=True, slots=True)
class DeviceBuffers:
    """Buffers of one device: `home[tensor]`, and `delivered[delivery]` (the home where the delivery is in place)."""

    home: dict[str, Buffer]
    delivered: dict[int, Buffer]


def buffers(
    graph: Graph,
    plan: Plan,
    communication: Communication,
    order: Sequence[str],
    *,
    block: int,
    held: Held | None = None,
) -> tuple[DeviceBuffers, ...]:
    """For every device; `order` is that of the ops. `held`: what is there already. Raises PlanError if a device
    lacks part of a constant."""
    borders = _borders(graph, plan, communication)
    above = _overwritten(graph, communication, order)
    same_home = {new: old for old, new in graph.next_value.items()}
    result = []
    for device in range(plan.nodes):
        homes = _Homes(graph, block)
        there = held.buffers[device] if held else {}
        delivered: dict[int, str] = {}  # in which home
        in_place: dict[str, list[int]] = {}
        for index, delivery in enumerate(communication.deliveries):
            if delivery.in_place[device]:
                in_place.setdefault(delivery.tensor, []).append(index)
        for name, layout in communication.layouts.items():
            if name in same_home:
                continue
            here = (name, graph.next_value.get(name))
            indices = sorted(index for tensor in here if tensor for index in in_place.get(tensor, ()))
            boxes = [layout.have[device], *(communication.deliveries[i].need[device] for i in indices)]
            if name not in there:
                homes.add(name, hull(boxes), _widest([borders.get((i, device), (0, 0)) for i in indices]))
            delivered.update(dict.fromkeys(indices, name))
        for new, (old, index) in above.items():
            if delivered.get(index) == old:
                homes.join(new, old)
        home = homes.buffers() | {name: there[name] for name in communication.layouts if name in there}
        found = {index: home[name] for index, name in delivered.items() if name in home}
        for index, delivery in enumerate(communication.deliveries):
            if index in delivered or not volume(delivery.need[device]):
                continue
            if held and delivery.tensor in graph.parameters and delivery.tensor not in communication.layouts:
                found[index] = _constant(there, delivery, device)
            else:
                border = borders.get((index, device), (0, 0))
                label = f"{delivery.tensor} for {delivery.readers[0]}"
                found[index] = _buffer(graph, delivery.tensor, label, delivery.need[device], border, block)
        home.update({new: home[old] for new, old in same_home.items() if old in home})
        result.append(DeviceBuffers(home, found))
    return tuple(result)


def _constant(there: Mapping[str, Buffer], delivery: Delivery, device: int) -> Buffer:
    buffer = there.get(delivery.tensor)
    if buffer is None or not contains(buffer.box, delivery.need[device]):
        raise PlanError(f"device {device} lacks part of {delivery.tensor!r}, which never changes")
    return buffer


def _overwritten(graph: Graph, communication: Communication, order: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Output -> (the input in whose place it is written, the delivery through which that is read): an input that
    nothing reads afterwards. Whatever is sent of it has been waited for by then, as its other readers come first."""
    position = {name: i for i, name in enumerate(order)}
    last: dict[str, int] = {}  # tensor -> when it is read for the last time
    for delivery in communication.deliveries:
        reading = [position[reader] for reader in delivery.readers if reader in position]
        last[delivery.tensor] = max([*reading, last.get(delivery.tensor, 0)])
    lasting = {*graph.gradients.values(), *graph.next_value.values(), *graph.parameters, *graph.fed(), graph.loss}
    lasting |= {*graph.logged, *graph.compared()}
    above: dict[str, tuple[str, int]] = {}
    for op in (graph.ops[name] for name in order):
        for read in overwritten(graph, op):
            index = communication.reads[op.name, read]
            name = communication.deliveries[index].tensor
            if last[name] <= position[op.name] and not {name, op.outputs[0]} & lasting:
                above[op.outputs[0]] = (name, index)
                break
    return above


class _Homes:
    """Boxes and borders of the homes of one device, some of which are one."""

    def __init__(self, graph: Graph, block: int) -> None:
        self._graph, self._block = graph, block
        self._first: dict[str, str] = {}  # tensor -> the first of those in its home
        self._shape: dict[str, tuple[Box, tuple[int, int]]] = {}  # by first tensor

    def add(self, name: str, box: Box, border: tuple[int, int]) -> None:
        box = aligned(box, self._graph.tensors[name], self._block)
        if volume(box):
            self._first[name] = name
            self._shape[name] = (box, border)

    def join(self, name: str, other: str) -> None:
        """Let `name` be in the home of `other`, which holds both."""
        if name not in self._first or other not in self._first:
            return
        first = self._first[name] = self._first[other]
        (box, border), (more, wider) = self._shape[first], self._shape.pop(name)
        self._shape[first] = (hull([box, more]), _widest([border, wider]))

    def buffers(self) -> dict[str, Buffer]:
        """The buffer of every tensor."""
        made = {name: _buffer(self._graph, name, name, *shape, self._block) for name, shape in self._shape.items()}
        return {name: made[first] for name, first in self._first.items()}


def _borders(graph: Graph, plan: Plan, communication: Communication) -> dict[tuple[int, int], tuple[int, int]]:
    """(delivery, device) -> the widest zero padding (rows, columns) that its readers read around it."""
    borders: dict[tuple[int, int], tuple[int, int]] = {}
    for op in graph.ops.values():
        for i in row(op.kind).padded:
            if len(graph.tensors[op.inputs[i]].shape) != 4:
                continue
            index = communication.reads[op.name, op.inputs[i]]
            for device, box in enumerate(plan.placements[op.name].compute):
                if volume(box):
                    known = borders.get((index, device), (0, 0))
                    borders[index, device] = _widest([known, _overhang(graph, op, box, i)])
    return borders


def _overhang(graph: Graph, op: Op, box: Box, i: int) -> tuple[int, int]:
    domain = domain_of(graph, op)
    need, reach = domain.need(box, i), domain.reach(box, i)
    if not volume(need):
        return (0, 0)
    rows, columns = (max(n[0] - r[0], r[1] - n[1], 0) for n, r in zip(need[2:], reach[2:], strict=True))
    return (rows, columns)


def _widest(borders: list[tuple[int, int]]) -> tuple[int, int]:
    return (max((rows for rows, _ in borders), default=0), max((columns for _, columns in borders), default=0))


def _buffer(graph: Graph, name: str, label: str, box: Box, border: tuple[int, int], block: int) -> Buffer:
    return Buffer(label, box, graph.tensors[name].dtype, channel_block(graph, graph.tensors[name], block), border)


def channel_block(graph: Graph, tensor: Tensor, block: int) -> tuple[int, int]:
    """How a tensor is blocked: filters by output and input channels, integers not at all. Inputs of the model that only
    convolutions read are not padded to a block: a first layer has few channels."""
    if tensor.dtype == "int32":
        return (1, 1)
    if tensor.kind == "filter":
        return (block, min(tensor.shape[1], block))
    if tensor.name in graph.inputs and all(op.kind in _CONVOLUTIONS for op in graph.consumers()[tensor.name]):
        return (1, min(tensor.shape[1], block))
    return (1, block)
