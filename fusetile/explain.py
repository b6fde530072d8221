"""Show a plan in the terminal: devices, the critical path, groups of layers, and what crosses the network."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fusetile.errors import UserError
from fusetile.program import SCHEMA_VERSION

LONGEST_parts = 8
"""Of the critical path: so many are shown."""


def read_plan(build: Path) -> dict[str, Any]:
    """plan.json of a build; raises UserError if it is none."""
    path = build / "plan.json"
    try:
        plan: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder that `fusetile compile` wrote") from None
    except ValueError as error:
        raise UserError(f"{path}: not a plan: {error}") from None
    if not isinstance(plan, dict) or plan.get("schema") != SCHEMA_VERSION:
        raise UserError(f"{path}: not a plan of schema {SCHEMA_VERSION}, which this fusetile reads; compile again")
    return plan


def explain_build(build: Path, console: Console, *, as_json: bool) -> None:
    """Print the plan of a build."""
    plan = read_plan(build)
    if as_json:
        print(json.dumps(plan, indent=1))
        return
    training = plan["training"]
    console.print(
        f"[bold]{plan['model']}[/]: batch {training['batch']}, {training['loss']}, plan {training['plan']}, "
        f"{training['wire']} on the wire, "
        f"{len(plan['nodes'])} node(s), {len(plan['ops'])} ops, {len(plan['transfers'])} messages per step"
    )
    console.print(devices_table(plan))
    console.print(recomputed_text(plan), highlight=False)
    _print_prediction(plan, console)
    _print_critical_path(plan, console)
    console.print("Groups: runs of layers for which no feature map moves between devices", style="bold")
    for number, group in enumerate(plan["groups"], 1):
        _print_group(plan, number, group, console)


def _print_prediction(plan: dict[str, Any], console: Console) -> None:
    """How long a step is predicted to take; of a plan that was searched for also how good it is."""
    console.print(f"Predicted step: {_milliseconds(plan['step_seconds'])} (event simulation)", highlight=False)
    search = plan["search"]
    if search is None:
        return
    console.print(
        f"Analytic model: best plan {_milliseconds(search['model_seconds'])}, no plan of its candidates is below "
        f"{_milliseconds(search['bound_seconds'])}: gap {100 * search['gap']:.1f} %",
        highlight=False,
    )
    others = search["simulated_seconds"].items()
    others_text = ", ".join(f"{name} {_milliseconds(seconds)}" for name, seconds in others if name != search["chosen"])
    if others_text:
        console.print(f"The best plan of every rule would take: {others_text}", highlight=False)
    if search["chosen"] != "batch" and "batch" in search["simulated_seconds"]:
        console.print(_why_not_data_parallel(plan), highlight=False)


def _why_not_data_parallel(plan: dict[str, Any]) -> str:
    batch, nodes = plan["training"]["batch"], len(plan["nodes"])
    seconds = plan["search"]["simulated_seconds"]["batch"]
    weights_bytes = plan["parameter_bytes"]
    exchange = 2 * (nodes - 1) / nodes * weights_bytes / plan["link"]["bytes_per_second"]
    idle = f"only {batch} of {nodes} devices would have a sample; " if batch < nodes else ""
    return (
        f"Data parallel would take {_milliseconds(seconds)}: {idle}gradients and weights of {megabytes(weights_bytes)} "
        f"keep every link busy for {_milliseconds(exchange)} per step"
    )


def _print_critical_path(plan: dict[str, Any], console: Console) -> None:
    """How long the step's end waited for computing and for messages, and for which of them longest."""
    path = plan["critical_path"]
    messages = [stretch for stretch in path if "tag" in stretch]
    away = sum(stretch["stop"] - stretch["start"] for stretch in messages)
    console.print(
        f"[bold]Critical path[/]: {_milliseconds(plan['step_seconds'] - away)} of computing, {_milliseconds(away)} "
        f"while {len(messages)} message(s) came, their turn on the link included. Its longest parts, in order:",
        highlight=False,
    )
    parts = _joined_path(plan)
    longest = sorted(parts, key=lambda part: -part[0])[:LONGEST_parts]
    for part in parts:
        if part in longest:
            console.print(f"     {_milliseconds(part[0]):>10}  {part[1]}", markup=False, highlight=False)


def _joined_path(plan: dict[str, Any]) -> list[tuple[float, str]]:
    """The critical path's parts, with their seconds: a message, or all that a node does between two of them."""
    group_of = {name: i for i, group in enumerate(plan["groups"], 1) for name in group["ops"]}
    names = [node["name"] for node in plan["nodes"]]
    parts = []
    for (node, tag), stretches in groupby(plan["critical_path"], key=lambda each: (each["node"], each.get("tag"))):
        run = list(stretches)
        if tag is not None:
            transfer = plan["transfers"][tag]
            what = f"{_tensors(transfer)} from {names[transfer['source']]} to {names[node]}"
            what += f", {megabytes(transfer['bytes'])}"
        else:
            groups = sorted({group_of[each["op"]] for each in run if each["op"] in group_of})
            what = f"{names[node]} computes {_numbered(groups) if groups else 'updates of weights'}"
        parts.append((run[-1]["stop"] - run[0]["start"], what))
    return parts


