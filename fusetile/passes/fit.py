"""Hold each device's arena against its memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusetile.cluster import Cluster
from fusetile.errors import DoesNotFit
from fusetile.passes.plan_memory import MemoryPlan

INTERPRETER_bytes = 48_000_000
"""What a node's process takes besides its arena: Python with numpy, the kernel library, sockets."""


def room_bytes(cluster: Cluster) -> np.ndarray:
    """What every device's memory leaves for its arena."""
    return np.array([max(1.0, node.device.memory_bytes - INTERPRETER_bytes) for node in cluster.nodes])


def fit(memories: Sequence[MemoryPlan], *, cluster: Cluster, layers: Sequence[Sequence[str]]) -> Sequence[MemoryPlan]:
    """The same memory plans, or DoesNotFit naming the device that lacks most, how much, at which of its layers (per
    step of its program), and what would help. They are what is left when everything has been tried."""
    lacking = [
        (memory.arena_bytes + INTERPRETER_bytes - node.device.memory_bytes, rank)
        for rank, (node, memory) in enumerate(zip(cluster.nodes, memories, strict=True))
    ]
    lack, rank = max(lacking)
    if lack <= 0:
        return memories
    node, memory = cluster.nodes[rank], memories[rank]
    here = layers[rank]
    at = here[memory.peak_step] if 0 <= memory.peak_step < len(here) else "the start of the step"
    largest = max(
        (name for name, (first, last) in memory.live.items() if first <= memory.peak_step <= last),
        key=lambda name: memory.sizes_bytes[name],
    )
    needs = memory.arena_bytes + INTERPRETER_bytes
    raise DoesNotFit(
        f"node {node.name!r} has {node.device.memory_bytes / 1e6:.0f} MB of memory and needs {needs / 1e6:.0f} MB: "
        f"{lack / 1e6:.0f} MB too much, at layer {at}, where the largest of what it holds is {largest!r} "
        f"({memory.sizes_bytes[largest] / 1e6:.0f} MB). That is with all computed again that makes it less: memory = "
        f'"{-(-needs // 1_000_000)}MB" is the smallest that was found to do. A smaller --batch, more nodes, another '
        f"--plan, or --momentum 0 would help"
    )
