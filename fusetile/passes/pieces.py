"""Compute a convolution in pieces, so that its borders, or what it reads, travel while the rest is computed.

    device 0, rows 0..26 of y; device 1 waits for row 25        before    compute 0..26 | ship row 25
                                                                after     compute 22..26 | ship row 25 | compute 0..22

    rows 0..9 of x are here, 9..26 come                         before    await x | compute 0..26
                                                                after     compute 0..8 | await x | compute 8..26

Strips along borders are some rows or columns longer than the halo, so that kernels compute whole tiles. A piece costs
the traffic of the weights again, which the prediction counts; what kernels make of weights is made once (see
`Lowered.prepared`). On six Pi 3 a step of YOLOv2-16 takes 0.95 times as long at batch 16 as without pieces.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fusetile.box import Box, contains, intersect, subtract, volume
from fusetile.cluster import Cluster
from fusetile.cost import cost_of, is_convolution, kind_of, seconds_on
from fusetile.graph import Graph, Op
from fusetile.ops import Domain, domain_of
from fusetile.ops.base import Along
from fusetile.passes.communicate import Communication, busiest
from fusetile.plan import Plan

STRIP = 4
"""Rows or columns: strips are whole multiples of it. It is the side of the largest tile of a Winograd convolution."""
LEAST_HIDDEN_seconds = 0.5e-3
"""For less an op is not cut."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Iterations of an op, and what the device is predicted to take for them."""

    box: Box
    seconds: float


@dataclass(frozen=True, slots=True)
class Cut:
    """The pieces of an op on a device, in order. What comes of the delivery `awaited`, if any, only those from the
    second on wait for."""

    pieces: tuple[Piece, ...]
    awaited: int | None = None


Cuts = Mapping[tuple[str, int], Cut]
"""(op, device) -> how it is cut, where it is."""


def cuts(
    graph: Graph,
    plan: Plan,
    communication: Communication,
    cluster: Cluster,
    seconds: Mapping[str, Sequence[float]],
    waiting: Mapping[int, Mapping[str, Collection[int]]],
) -> Cuts:
    """Of convolutions: `waiting[delivery]` says of those that are urgent which ops wait for them on which devices, and
    `seconds[op]` what each device takes."""
    cutter = _Cutter(graph, plan, communication, cluster, seconds)
    producers, found = graph.producers(), dict[tuple[str, int], Cut]()
    sent = set()
    for index in waiting:
        op = producers.get(communication.deliveries[index].tensor)
        if op is not None and (cut := cutter.sending(op, index)):
            found |= {(op.name, device): each for device, each in cut.items()}
            sent.add(index)
    rank = {name: position for position, name in enumerate(graph.ops)}
    for index, readers in waiting.items():
        if index not in sent:
            op = graph.ops[min(readers, key=rank.__getitem__)]
            found |= {(op.name, device): each for device, each in cutter.receiving(op, index, readers[op.name]).items()}
    return found


