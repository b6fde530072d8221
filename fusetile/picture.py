"""report.html: a plan in pictures, made of what plan.json says.

A timeline per device: what it computes, in which phase, and the messages that it sends. Under it the feature maps,
layer by layer: the tile that each device owns, and around it, dashed, what it computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

COLOURS = ("#4878cf", "#6acc65", "#d65f5f", "#b47cc7", "#c4ad66", "#77bedb", "#e1812c", "#8c613c")
PHASES = {"forward": "#4878cf", "backward": "#d65f5f", "update": "#6acc65"}
WIDTH, ROW, MAP = 1200, 26, 120
MOST_maps = 60


def report_html(plan: Mapping[str, Any]) -> str:
    """A page of its own: no scripts, nothing loaded from elsewhere."""
    title = escape(f"{plan['model']} on {len(plan['nodes'])} device(s)")
    keys = " ".join(f'<b style="color:{colour}">{phase}</b>' for phase, colour in PHASES.items())
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>',
            "<style>body{font:14px sans-serif;margin:2em} .map{display:inline-block;margin:6px;font-size:11px}</style>",
            f"<h1>{title}</h1>",
            f"<p>Predicted step: {1e3 * plan['step_seconds']:.1f} ms. Times are those of the simulation.</p>",
            f'<h2>Timeline</h2><p>{keys} <b style="color:#999">messages sent</b></p>',
            _timeline(plan),
            "<h2>Feature maps</h2><p>What each device owns of every layer's map; dashed: what it computes.</p>",
            *_maps(plan),
            "</html>",
        ]
    )


def _timeline(plan: Mapping[str, Any]) -> str:
    nodes, timeline = plan["nodes"], plan["timeline"]
    phase = {op["name"]: op["phase"] for op in plan["ops"]}
    left, end = 110, max(plan["step_seconds"], 1e-9)

    def x(seconds: float) -> float:
        return left + (WIDTH - left - 10) * seconds / end

    parts = [f'<svg width="{WIDTH}" height="{(len(nodes) * 2 + 1) * ROW}" font-size="12">']
    for rank, node in enumerate(nodes):
        top = 2 * rank * ROW + 8
        parts.append(f'<text x="0" y="{top + 14}">{escape(node["name"])}</text>')
        for start, stop, name in timeline["works"][rank]:
            colour, what = (PHASES[phase[name]], name) if name else ("#bbb", "copies")
            parts.append(_bar(x(start), x(stop), top, ROW - 8, colour, f"{what}: {1e3 * (stop - start):.2f} ms"))
        for transfer, (start, stop) in zip(plan["transfers"], timeline["messages"], strict=True):
            if transfer["source"] == rank:
                tensor, target = transfer["parts"][0]["tensor"], nodes[transfer["target"]]["name"]
                what = f"{tensor} to {target}, {transfer['bytes']} bytes"
                parts.append(_bar(x(start), x(stop), top + ROW - 6, 8, "#999", what))
    return "".join([*parts, "</svg>"])


def _bar(start: float, stop: float, top: float, height: float, colour: str, what: str) -> str:
    width = max(stop - start, 0.3)
    return (
        f'<rect x="{start:.2f}" y="{top}" width="{width:.2f}" height="{height}" fill="{colour}" fill-opacity="0.8">'
        f"<title>{escape(what)}</title></rect>"
    )


def _maps(plan: Mapping[str, Any]) -> Iterator[str]:
    """Of every forward op whose iterations are rows and columns; at most `MOST_maps`."""
    shown = 0
    for op in plan["ops"]:
        own = [box for box in op["own"] if box]
        if op["phase"] != "forward" or not own or len(own[0]) < 4 or op["kind"] not in ("Conv", "MaxPool", "Add"):
            continue
        shown += 1
        if shown > MOST_maps:
            return
        yield _map(op)


def _map(op: Mapping[str, Any]) -> str:
    height, width = (max(box[axis][1] for box in op["own"] if box) for axis in (2, 3))
    scale = MAP / max(height, width)
    parts = [f'<svg width="{MAP + 4}" height="{height * scale + 4:.0f}">']
    for rank, (compute, own) in enumerate(zip(op["compute"], op["own"], strict=True)):
        colour = COLOURS[rank % len(COLOURS)]
        filled, dashed = f'fill="{colour}" fill-opacity="0.35"', 'fill="none" stroke-dasharray="3"'
        for box, style in ((own, filled), (compute, dashed)):
            if box:
                (top, bottom), (start, stop) = box[2], box[3]
                parts.append(
                    f'<rect x="{2 + start * scale:.1f}" y="{2 + top * scale:.1f}" stroke="{colour}" {style} '
                    f'width="{(stop - start) * scale:.1f}" height="{(bottom - top) * scale:.1f}">'
                    f"<title>{_ranges(box)}</title></rect>"
                )
    return f'<div class="map">{"".join(parts)}</svg><br>{escape(op["name"])}<br>{_cut(op["own"])}</div>'


def _cut(boxes: Sequence[Any]) -> str:
    """Along which axes the boxes differ."""
    full = [box for box in boxes if box]
    names = ("samples", "channels", "rows", "columns")
    cut = [name for axis, name in enumerate(names) if len({tuple(box[axis]) for box in full}) > 1]
    return f"{len(full)} device(s): {', '.join(cut) or 'whole'}"


def _ranges(box: Sequence[Sequence[int]]) -> str:
    return " x ".join(f"[{start},{stop})" for start, stop in box)
