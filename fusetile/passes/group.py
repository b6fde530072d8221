"""Recompute a halo or exchange it: let devices compute more than they own where that is cheaper.

    conv1 (own rows 0..7) -> relu -> conv2 needs rows 0..8      relu and conv1 compute 0..8, conv1 needs more of x

Consumers are looked at before producers. What the readers of a tensor need beyond what a device owns costs either the
producer's flops for it, or a message; the cheaper is taken. A group is then a maximal run of layers between which no
feature map moves. The idea is that of fused tiles: Rama, Threadgill, Gerstlauer, arXiv 2409.09083.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Literal

import numpy as np

from fusetile.box import Box, contains, extents, hull, intersect, subtract, volume
from fusetile.cluster import Cluster
from fusetile.cost import cost_of, is_convolution, kind_of, seconds_on
from fusetile.graph import UPDATE, Graph, Op
from fusetile.ops import Domain, domain_of, row
from fusetile.ops.base import Along
from fusetile.passes.communicate import wire_dtype
from fusetile.passes.keep import keep
from fusetile.plan import Placement, Plan

BEHIND_share = 0.6
"""Of a convolution's time, what is left when its borders are done: about."""
Halo = Literal["auto", "exchange", "recompute"]


def group(
    graph: Graph,
    plan: Plan,
    *,
    cluster: Cluster,
    halo: Halo = "auto",
    seed: int | None = None,
    keep_maps: bool = True,
    behind: bool = False,
) -> Plan:
    """Grow compute boxes along rows and columns, and leave out what is kept (keep.py) if `keep_maps`. `halo` forces one
    choice everywhere; `seed` lets a lot decide. With `behind`, what is sent of a convolution's output costs nothing if
    it may travel while the rest is computed (pieces.py): best where links are not busy anyway."""
    if plan.settled:
        return plan
    rng = np.random.default_rng(seed) if seed is not None else None
    placements = dict(plan.placements)
    readers = graph.consumers()
    for op in reversed(list(graph.topological())):
        domain = domain_of(graph, op)
        placement = placements[op.name]
        if op.phase == UPDATE or any(volume(own) and domain.is_partial(own) for own in placement.own):
            continue
        grown = []
        for device, box in enumerate(placement.compute):
            needs = [
                _needed(graph, reader, placements[reader.name].compute[device], name)
                for name in op.outputs
                for reader in readers[name]
            ]
            larger = _cover(domain, box, needs)
            lot = halo == "recompute" if rng is None else bool(rng.integers(2))
            wanted = lot or (
                rng is None and halo == "auto" and _cheaper(graph, op, domain, box, larger, cluster, device, behind)
            )
            grown.append(larger if wanted else box)
        placements[op.name] = Placement(tuple(grown), placement.own)
    return replace(plan, placements=keep(graph, placements) if keep_maps else placements, settled=True)


def _needed(graph: Graph, reader: Op, box: Box, name: str) -> Box:
    domain = domain_of(graph, reader)
    return hull([domain.need(box, i) for i, read in enumerate(reader.inputs) if read == name])


def _cover(domain: Domain, box: Box, needs: list[Box]) -> Box:
    """The compute box grown along h and w until its outputs cover the needs, as far as they overlap in n and k."""
    if volume(box) == 0:
        return box
    grown = list(box)
    output = domain.output(box)
    for dim, access in enumerate(domain.writes[0]):
        if not isinstance(access, Along) or access.axis not in ("h", "w") or access.offset:
            continue
        near = [need[dim] for need in needs if _touches(need, output)]
        axis = domain.axis(access.axis)
        grown[axis] = (
            min([box[axis][0], *(start for start, _ in near)]),
            max([box[axis][1], *(stop for _, stop in near)]),
        )
    return tuple(grown)


def _touches(need: Box, output: Box) -> bool:
    """Whether a need is a halo of this output: at least half of it is already there."""
    return 0 < volume(need) <= 2 * volume(intersect(need, output))


def _cheaper(
    graph: Graph, op: Op, domain: Domain, box: Box, larger: Box, cluster: Cluster, device: int, behind: bool
) -> bool:
    """Whether computing the difference takes less time than receiving it."""
    if contains(box, larger):
        return False
    inputs = [graph.tensors[name] for name in op.inputs]
    reduction = prod(axis.size for axis in domain.axes if axis.kind == "reduction")
    more = volume(larger) - volume(box)
    speed = cluster.nodes[device].speed(kind_of(graph, op))
    recompute = speed.seconds(more * row(op.kind).flops(op.attrs, inputs), 8 * more / reduction)
    recompute -= speed.overhead_seconds  # the op is done anyway
    missing = subtract(domain.output(larger), domain.output(box))
    elements = sum(prod(extents(piece)) for piece in missing)
    size = np.dtype(wire_dtype(graph, op.outputs[0], cluster.link)).itemsize
    exchange = cluster.link.latency_seconds + size * elements / cluster.link.bytes_per_second
    if behind and is_convolution(kind_of(graph, op)):
        exchange -= BEHIND_share * seconds_on(cost_of(graph, op, box), cluster.nodes[device])
    return recompute < exchange