def _numbered(groups: list[int]) -> str:
    return f"group {groups[0]}" if len(groups) == 1 else f"groups {groups[0]} to {groups[-1]}"


def _tensors(transfer: dict[str, Any]) -> str:
    first, *others = dict.fromkeys(part["tensor"] for part in transfer["parts"])
    return f"{first} and {len(others)} more" if others else str(first)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def devices_table(plan: dict[str, Any]) -> Table:
    """A row per device: memory, predicted computation, bytes sent."""
    table = Table(
        "node", "device, cores", "address", "arena", "of memory", "compute per step", "sent per step", title="Devices"
    )
    table.columns[2].no_wrap = True
    for column in table.columns[3:]:
        column.justify = "right"
    for node in plan["nodes"]:
        table.add_row(
            node["name"],
            f"{node['device']}, {node['cores']}",
            node["address"],
            megabytes(node["arena_bytes"]),
            f"{100 * node['arena_bytes'] / node['memory_bytes']:.1f} %",
            f"{1e3 * node['compute_seconds']:.1f} ms",
            megabytes(node["sent_bytes"]),
        )
    table.caption = "compute and sent are predictions; the arena is what the node will hold"
    return table


def recomputed_text(plan: dict[str, Any]) -> str:
    """What is computed twice, what that costs and saves."""
    maps, seconds = plan["recomputed"]["maps"], plan["recomputed"]["seconds"]
    if not maps:
        return "All maps that the backward pass reads are kept"
    rest = plan["step_seconds"] - seconds
    share = f" (+{100 * seconds / rest:.1f} %)" if rest > 0 else ""
    saved = [f"{megabytes(node['saved_bytes'])} on {node['name']}" for node in plan["nodes"] if node["saved_bytes"]]
    text = f"Recomputes {maps} maps in the backward pass: {_milliseconds(seconds)} of a step{share}"
    return text + (f", saves {', '.join(saved)}" if saved else "")


def _print_group(plan: dict[str, Any], number: int, group: dict[str, Any], console: Console) -> None:
    """The layers, what arrives for them, and the part of the last one's output that every device owns."""
    ops = {op["name"]: op for op in plan["ops"]}
    layers = list(dict.fromkeys(ops[name]["origin"] or name for name in group["ops"]))
    console.print(
        f"{number:3}  {group['phase']}, {len(group['ops'])} ops, {_received(group)}{_again(group)}", highlight=False
    )
    console.print(f"     {_short(layers)}", style="dim", highlight=False)
    hidden = max(0.0, group["transfer_seconds"] - group["waited_seconds"])
    console.print(
        f"     computes {_milliseconds(group['compute_seconds'])}, waits {_milliseconds(group['waited_seconds'])}, "
        f"maps travel {_milliseconds(group['transfer_seconds'])} ({_milliseconds(hidden)} of it hidden)",
        highlight=False,
    )
    console.print(f"     {_split(plan, group)}; memory up to {megabytes(group['memory_bytes'])}", highlight=False)
    for node, box in zip(plan["nodes"], group["boxes"], strict=True):
        part = "x".join(f"[{start},{stop})" for start, stop in box) if box else "nothing"
        console.print(f"     {node['name']:12} {part}", markup=False, highlight=False)


def _received(group: dict[str, Any]) -> str:
    """Borders of tiles are halos; all else that comes is redistributed maps."""
    received, halos = group["received_bytes"], group["halo_bytes"]
    kinds = {"halos": halos, "redistributed maps": received - halos}
    text = " and ".join(f"{megabytes(size)} of {kind}" for kind, size in kinds.items() if size)
    return f"{text} received first" if text else "no feature map received"


def _split(plan: dict[str, Any], group: dict[str, Any]) -> str:
    """How the last layer of a group is divided among the devices."""
    names = [node["name"] for node, box in zip(plan["nodes"], group["boxes"], strict=True) if box]
    parts = ", ".join(f"{name} in {count}" for name, count in group["split"].items())
    if len(names) == 1:
        return f"on {names[0]} alone"
    where = "" if len(names) == len(plan["nodes"]) else f" on {', '.join(names)}"
    return f"split: {parts}{where}" if parts else f"the same{where or ' on all nodes'}"


def _again(group: dict[str, Any]) -> str:
    """What overlapping tiles cost."""
    extra = group["computed_flops"] / group["needed_flops"] - 1 if group["needed_flops"] else 0.0
    return f", {100 * extra:.1f} % computed more than once" if extra > 5e-4 else ""


def _short(layers: list[str]) -> str:
    """All names of a short run, first and last of a long one."""
    return ", ".join(layers) if len(layers) <= 4 else f"{layers[0]} ... {layers[-1]} ({len(layers)} layers)"


def megabytes(size_bytes: float) -> str:
    """`12.3 MB`; small sizes in kB."""
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.1f} kB"
