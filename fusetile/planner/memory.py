"""How much memory a plan needs on every device, before any code is generated.

The buffers are those of the plan; a buffer is live from the first to the last action that touches it, and a message
that is packed or put in place has a buffer of its own meanwhile. The most that is live at a time is nearly what
`plan_memory` makes of it: `MARGIN` covers its gaps and the scratch memory of kernels. Where that is more than there is,
`economized` asks what computing more maps again would save, and cost.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from fusetile.cluster import Cluster
from fusetile.graph import Graph
from fusetile.passes.buffers import DeviceBuffers, buffers
from fusetile.passes.communicate import Communication
from fusetile.passes.economize import Books, economize
from fusetile.passes.fit import INTERPRETER_bytes, room_bytes
from fusetile.passes.schedule import Await, Compute, Pack, Place, Post, Schedule
from fusetile.plan import Plan

MARGIN = 1.05


def needed_bytes(
    graph: Graph, plan: Plan, communication: Communication, order: Schedule, *, block: int
) -> tuple[int, ...]:
    """Per device, with what the process itself takes."""
    storage = buffers(graph, plan, communication, order.order, block=block)
    return tuple(
        int(MARGIN * _most_live(graph, communication, order, storage[device], device)) + INTERPRETER_bytes
        for device in range(plan.nodes)
    )


def economized(
    graph: Graph, plan: Plan, communication: Communication, order: Schedule, *, cluster: Cluster, block: int
) -> tuple[float, tuple[int, ...]]:
    """Seconds per step that computing again takes so that a plan fits, and how many bytes each device then still
    lacks."""
    storage = buffers(graph, plan, communication, order.order, block=block)
    scratch: list[dict[str, int]] = [{}] * plan.nodes
    books = Books(graph, plan, communication, order.order, storage, scratch, cluster=cluster)
    room = room_bytes(cluster)
    least = books.least_bytes() * MARGIN
    if (least > room).any():
        return 0.0, tuple(int(each) for each in np.maximum(0, least - room))
    found = economize(books, frozenset(), room / MARGIN, free_seconds=0.0, thorough=False)
    lacking = np.maximum(0, found.peak_bytes * MARGIN - room)
    return found.seconds, tuple(int(each) for each in lacking)


def _most_live(graph: Graph, communication: Communication, order: Schedule, storage: DeviceBuffers, device: int) -> int:
    sizes: dict[str, int] = {}
    live: dict[str, tuple[int, int]] = {}

    def touch(name: str, size_bytes: int, at: int) -> None:
        sizes[name] = size_bytes
        first, last = live.get(name, (at, at))
        live[name] = (min(first, at), max(last, at))

    def touch_message(tag: int, at: int) -> None:
        touch(f"message {tag}", order.transfers[tag].size_bytes, at)

    actions = order.actions[device]
    for name, buffer in storage.home.items():
        if name in graph.parameters:
            touch(buffer.name, buffer.size_bytes, 0)
            touch(buffer.name, buffer.size_bytes, len(actions))
    for at, action in enumerate(actions):
        match action:
            case Compute(name):
                op = graph.ops[name]
                read = [storage.delivered.get(communication.reads[name, tensor]) for tensor in op.inputs]
                for found in (*read, *(storage.home.get(tensor) for tensor in op.outputs)):
                    if found:
                        touch(found.name, found.size_bytes, at)
            case Pack(tag) | Post(tag):
                touch_message(tag, at)
            case Await(tags):
                for tag in tags:
                    touch_message(tag, at)
            case Place(index):
                if index in storage.delivered:
                    touch(storage.delivered[index].name, storage.delivered[index].size_bytes, at)
    change = [0] * (len(actions) + 2)
    for name, (first, last) in live.items():
        change[first] += sizes[name]
        change[last + 1] -= sizes[name]
    return max(accumulate(change))
