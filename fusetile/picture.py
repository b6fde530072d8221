"""report.html: a plan in pictures, made of what plan.json says; and how the training went, if there was one.

Devices with their memory. A timeline for each: what it computes, in which phase, and the messages that it sends. Under
it the feature maps, layer by layer: the tile that each device owns, and around it, dashed, what it computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from fusetile.curves import curves, ticks

COLOURS = ("#4878cf", "#e1812c", "#3a923a", "#b47cc7", "#c4ad66", "#77bedb", "#d65f5f", "#8c613c")
PHASES = {"forward": "#4878cf", "backward": "#d65f5f", "update": "#6acc65"}
SENT, COPIED, CRITICAL = "#999", "#bbb", "#111"
WIDTH, ROW, MAP, GAP, LEFT = 1200, 26, 120, 4, 110
MOST_maps = 60
SHOWN = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "Resize", "Add", "Concat")
"""Kinds of ops whose maps are drawn."""
AXES = ("samples", "channels", "rows", "columns")
STYLE = """
body { font: 14px sans-serif; margin: 2em; max-width: 1200px; color: #222 }
h2 { margin: 1.6em 0 0.4em }
p { margin: 0.4em 0 }
table { border-collapse: collapse }
th, td { padding: 3px 14px 3px 0; text-align: right }
th { color: #666; font-weight: normal }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
.map { display: inline-block; margin: 6px 12px 6px 0; font-size: 11px; vertical-align: top }
.key { display: inline-block; width: 11px; height: 11px; margin-right: 5px }
svg { max-width: 100%; height: auto }
"""


def report_html(plan: Mapping[str, Any], steps: Sequence[Mapping[str, Any]] = ()) -> str:
    """A page of its own: no scripts, nothing loaded from elsewhere. `steps`: the log of a training."""
    nodes, training = plan["nodes"], plan["training"]
    title = escape(f"{plan['model']} on {_many(len(nodes), 'device')}")
    sizes = {"batch": f"batch {training['batch']}", "loss": training["loss"], "plan": f"plan {training['plan']}"}
    keys = {**PHASES, "copies": COPIED, "messages sent": SENT, "outlined: the critical path": CRITICAL}
    charts = list(curves(steps))
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            f"<p>{escape(', '.join(sizes.values()))}. Predicted step: {1e3 * plan['step_seconds']:.1f} ms.</p>",
            *(["<h2>Training</h2>", *charts] if charts else []),
            "<h2>Devices</h2>",
            _devices(plan),
            f"<h2>Timeline</h2><p>{_keys(keys)}</p>",
            "<p>One step, as the simulation predicts it, in milliseconds.</p>",
            _timeline(plan),
            "<h2>Feature maps</h2><p>What each device owns of every layer's map; dashed: what it computes. Parts of "
            "the samples or of the channels are drawn side by side.</p>",
            f"<p>{_keys({node['name']: _colour(rank) for rank, node in enumerate(nodes)})}</p>",
            *_maps(plan),
            "</body></html>",
        ]
    )


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def _colour(rank: int) -> str:
    return COLOURS[rank % len(COLOURS)]


def _keys(colours: Mapping[str, str]) -> str:
    return " &#160; ".join(f"{_key(colour)}{escape(name)}" for name, colour in colours.items())


def _key(colour: str) -> str:
    return f'<span class="key" style="background:{colour}"></span>'


def _devices(plan: Mapping[str, Any]) -> str:
    """A row for each: how much of its memory and of a step's time it needs."""
    heads = ("node", "device", "address", "memory for buffers", "of", "computes", "of a step", "sends")
    rows = [f"<tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>"]
    for rank, node in enumerate(plan["nodes"]):
        busy = node["compute_seconds"] / max(plan["step_seconds"], 1e-9)
        cells = (
            f"{_key(_colour(rank))}{escape(node['name'])}",
            f"{escape(node['device'])}, {_many(node['cores'], 'core')}",
            escape(node["address"]),
            f"{node['arena_bytes'] / 1e6:.2f} MB {_gauge(node['arena_bytes'] / node['memory_bytes'])}",
            f"{node['memory_bytes'] / 1e6:.0f} MB",
            f"{1e3 * node['compute_seconds']:.1f} ms {_gauge(busy)}",
            f"{100 * busy:.0f} %",
            f"{node['sent_bytes'] / 1e6:.2f} MB",
        )
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _gauge(part: float) -> str:
    """A bar that is filled to a part of it."""
    filled = 80 * min(part, 1.0)
    return (
        '<svg width="80" height="9"><rect width="80" height="9" fill="#e4e4e4"/>'
        f'<rect width="{filled:.1f}" height="9" fill="#4878cf"/></svg>'
    )


def _timeline(plan: Mapping[str, Any]) -> str:
    nodes, timeline = plan["nodes"], plan["timeline"]
    phase = {op["name"]: op["phase"] for op in plan["ops"]}
    critical = {each.get("tag", (each["node"], each["start"])) for each in plan["critical_path"]}
    end = max(plan["step_seconds"], 1e-9)

    def x(seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * seconds / end

    bottom = 2 * len(nodes) * ROW + 4
    parts = [f'<svg viewBox="0 0 {WIDTH} {bottom + ROW}" width="{WIDTH}" font-size="12">']
    for milliseconds in ticks(0.0, 1e3 * end, 10):
        at = x(1e-3 * milliseconds)
        parts.append(f'<path d="M{at:.1f} 4 V{bottom + 4}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#555">{milliseconds:g}</text>')
    for rank, node in enumerate(nodes):
        top = 2 * rank * ROW + 8
        parts.append(f'<text x="0" y="{top + 14}">{escape(node["name"])}</text>')
        for start, stop, name in timeline["works"][rank]:
            colour, what = (PHASES[phase[name]], name) if name else (COPIED, "copies")
            what += f": {1e3 * (stop - start):.2f} ms"
            parts.append(_bar(x(start), x(stop), top, ROW - 8, colour, what, outlined=(rank, start) in critical))
        for tag, (transfer, (start, stop)) in enumerate(zip(plan["transfers"], timeline["messages"], strict=True)):
            if transfer["source"] == rank:
                tensor, target = transfer["parts"][0]["tensor"], nodes[transfer["target"]]["name"]
                what = f"{tensor} to {target}, {transfer['bytes']} bytes"
                parts.append(_bar(x(start), x(stop), top + ROW - 6, 8, SENT, what, outlined=tag in critical))
    return "".join([*parts, "</svg>"])


def _bar(start: float, stop: float, top: float, height: float, colour: str, what: str, *, outlined: bool) -> str:
    width = max(stop - start, 0.3)
    outline = f' stroke="{CRITICAL}" stroke-width="0.8"' if outlined else ""
    return (
        f'<rect x="{start:.2f}" y="{top}" width="{width:.2f}" height="{height}" fill="{colour}" fill-opacity="0.8"'
        f"{outline}><title>{escape(what)}</title></rect>"
    )


def _maps(plan: Mapping[str, Any]) -> Iterator[str]:
    """Of every forward op whose iterations are rows and columns; at most `MOST_maps`."""
    drawn = [
        op
        for op in plan["ops"]
        if op["phase"] == "forward" and op["kind"] in SHOWN and any(box and len(box) >= 4 for box in op["own"])
    ]
    yield from (_map(op, plan["nodes"]) for op in drawn[:MOST_maps])
    if len(drawn) > MOST_maps:
        yield f"<p>And {len(drawn) - MOST_maps} more.</p>"


def _map(op: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> str:
    """A map's panels: one for each part of the samples and channels that some device owns."""
    height, width = (max(box[axis][1] for box in op["own"] if box) for axis in (2, 3))
    boxes = [
        (rank, own or compute, own, compute)
        for rank, (own, compute) in enumerate(zip(op["own"], op["compute"], strict=True))
    ]
    boxes = [each for each in boxes if each[1]]
    panels = sorted({_panel(box) for _, box, _, _ in boxes})
    scale = min(MAP / height, (MAP - GAP * (len(panels) - 1)) / (width * len(panels)))
    parts = [f'<svg width="{MAP + 4}" height="{height * scale + 4:.0f}">']
    for rank, box, own, compute in boxes:
        left = 2 + panels.index(_panel(box)) * (width * scale + GAP)
        filled, dashed = f'fill="{_colour(rank)}" fill-opacity="0.35"', 'fill="none" stroke-dasharray="3"'
        for part, style in ((own, filled), (compute, dashed)):
            if part:
                (top, bottom), (start, stop) = part[2], part[3]
                parts.append(
                    f'<rect x="{left + start * scale:.1f}" y="{2 + top * scale:.1f}" stroke="{_colour(rank)}" {style} '
                    f'width="{(stop - start) * scale:.1f}" height="{(bottom - top) * scale:.1f}">'
                    f"<title>{escape(nodes[rank]['name'])}: {_ranges(part)}</title></rect>"
                )
    return f'<div class="map">{"".join(parts)}</svg><br>{escape(op["name"])}<br>{_cut(op["own"])}</div>'


def _panel(box: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, box[:2]))


def _cut(boxes: Sequence[Any]) -> str:
    """The size of the map, and along which axes the devices' boxes differ."""
    full = [box for box in boxes if box]
    size = "x".join(str(max(box[axis][1] for box in full)) for axis in (1, 2, 3))
    cut = [name for axis, name in enumerate(AXES) if len({tuple(box[axis]) for box in full}) > 1]
    return f"{size}, {_many(len(full), 'device')}" + (f": {', '.join(cut)}" if cut else "")


def _ranges(box: Sequence[Sequence[int]]) -> str:
    return ", ".join(f"{name} {start}-{stop}" for name, (start, stop) in zip(AXES, box, strict=False))
