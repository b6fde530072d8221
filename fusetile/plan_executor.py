"""Run a partitioned plan in numpy, all devices in one process: no kernels, no sockets.

Each device holds only what its layouts give it; what it lacks is NaN until a delivery brings it. This proves layouts,
redistributions and plans; the runtime executes the same deliveries with kernels and sockets.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fusetile.box import Box, extents, slices, volume, whole
from fusetile.graph import Graph
from fusetile.ops import domain_of
from fusetile.passes.communicate import Communication, Delivery
from fusetile.plan import Layout, Plan
from fusetile.reference import run_op

Parts = list[np.ndarray | None]


def execute(
    graph: Graph, plan: Plan, communication: Communication, feeds: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """One step. Returns the loss, the gradients and the parameters' next values, assembled from the owners."""
    delivered: dict[int, Parts] = {}
    results: dict[str, np.ndarray] = {}
    waiting: dict[str, list[int]] = {}
    for index, delivery in enumerate(communication.deliveries):
        waiting.setdefault(delivery.tensor, []).append(index)

    def deliver(name: str, parts: Parts) -> None:
        layout = communication.layouts[name]
        for index in waiting.get(name, []):
            delivered[index] = _deliver(communication.deliveries[index], layout, parts)
        if name in wanted:
            results[name] = assemble(graph.tensors[name].shape, layout, parts)

    wanted = {graph.loss, *graph.gradients.values(), *graph.next_value.values()}
    initial = {name: parameter.value for name, parameter in graph.parameters.items()} | dict(feeds)
    for name, value in initial.items():
        if name in communication.layouts:
            deliver(name, [_take(value, have) for have in communication.layouts[name].have])
        for index in waiting.get(name, []) if name not in communication.layouts else []:
            delivered[index] = [_take(value, need) for need in communication.deliveries[index].need]
    for op in graph.ops.values():
        domain = domain_of(graph, op)
        produced: list[Parts] = [[None] * plan.nodes for _ in op.outputs]
        for device, box in enumerate(plan.placements[op.name].compute):
            if volume(box) == 0:
                continue
            inputs = []
            for i, name in enumerate(op.inputs):
                index = communication.reads[op.name, name]
                part = delivered[index][device]
                need = domain.need(box, i)
                inputs.append(
                    part[slices(need, communication.deliveries[index].need[device])]
                    if part is not None and volume(need)
                    else np.zeros(extents(need), graph.tensors[name].dtype)
                )
            for i, value in enumerate(run_op(graph, op, domain, box, inputs)):
                produced[i][device] = value
        for name, parts in zip(op.outputs, produced, strict=True):
            if name in communication.layouts:  # if anybody computes it
                deliver(name, parts)
    return results


def _take(value: np.ndarray, box: Box) -> np.ndarray | None:
    return value[slices(box)].copy() if volume(box) else None


def _deliver(delivery: Delivery, layout: Layout, parts: Parts) -> Parts:
    dtype = next(part.dtype for part in parts if part is not None)
    out: Parts = [_blank(need, dtype, layout.combine) for need in delivery.need]
    for device, target in enumerate(out):
        part, have, need = parts[device], layout.have[device], delivery.need[device]
        if target is not None and part is not None and delivery.in_place[device]:
            common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(have, need, strict=True))
            if all(a < b for a, b in common):
                target[slices(common, need)] = part[slices(common, have)]
    for move in delivery.moves:
        source, target = parts[move.source], out[move.target]
        assert source is not None and target is not None
        piece = source[slices(move.box, layout.have[move.source])]
        if layout.combine == "sum":
            target[slices(move.box, delivery.need[move.target])] += piece
        else:
            target[slices(move.box, delivery.need[move.target])] = piece
    return out


def _blank(need: Box, dtype: np.dtype[np.generic], combine: str) -> np.ndarray | None:
    if volume(need) == 0:
        return None
    fill = np.nan if combine == "pick" and dtype.kind == "f" else 0
    return np.full(extents(need), fill, dtype)


def assemble(shape: tuple[int, ...], layout: Layout, parts: Parts) -> np.ndarray:
    """The whole tensor from what the devices own."""
    dtype = next(part.dtype for part in parts if part is not None)
    total = np.zeros(shape, dtype)
    for part, have, own in zip(parts, layout.have, layout.own, strict=True):
        if part is None or volume(own) == 0:
            continue
        if layout.combine == "sum":
            total[slices(own, whole(shape))] += part[slices(own, have)]
        else:
            total[slices(own, whole(shape))] = part[slices(own, have)]
    return total
