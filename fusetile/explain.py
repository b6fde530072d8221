"""Show a plan in the terminal: devices, groups of layers with their boxes, and what crosses the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fusetile.errors import UserError
from fusetile.program import SCHEMA_VERSION


def explain_build(build: Path, console: Console, *, as_json: bool) -> None:
    """Print the plan of a build; raises UserError if it is none."""
    path = build / "plan.json"
    try:
        plan = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder that `fusetile compile` wrote") from None
    except ValueError as error:
        raise UserError(f"{path}: not a plan: {error}") from None
    if plan.get("schema") != SCHEMA_VERSION:
        raise UserError(f"{path}: schema {plan.get('schema')}, this fusetile reads {SCHEMA_VERSION}; compile again")
    if as_json:
        print(json.dumps(plan, indent=1))
        return
    training = plan["training"]
    console.print(
        f"[bold]{plan['model']}[/]: batch {training['batch']}, {training['loss']}, plan {training['plan']}, "
        f"{len(plan['nodes'])} node(s), {len(plan['ops'])} ops, {len(plan['transfers'])} messages per step"
    )
    console.print(_devices(plan))
    console.print(_groups(plan))


def _devices(plan: dict[str, Any]) -> Table:
    table = Table(
        "node", "device", "address", "arena", "of memory", "compute per step", "sent per step", title="Devices"
    )
    for column in table.columns[3:]:
        column.justify = "right"
    for node in plan["nodes"]:
        table.add_row(
            node["name"],
            f"{node['device']}, {node['cores']} cores",
            node["address"],
            megabytes(node["arena_bytes"]),
            f"{100 * node['arena_bytes'] / node['memory_bytes']:.1f} %",
            f"{1e3 * node['compute_seconds']:.1f} ms",
            megabytes(node["sent_bytes"]),
        )
    table.caption = "compute and sent are predictions; the arena is what the node will hold"
    return table


def _groups(plan: dict[str, Any]) -> Table:
    """A row per group: its layers, what arrives for it, and the box of its last output on every device."""
    names = [node["name"] for node in plan["nodes"]]
    title = "Groups: runs of layers without a feature map moving between devices"
    table = Table("phase", "layers", "received", *names, title=title, show_lines=True)
    table.columns[2].justify = "right"
    kinds = {op["name"]: op["kind"] for op in plan["ops"]}
    for group in plan["groups"]:
        boxes = [" ".join(f"{a}:{b}" for a, b in box) if box else "-" for box in group["boxes"]]
        table.add_row(
            group["phase"], _run([kinds[name] for name in group["ops"]]), megabytes(group["received_bytes"]), *boxes
        )
    table.caption = "boxes: start:stop per dimension of the group's last output that the node owns (n c h w)"
    return table


def _run(kinds: list[str]) -> str:
    """`Conv, 2 Normalize`: kinds in order, runs counted."""
    words: list[tuple[str, int]] = []
    for kind in kinds:
        if words and words[-1][0] == kind:
            words[-1] = (kind, words[-1][1] + 1)
        else:
            words.append((kind, 1))
    return ", ".join(kind if count == 1 else f"{count} {kind}" for kind, count in words)


def megabytes(size_bytes: float) -> str:
    """`12.3 MB`; small sizes in kB."""
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.1f} kB"
