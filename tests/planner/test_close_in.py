"""Branch and bound against brute force."""

from __future__ import annotations

from itertools import product

import pytest

from fusetile.planner.close_in import CLOSE, close_in
from tests.planner.test_descend import SIZES, model_of


@pytest.mark.parametrize("seed", range(100))
def test_the_best_choice_is_found_and_the_bound_is_close_to_it(seed: int) -> None:
    model, start = model_of(seed), (0, 0, 0, 0)
    bound, better = close_in(model, start)
    seconds = [model.seconds(choice) for choice in (*better, start)]
    best = min(model.seconds(choice) for choice in product(*map(range, SIZES)))
    assert seconds == sorted(seconds)
    assert best <= seconds[0] <= best / (1 - CLOSE)
    assert seconds[0] * (1 - CLOSE) <= bound * (1 + 1e-9) and bound <= best * (1 + 1e-9)
