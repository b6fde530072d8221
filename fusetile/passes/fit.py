"""Hold each device's arena against its memory."""

from __future__ import annotations

from collections.abc import Sequence

from fusetile.cluster import Cluster
from fusetile.errors import DoesNotFit
from fusetile.passes.plan_memory import MemoryPlan

INTERPRETER_bytes = 48_000_000
"""What a node's process takes besides its arena: Python with numpy, the kernel library, sockets."""


def fit(memories: Sequence[MemoryPlan], *, cluster: Cluster) -> Sequence[MemoryPlan]:
    """The same memory plans, or DoesNotFit naming the device that lacks most, how much, and what would help."""
    lacking = [
        (memory.arena_bytes + INTERPRETER_bytes - node.device.memory_bytes, node, memory)
        for node, memory in zip(cluster.nodes, memories, strict=True)
        if memory.arena_bytes + INTERPRETER_bytes > node.device.memory_bytes
    ]
    if lacking:
        lack, node, memory = max(lacking, key=lambda item: item[0])
        peak, largest = _at_peak(memory)
        raise DoesNotFit(
            f"node {node.name!r} has {node.device.memory_bytes / 1e6:.0f} MB of memory and needs "
            f"{(memory.arena_bytes + INTERPRETER_bytes) / 1e6:.0f} MB ({lack / 1e6:.0f} MB too much); the most is live "
            f"at step {peak}, with {largest!r}. A smaller --batch, more nodes, or another --plan would help"
        )
    return memories


def _at_peak(memory: MemoryPlan) -> tuple[int, str]:
    """The step at which the highest buffer is taken, and its name."""
    top = max(memory.offsets, key=lambda name: memory.offsets[name])
    return memory.live[top][0], top
