"""What processors kernels are compiled for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fusetile.codegen.targets import TARGETS


@pytest.mark.parametrize("name", ["pi4", "pi5", "arm64"])
def test_all_64_bit_arms_have_the_kernels_of_one(name: str) -> None:
    """What tests say of pi3's kernels they say of these."""
    assert replace(TARGETS[name], name="pi3") == TARGETS["pi3"]
