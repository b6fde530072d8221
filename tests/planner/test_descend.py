"""Small changes of a choice: where they end, none is left that would help."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from fusetile.planner.descend import descend
from fusetile.planner.model import Model, Sums

EDGES = [(0, 1), (1, 2), (0, 2), (2, 3)]
SIZES = (3, 4, 2, 4)


def model_of(seed: int) -> Model:
    """Random tables."""
    random = np.random.default_rng(seed)

    def sums(edges: list[tuple[int, int]]) -> Sums:
        return Sums([random.random(n) for n in SIZES], {(u, v): random.random((SIZES[u], SIZES[v])) for u, v in edges})

    return Model([random.random(n) for n in SIZES], sums(EDGES), sums(EDGES), [])


@pytest.mark.parametrize("seed", range(40))
def test_no_change_of_one_or_of_two_that_meet_helps_at_the_end(seed: int) -> None:
    model, start = model_of(seed), (0, 0, 0, 0)
    end = descend(model, start)
    assert model.seconds(end) <= model.seconds(start)
    for other in product(*map(range, SIZES)):
        changed = [u for u, (i, j) in enumerate(zip(other, end, strict=True)) if i != j]
        if len(changed) == 1 or tuple(changed) in EDGES:
            assert model.seconds(other) >= model.seconds(end) * (1 - 2e-6)
