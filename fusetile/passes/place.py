"""Place every op of a graph on the devices, given the split of every layer.

Forward ops and their backward followers share a layer's split. Updates follow the parameters: every device updates a
shard of what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fusetile.box import Box, empty, hull, intersect, volume, whole
from fusetile.graph import UPDATE, Graph, Op
from fusetile.ops import domain_of, row
from fusetile.ops.update import shards_box
from fusetile.passes.tile import Split, shard, tile
from fusetile.plan import Placement, Plan


def place(graph: Graph, splits: Mapping[str, Split], *, speeds: Sequence[float], block: int) -> Plan:
    """`splits`: by the name of the layer's forward op. `speeds` and `block` as in `tile`."""
    placements = {
        op.name: tile(domain_of(graph, op), split=splits[op.layer], speeds=speeds, block=block)
        for op in graph.ops.values()
        if op.phase != UPDATE
    }
    return Plan(len(speeds), placements | place_updates(graph, placements, speeds=speeds, block=block))


def place_updates(
    graph: Graph, placements: Mapping[str, Placement], *, speeds: Sequence[float], block: int
) -> dict[str, Placement]:
    """Placements of the ops that update parameters, given those of all others."""
    readers = graph.consumers()
    placed: dict[str, Placement] = {}
    updates = [op for op in graph.ops.values() if op.phase == UPDATE]
    for turns, op in enumerate(op for op in updates if row(op.kind).in_place):
        _, position = row(op.kind).in_place[0]
        parameter = op.inputs[position]
        reads = [(reader, placements[reader.name]) for reader in readers[parameter] if reader.phase != UPDATE]
        needs = parameter_needs(graph, parameter, reads, nodes=len(speeds))
        shape, axes = graph.tensors[op.outputs[0]].shape, len(domain_of(graph, op).axes)
        shards = shards_of(shape, needs, speeds=speeds, block=block, turns=turns)
        own = tuple(piece[:axes] if volume(piece) else empty(axes) for piece in shards)
        placed[op.name] = Placement(own, own)
    clipping = {
        op.name: _place_clipping(graph, op, placed, nodes=len(speeds)) for op in updates if op.name not in placed
    }
    return placed | clipping


def _place_clipping(graph: Graph, op: Op, updates: Mapping[str, Placement], *, nodes: int) -> Placement:
    """The norm is added up from the shards that are updated; everyone makes the factor of it."""
    everything = domain_of(graph, op).box
    if op.kind != "GradientNorm":
        return Placement((everything,) * nodes, (everything, *[empty(len(everything))] * (nodes - 1)))
    readers = graph.consumers()
    of = [next(updates[reader.name] for reader in readers[name] if reader.name in updates) for name in op.inputs]
    gradients = [graph.tensors[name] for name in op.inputs]
    own = tuple(shards_box(gradients, [placement.own[device] for placement in of]) for device in range(nodes))
    return Placement(own, own)


def parameter_needs(
    graph: Graph, parameter: str, readers: Sequence[tuple[Op, Placement]], *, nodes: int
) -> tuple[Box, ...]:
    """Per device, the box of a parameter that its forward and backward ops read."""
    boxes: list[list[Box]] = [[empty(len(graph.tensors[parameter].shape))] for _ in range(nodes)]
    for reader, placement in readers:
        domain = domain_of(graph, reader)
        for device, box in enumerate(placement.compute):
            if volume(box):
                boxes[device] += [domain.need(box, i) for i, name in enumerate(reader.inputs) if name == parameter]
    return tuple(hull(found) for found in boxes)


def shards_of(
    shape: Sequence[int], needs: Sequence[Box], *, speeds: Sequence[float], block: int, turns: int = 0
) -> tuple[Box, ...]:
    """Shards of a parameter: each distinct box of it that devices need is cut among the devices that need it. `turns`:
    small parameters are owned by one device each, not always by the same."""
    everything = whole(shape)
    held = {box for box in needs if volume(box)}
    apart = all(a == b or volume(intersect(a, b)) == 0 for a in held for b in held)
    if not apart or sum(map(volume, held)) != volume(everything):
        needs, held = [everything] * len(speeds), {everything}
    own = [empty(len(shape))] * len(speeds)
    for box in sorted(held):
        holders = [device for device, need in enumerate(needs) if need == box]
        turn = turns % len(holders)
        for device, piece in shard(box, holders=holders[turn:] + holders[:turn], speeds=speeds, block=block).items():
            own[device] = piece
    return tuple(own)
