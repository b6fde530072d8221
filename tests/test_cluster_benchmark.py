"""benchmarks.cluster says what it lacks instead of failing somewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.cluster import load_lab, main


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["cluster", "--lab", str(tmp_path / "none.py")])
    with pytest.raises(SystemExit, match="there is no such file"):
        main()
    lab = tmp_path / "lab.py"
    lab.write_text('def cgroup_base():\n    raise RuntimeError("no cgroup v1 controller: cpu")\n')
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="needs root"):
        load_lab(lab)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: "/bin/ip")
    with pytest.raises(SystemExit, match="needs cgroup v1: no cgroup v1 controller: cpu"):
        load_lab(lab)
