"""The demos, of a step or two: they run through, and leave what a person is to look at."""

from __future__ import annotations

from pathlib import Path

import pytest

SHORT = ("--nodes", "1", "--plan", "single")


def test_the_detector(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    from PIL import Image

    from examples import detection

    status = detection.main([*SHORT, "--scenes", "16", "--epochs", "1", "-o", str(tmp_path)])
    printed = capfd.readouterr().out
    assert status == 1 and "mAP@0.5 of the" in printed, "one step is not enough to find digits"
    assert (tmp_path / "trained.onnx").is_file() and (tmp_path / "best.onnx").is_file()
    sheet = Image.open(tmp_path / "found.png")
    assert sheet.size == (3 * 3 * 208, 2 * 3 * 208) and sheet.getcolors(100) is None  # more than so many


def test_the_denoiser(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    from PIL import Image

    from examples import denoise

    assert denoise.main([*SHORT, "--steps", "2", "-o", str(tmp_path)]) == 1
    assert capfd.readouterr().out.count("without noise.") == 2
    for name in denoise.PHOTOGRAPHS:
        assert Image.open((tmp_path / name).with_suffix(".png")).size == (3 * 320, 427)
