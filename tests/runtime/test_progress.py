"""The log and what a run prints."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from fusetile.errors import FusetileError, UserError
from fusetile.runtime.progress import Progress, StepRecord


def test_a_step_is_a_line_of_json_that_is_on_disk_at_once(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with Progress(3, show=False, log=log) as progress:
        for step, loss in enumerate((2.5, None, math.nan), 1):
            progress.step(StepRecord(step, loss, 0.25, 4))
            assert len(log.read_text().splitlines()) == step
    assert [json.loads(line) for line in log.read_text().splitlines()] == [
        {"step": 1, "loss": 2.5, "seconds": 0.25, "samples": 4},
        {"step": 2, "loss": None, "seconds": 0.25, "samples": 4},
        {"step": 3, "loss": None, "seconds": 0.25, "samples": 4},
    ]


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, show=True, log=None) as progress:
        for step in (1, 2, 3):
            progress.step(StepRecord(step, 0.5, 0.25, 4))
    assert capsys.readouterr().out.splitlines() == [
        "step 1/3  loss 0.5000  0.25 s/step  16 samples/s",
        "step 3/3  loss 0.5000  0.25 s/step  16 samples/s",
    ]


@pytest.mark.parametrize("first", [1, 5])
def test_a_terminal_gets_a_bar(first: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the run goes on from a checkpoint. Validations stay above it."""
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with Progress(first + 1, show=True, log=None) as progress:
        progress.step(StepRecord(first, 0.5, 0.25, 4, {"loss": 0.25}, best=True))
        progress.step(StepRecord(first + 1, 0.5, 0.25, 4))
        print("afterwards")
    out = capsys.readouterr().out
    assert f"step {first + 1}/{first + 1}" in out and out.rstrip().endswith("afterwards")
    assert out.count("validation: loss 0.2500 (best)") == 1


def test_a_log_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't write the log"):
        Progress(1, show=False, log=tmp_path)


def test_a_full_disk_is_told_with_the_log() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    message = "can't write the log /dev/full: No space left"
    with pytest.raises(FusetileError, match=message), Progress(1, show=False, log=full) as progress:
        progress.step(StepRecord(1, 0.5, 0.25, 4))
