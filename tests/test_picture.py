"""report.html: well-formed; with a bar for all that takes time, a tile for every device, a curve for each value."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from fusetile.curves import ticks
from fusetile.picture import report_html

DEVICE = {"device": "pi4", "cores": 4, "address": "h:1", "memory_bytes": 10**9, "compute_seconds": 0.004}
PLAN: dict[str, Any] = {
    "model": "a <model>",
    "training": {"batch": 2, "loss": "mse", "plan": "auto"},
    "step_seconds": 0.01,
    "nodes": [
        {"name": "kitchen", "arena_bytes": 25 * 10**7, "sent_bytes": 640, **DEVICE},
        {"name": "attic", "arena_bytes": 0, "sent_bytes": 0, **DEVICE},
    ],
    "ops": [
        {
            "name": "conv1",
            "kind": "Conv",
            "phase": "forward",
            "own": [[[0, 2], [0, 8], [0, 4], [0, 8], [0, 3]], [[0, 2], [0, 8], [4, 8], [0, 8], [0, 3]]],
            "compute": [[[0, 2], [0, 8], [0, 5], [0, 8], [0, 3]], [[0, 2], [0, 8], [4, 8], [0, 8], [0, 3]]],
        },
        {
            "name": "pool",
            "kind": "MaxPool",
            "phase": "forward",
            "own": [[[0, 1], [0, 8], [0, 4], [0, 4]], [[1, 2], [0, 8], [0, 4], [0, 4]]],
            "compute": [[[0, 1], [0, 8], [0, 4], [0, 4]], [[1, 2], [0, 8], [0, 4], [0, 4]]],
        },
        {"name": "grad", "kind": "ConvWeightGrad", "phase": "backward", "own": [None, None], "compute": [None, None]},
    ],
    "transfers": [{"source": 0, "target": 1, "bytes": 640, "parts": [{"tensor": "y"}]}],
    "critical_path": [
        {"node": 0, "start": 0.0, "stop": 0.004, "op": "conv1"},
        {"node": 1, "start": 0.004, "stop": 0.005, "tag": 0},
    ],
    "timeline": {
        "works": [[[0.0, 0.004, "conv1"], [0.005, 0.01, "grad"]], [[0.0, 0.004, "conv1"], [0.004, 0.0041, ""]]],
        "messages": [[0.004, 0.005]],
    },
}


def pictures(page: str) -> list[ElementTree.Element]:
    body = page[page.index("<h1>") : page.index("</body>")]
    return list(ElementTree.fromstring(f"<body>{body.replace('<br>', '')}</body>").iter("svg"))


def test_the_report_shows_devices_works_messages_and_tiles() -> None:
    page = report_html(PLAN)
    memory, busy, *_, timeline, conv, pool = pictures(page)
    filled = [[float(rect.attrib["width"]) for rect in gauge.iter("rect")] for gauge in (memory, busy)]
    assert filled == [[80, 20], [80, 32]]
    bars = {rect.findtext("title"): float(rect.attrib["width"]) for rect in timeline.iter("rect")}
    assert list(bars) == ["conv1: 4.00 ms", "grad: 5.00 ms", "y to attic, 640 bytes", "copies: 0.10 ms"]
    assert bars["grad: 5.00 ms"] > bars["y to attic, 640 bytes"] > bars["copies: 0.10 ms"]
    outlined = [rect.findtext("title") for rect in timeline.iter("rect") if "stroke" in rect.attrib]
    assert outlined == ["conv1: 4.00 ms", "y to attic, 640 bytes"]
    heights = [float(rect.attrib["height"]) for rect in conv.iter("rect")]
    assert heights == [60.0, 75.0, 60.0, 60.0]  # own and computed rows of both devices
    assert "8x8x8, 2 devices: rows" in page and "8x4x4, 2 devices: samples" in page and "a &lt;model&gt;" in page
    places = [float(rect.attrib["x"]) for rect in pool.iter("rect")]
    assert places == [2.0, 2.0, 64.0, 64.0]  # one sample beside the other


def test_the_report_shows_how_a_training_went() -> None:
    records = [{"step": i, "loss": None if i == 3 else 100 / i} for i in range(1, 201)]
    records[99] |= {"val_loss": 2.0, "val_accuracy": 0.5}
    records[199] |= {"val_loss": 1.0, "val_accuracy": 0.75}
    loss, accuracy, *_ = pictures(report_html(PLAN, records))
    steps, mean, held_back = ([*map(_pair, line.attrib["points"].split())] for line in loss.iter("polyline"))
    assert len(steps) == len(mean) == 199 and len(held_back) == 2
    assert [y for _, y in steps] == sorted(y for _, y in steps)  # falls: y of a picture goes down
    assert held_back[0] == pytest.approx(steps[98], abs=40) and held_back[1][0] == steps[-1][0]
    assert [text.text for text in loss.iter("text")][-3:] == ["199 steps", "running mean", "validation"]
    (points,) = ([*map(_pair, line.attrib["points"].split())] for line in accuracy.iter("polyline"))
    assert points[0][1] > points[1][1]
    assert ticks(0, 28.5, 10) == [0, 5, 10, 15, 20, 25] and ticks(0.31, 0.52, 5) == pytest.approx(
        [0.35, 0.4, 0.45, 0.5]
    )


def _pair(text: str) -> tuple[float, float]:
    x, y = map(float, text.split(","))
    return x, y
