"""Golden texts: what a pass makes of a small network, kept in the folder `golden` next to the tests.

FUSETILE_GOLDEN=write pytest tests/passes writes them anew; look at the difference before you commit it.
"""

from __future__ import annotations

import os
from pathlib import Path

from fusetile.box import text, volume
from fusetile.graph import Graph
from fusetile.passes.buffers import DeviceBuffers
from fusetile.passes.communicate import Communication
from fusetile.passes.plan_memory import MemoryPlan
from fusetile.passes.schedule import Await, Compute, Place, Schedule
from fusetile.plan import Plan
from tests.graphs import Net

FOLDER = Path(__file__).parent / "golden"


def assert_golden(name: str, found: str) -> None:
    """Compare with golden/NAME.txt."""
    path = FOLDER / f"{name}.txt"
    if os.environ.get("FUSETILE_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert found == path.read_text()
    assert 1 <= len(found.splitlines()) <= 80, "a golden text is for reading"


def small(batch: int = 2) -> Graph:
    """Convolution, ReLU, max pool, fully connected: one layer of each kind that plans treat differently."""
    net = Net((batch, 3, 8, 6))
    x = net.max_pool(net.relu(net.conv(net.x, 12, bias=True)))
    return net.done(net.gemm(net.flatten(x), 4, bias=False))


def plan_text(graph: Graph, plan: Plan) -> str:
    """Per op its axes, and per device what it computes, and owns where that is less."""
    from fusetile.ops import domain_of

    lines = []
    for op in graph.ops.values():
        placement, axes = plan.placements[op.name], " ".join(axis.name for axis in domain_of(graph, op).axes)
        lines.append(f"{op.name}: {op.kind} {axes}")
        for device, (compute, own) in enumerate(zip(placement.compute, placement.own, strict=True)):
            owned = "" if compute == own else f"   owns {text(own) if volume(own) else 'nothing'}"
            lines.append(f"  {device} {text(compute) if volume(compute) else 'nothing'}{owned}")
    return "\n".join(lines) + "\n"


def communication_text(communication: Communication) -> str:
    """Per delivery the readers, what each device needs, and the moves."""
    lines = []
    for delivery in communication.deliveries:
        layout = communication.layouts.get(delivery.tensor)
        lines.append(f"{delivery.tensor} ({layout.combine if layout else 'fed'}) to {', '.join(delivery.readers)}")
        for device, (need, here) in enumerate(zip(delivery.need, delivery.in_place, strict=True)):
            if volume(need):
                lines.append(f"  {device} needs {text(need)}{' in place' if here else ''}")
        lines += [f"    {move.source} -> {move.target} {text(move.box)}" for move in delivery.moves]
    return "\n".join(lines) + "\n"


def schedule_text(schedule: Schedule, communication: Communication) -> str:
    """Per device its actions in order; transfers are numbered."""
    lines = []
    for t in schedule.transfers:
        parts = (f"{communication.deliveries[p.delivery].tensor} {text(p.move.box)}" for p in t.parts)
        lines.append(f"{t.tag}: {t.source} -> {t.target} {', '.join(parts)}")
    for device, actions in enumerate(schedule.actions):
        lines.append(f"device {device}")
        for action in actions:
            match action:
                case Compute(op):
                    lines.append(f"  compute {op}")
                case Await(tags):
                    lines.append(f"  await {' '.join(map(str, tags))}")
                case Place(delivery):
                    lines.append(f"  place {communication.deliveries[delivery].tensor}")
                case _:
                    lines.append(f"  {type(action).__name__.lower()} {action.tag}")
    return "\n".join(lines) + "\n"


def buffers_text(storage: tuple[DeviceBuffers, ...]) -> str:
    """Per device its buffers, each once."""
    lines = []
    for device, held in enumerate(storage):
        lines.append(f"device {device}")
        for buffer in dict.fromkeys((*held.home.values(), *held.delivered.values())):
            lines.append(
                f"  {buffer.name}: {text(buffer.box)} {buffer.dtype} block {buffer.block} border {buffer.border}"
            )
    return "\n".join(lines) + "\n"


def memory_text(memory: MemoryPlan) -> str:
    """By offset."""
    lines = [f"{memory.arena_bytes} bytes"]
    for name, offset in sorted(memory.offsets.items(), key=lambda item: (item[1], memory.live[item[0]], item[0])):
        lines.append(f"  {offset:6} {name} live {memory.live[name][0]}..{memory.live[name][1]}")
    return "\n".join(lines) + "\n"
