"""Make a plan better step by step: change the split of one layer or of a run of layers, play, keep what is faster.

Changes are tried in the order in which the model likes them, under one emphasis after the other: what the model does
not see (two messages on one link at a time, devices that wait for each other) the simulation decides.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fusetile.planner.model import Sums
from fusetile.planner.play import Played, Player
from fusetile.planner.space import Choice, Space

EMPHASES = ((1.0, 0.3), (1.5, 0.3), (1.0, 1.0), (2.5, 0.0))
"""Weights of waiting and of the busiest link."""
RUNS = (2, 3, 4, 8)
TRIALS_per_second = 20
"""How many changes a second of the step is worth."""
MOST_trials = 26


def improve(player: Player, space: Space, best: Played) -> Played:
    """Hill climbing from a plan; without effect if it is none of the space's."""
    choice = space.choice(best.splits)
    if choice is None:
        return best
    objectives = [space.model.mixed(*emphasis) for emphasis in EMPHASES]
    tried = {choice}
    for trial in range(player.affordable(min(MOST_trials, int(TRIALS_per_second * best.seconds)))):
        untried = [other for other in _neighbours(space, choice) if other not in tried]
        if not untried:
            break
        objective: Sums = objectives[trial % len(objectives)]
        change = untried[int(objective.of_each(np.array(untried)).argmin())]
        tried.add(change)
        result = player.play("auto", space.splits(change), behind=best.behind)
        if result.seconds < best.seconds and player.seconds_within(result) < player.seconds_within(best):
            best, choice = result, change
    return best


def _neighbours(space: Space, choice: Choice) -> Iterator[Choice]:
    for u, found in enumerate(space.candidates):
        for index, candidate in enumerate(found):
            yield (*choice[:u], index, *choice[u + 1 :])
            run = [index]
            for v in range(u + 1, min(len(choice), u + RUNS[-1])):
                if candidate not in space.candidates[v]:
                    break
                run.append(space.candidates[v].index(candidate))
                if len(run) in RUNS or v == len(choice) - 1:
                    yield (*choice[:u], *run, *choice[v + 1 :])
