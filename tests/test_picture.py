"""report.html: well-formed, with a bar for everything that takes time and a tile for every device."""

from __future__ import annotations

from xml.etree import ElementTree

from fusetile.picture import report_html

PLAN = {
    "model": "a <model>",
    "step_seconds": 0.01,
    "nodes": [{"name": "kitchen"}, {"name": "attic"}],
    "ops": [
        {
            "name": "conv1",
            "kind": "Conv",
            "phase": "forward",
            "own": [[[0, 1], [0, 8], [0, 4], [0, 8], [0, 3]], [[0, 1], [0, 8], [4, 8], [0, 8], [0, 3]]],
            "compute": [[[0, 1], [0, 8], [0, 5], [0, 8], [0, 3]], [[0, 1], [0, 8], [4, 8], [0, 8], [0, 3]]],
        },
        {"name": "grad", "kind": "ConvWeightGrad", "phase": "backward", "own": [None, None], "compute": [None, None]},
    ],
    "transfers": [{"source": 0, "target": 1, "bytes": 640, "parts": [{"tensor": "y"}]}],
    "timeline": {
        "works": [[[0.0, 0.004, "conv1"], [0.005, 0.01, "grad"]], [[0.0, 0.004, "conv1"], [0.004, 0.0041, ""]]],
        "messages": [[0.004, 0.005]],
    },
}


def test_the_report_shows_works_messages_and_tiles() -> None:
    page = report_html(PLAN)
    body = page[page.index("<h1>") : page.index("</html>")]
    root = ElementTree.fromstring(f"<body>{body.replace('<br>', '')}</body>")
    timeline, conv = root.iter("svg")
    bars = {rect.findtext("title"): float(rect.attrib["width"]) for rect in timeline.iter("rect")}
    assert list(bars) == ["conv1: 4.00 ms", "grad: 5.00 ms", "y to attic, 640 bytes", "copies: 0.10 ms"]
    assert bars["grad: 5.00 ms"] > bars["y to attic, 640 bytes"] > bars["copies: 0.10 ms"]
    heights = [float(rect.attrib["height"]) for rect in conv.iter("rect")]
    assert heights == [60.0, 75.0, 60.0, 60.0]  # own and computed rows of both devices
    assert "2 device(s): rows" in page and "a &lt;model&gt;" in page
