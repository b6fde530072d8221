"""How a training went, as pictures: the loss of every step, and what validations have shown, in SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 580, 240, 64, 20, 28, 34
MOST_points = 600
STEPPED, SMOOTH, HELD_BACK = "#9db8e0", "#2f5fa8", "#d65f5f"
_WIDE = 30.0
"""Losses whose largest is so many times the smallest are drawn on a logarithmic scale."""
_SMOOTHED_share = 0.02  # of the steps: what a step's running mean goes back

Points = list[tuple[float, float]]


def curves(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Charts of a log's lines: the losses, and one for each metric."""
    losses = _points(records, "loss")
    if not losses:
        return
    lines = [(f"{len(losses)} steps", STEPPED, _thinned(losses))]
    if _SMOOTHED_share * len(losses) > 2:
        lines.append(("running mean", SMOOTH, _thinned(_smoothed(losses))))
    held_back = _points(records, "val_loss")
    yield _chart("loss", lines + ([("validation", HELD_BACK, held_back)] if held_back else []))
    names = dict.fromkeys(key for record in records for key in record if key.startswith("val_") and key != "val_loss")
    for name in names:
        if found := _points(records, name):
            yield _chart(name.removeprefix("val_"), [("validation", HELD_BACK, found)])


def _points(records: Sequence[Mapping[str, Any]], key: str) -> Points:
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


def _thinned(points: Points) -> Points:
    """At most so many, each the mean of some that follow each other."""
    size = math.ceil(len(points) / MOST_points)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _smoothed(points: Points) -> Points:
    """Exponential means, unbiased at the start."""
    kept = 1 - 1 / (_SMOOTHED_share * len(points))
    total, weight, found = 0.0, 0.0, []
    for x, y in points:
        total, weight = kept * total + (1 - kept) * y, kept * weight + (1 - kept)
        found.append((x, total / weight))
    return found


def _chart(title: str, lines: Sequence[tuple[str, str, Points]]) -> str:
    everything = [point for _, _, points in lines for point in points]
    (first, last), (low, high) = ((min(values), max(values)) for values in zip(*everything, strict=True))
    logarithmic = low > 0 and high > _WIDE * low
    bottom, top = (math.log10(low), math.log10(high)) if logarithmic else (low, high)
    bottom, top = (bottom - 0.5, top + 0.5) if bottom == top else (bottom, top)
    x_scale, y_scale = (WIDTH - LEFT - RIGHT) / max(last - first, 1), (HEIGHT - TOP - BOTTOM) / (top - bottom)

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - first) * x_scale, HEIGHT - BOTTOM - (
            (math.log10(y) if logarithmic else y) - bottom
        ) * y_scale

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" font-size="12">']
    parts.append(f'<text x="{LEFT}" y="14" font-weight="bold">{escape(title)}</text>')
    for tick in ticks(first, last, 6):
        x, y = place(tick, high)[0], float(HEIGHT - BOTTOM)
        parts.append(f'<path d="M{x:.1f} {y:g} v5" stroke="#888"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 18:g}" text-anchor="middle" fill="#555">{tick:g}</text>')
    for tick in _decades(low, high) if logarithmic else ticks(bottom, top, 5):
        y = place(first, tick)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f} H{WIDTH - RIGHT}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{tick:.4g}</text>')
    for number, (name, colour, points) in enumerate(lines):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if len(points) < 40:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"><title>step {point[0]:g}: {point[1]:.6g}'
                "</title></circle>"
                for point, (x, y) in ((point, place(*point)) for point in points)
            ]
        parts.append(f'<text x="{LEFT + 120 + 140 * number}" y="14" fill="{colour}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`, about so many; 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / about
    if rough <= 0:
        return [low]
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """The powers of ten from `low` to `high`, and twice and five times these if there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(exponents) < 5 else (1,)
    found = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    return [value for value in found if low <= value <= high]