class _Cutter:
    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        communication: Communication,
        cluster: Cluster,
        seconds: Mapping[str, Sequence[float]],
    ) -> None:
        self.graph, self.plan, self.communication = graph, plan, communication
        self.cluster, self.seconds = cluster, seconds

    def sending(self, op: Op, index: int) -> dict[int, Cut]:
        """The op writes what is sent: borders first. On all devices that send, or on none."""
        moves = self.communication.deliveries[index].transfers() if self._is_convolution(op) else ()
        found = {}
        for device in sorted({move.source for move in moves}):
            sent = [move.box for move in moves if move.source == device]
            boxes = border_first(domain_of(self.graph, op), self._box(op, device), sent)
            pieces = self._priced(op, device, boxes)
            if not pieces or self._gain(op, device, index, pieces, pieces[-1]) < LEAST_HIDDEN_seconds:
                return {}
            found[device] = Cut(pieces)
        return found

    def receiving(self, op: Op, index: int, devices: Collection[int]) -> dict[int, Cut]:
        """The op reads what comes: first what needs nothing of it."""
        delivery, found = self.communication.deliveries[index], {}
        layout, through = self.communication.layouts[delivery.tensor], self.communication.reads
        for device in devices if self._is_convolution(op) else ():
            if layout.combine == "pick" and delivery.in_place[device]:
                reads = [i for i, name in enumerate(op.inputs) if through[op.name, name] == index]
                boxes = here_first(domain_of(self.graph, op), self._box(op, device), reads, layout.have[device])
                pieces = self._priced(op, device, boxes)
                if pieces and self._gain(op, device, index, pieces, pieces[0]) > LEAST_HIDDEN_seconds:
                    found[device] = Cut(pieces, index)
        return found

    def _is_convolution(self, op: Op) -> bool:
        return is_convolution(kind_of(self.graph, op))

    def _box(self, op: Op, device: int) -> Box:
        return self.plan.placements[op.name].compute[device]

    def _priced(self, op: Op, device: int, boxes: Sequence[Box]) -> tuple[Piece, ...]:
        node = self.cluster.nodes[device]
        return tuple(Piece(box, seconds_on(cost_of(self.graph, op, box), node)) for box in boxes)

    def _gain(self, op: Op, device: int, index: int, pieces: Sequence[Piece], beside: Piece) -> float:
        """Seconds of the transfer that hide behind a piece, less what all pieces take longer than the whole op."""
        size_bytes, _ = busiest(self.graph, self.communication.deliveries[index], self.cluster.link)
        hidden = min(beside.seconds, size_bytes / self.cluster.link.bytes_per_second)
        return hidden - sum(piece.seconds for piece in pieces) + self.seconds[op.name][device]


def border_first(domain: Domain, box: Box, sent: Sequence[Box]) -> tuple[Box, ...]:
    """The iterations `box` as disjoint boxes in order: strips that hold the boxes `sent` of the output, then the rest.
    Nothing if strips along the borders can't hold them."""
    pieces, rest = [], box
    for dim, axis in _image_axes(domain):
        for low in (True, False):
            waited = [part for part in sent if volume(intersect(part, domain.output(rest)))]
            strip = _strip(rest, axis, [part[dim] for part in waited], low=low)
            if strip is not None:
                pieces.append(strip)
                start, stop = rest[axis]
                rest = _with(rest, axis, (strip[axis][1], stop) if low else (start, strip[axis][0]))
    held = not any(volume(intersect(part, domain.output(rest))) for part in sent)
    return (*pieces, rest) if held else ()


def here_first(domain: Domain, box: Box, reads: Sequence[int], have: Box) -> tuple[Box, ...]:
    """The iterations `box` as disjoint boxes in order: rows, or columns, that read nothing but `have` of the inputs
    `reads`, then the rest. Nothing if there are none."""
    for _, axis in _image_axes(domain):
        lines = [
            line
            for line in range(*box[axis])
            if all(contains(have, domain.need(_with(box, axis, (line, line + 1)), i)) for i in reads)
        ]
        if lines and len(lines) < box[axis][1] - box[axis][0]:
            here = _with(box, axis, (lines[0], lines[-1] + 1))
            if all(contains(have, domain.need(here, i)) for i in reads):  # strides may leave gaps
                return (here, *subtract(box, here))
    return ()


def _image_axes(domain: Domain) -> Iterator[tuple[int, int]]:
    """Dimensions of the output that are rows or columns, and the positions of their axes."""
    for dim, access in enumerate(domain.writes[0]):
        if isinstance(access, Along) and access.axis in ("h", "w") and not access.offset:
            yield dim, domain.axis(access.axis)


def _strip(box: Box, axis: int, parts: Sequence[tuple[int, int]], *, low: bool) -> Box | None:
    """The strip at one end of an axis that holds those of the `parts` which touch this end and are thin."""
    start, stop = box[axis]
    if low:
        lengths = [part_stop - start for part_start, part_stop in parts if part_start <= start]
    else:
        lengths = [stop - part_start for part_start, part_stop in parts if part_stop >= stop]
    thin = [length for length in lengths if 2 * length <= stop - start]
    length = -(-max(thin, default=0) // STRIP) * STRIP
    if not 0 < length < stop - start:
        return None
    return _with(box, axis, (start, start + length) if low else (stop - length, stop))


def _with(box: Box, axis: int, interval: tuple[int, int]) -> Box:
    return (*box[:axis], interval, *box[axis + 1 :])
