"""Keep a map that has come from other devices, where computing it again would mean sending it again.

y -> (sent) -> Conv            Normalize -> y.again -> (sent) -> ConvWeightGrad

The weight gradient reads the y that was delivered to Conv; y.again is computed nowhere: its boxes are empty.
"""

from __future__ import annotations

from collections.abc import Mapping

from fusetile.box import Box, contains, empty, hull, volume
from fusetile.graph import FORWARD, Graph, Op
from fusetile.ops import domain_of
from fusetile.plan import Placement


def keep(graph: Graph, placements: Mapping[str, Placement]) -> dict[str, Placement]:
    """The placements, with empty boxes for ops that are not to be computed again. `graph` must be in topological
    order."""
    result = dict(placements)
    readers = graph.consumers()
    for name, first in reversed(originals(graph).items()):
        op = graph.ops[name]
        after = [reader for read in op.outputs for reader in readers[read]]
        unread = all(is_left_out(result[reader.name]) for reader in after)
        if unread or any(
            _is_sent_again(graph, placements, op, first, i, reader, readers[first.outputs[i]])
            for i, read in enumerate(op.outputs)
            for reader in readers[read]
        ):
            nothing = (empty(len(domain_of(graph, op).axes)),) * len(result[name].own)
            result[name] = Placement(nothing, nothing)
    return result


def is_left_out(placement: Placement) -> bool:
    """Whether no device computes an op."""
    return not any(map(volume, placement.own))


def originals(graph: Graph) -> dict[str, Op]:
    """Ops that compute again what a forward op computes -> that op, in the order of the graph."""
    forward: dict[tuple[str, tuple[str, ...], str], Op] = {}
    found: dict[str, Op] = {}
    same: dict[str, str] = {}  # tensor -> the one that it repeats
    for op in graph.ops.values():
        key = (op.kind, tuple(same.get(name, name) for name in op.inputs), repr(sorted(op.attrs.items())))
        if op.phase == FORWARD:
            forward.setdefault(key, op)
        elif key in forward:
            found[op.name] = forward[key]
            same.update(zip(op.outputs, forward[key].outputs, strict=True))
    return found


def _is_sent_again(
    graph: Graph, placements: Mapping[str, Placement], op: Op, first: Op, i: int, reader: Op, before: list[Op]
) -> bool:
    """Whether devices lack something of output `i` for a reader, all of which they had for one of `before`, the readers
    of the same output of `first`."""
    needs = _needs(graph, placements, reader, op.outputs[i])
    have = [domain_of(graph, op).output(box, i) for box in placements[op.name].compute]
    if _covers(have, needs):
        return False
    earlier = [_needs(graph, placements, other, first.outputs[i]) for other in before if other.phase == FORWARD]
    return any(_covers(had, needs) for had in earlier)


def _covers(have: list[Box], needs: list[Box]) -> bool:
    return all(contains(has, need) for has, need in zip(have, needs, strict=True))


def _needs(graph: Graph, placements: Mapping[str, Placement], op: Op, name: str) -> list[Box]:
    domain = domain_of(graph, op)
    return [
        hull([domain.need(box, i) for i, read in enumerate(op.inputs) if read == name])
        for box in placements[op.name].compute
    ]
