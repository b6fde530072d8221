"""Close in on the best choice from both sides: branch and bound.

The minimum of A + r N over a region (some candidates of each unit), divided by 1 + r, is a lower bound of max(A, N)
there, for any r. Its marginals are the bounds of all parts of the region in which one unit has one candidate.
Candidates whose bound is no better than the best choice are left out. The region with the lowest bound is divided next,
at the unit for which that raises the bound most.
"""

from __future__ import annotations

import heapq
from itertools import count

import numpy as np

from fusetile.planner.descend import Choice, descend
from fusetile.planner.model import Array, Model
from fusetile.planner.search import Elimination

Region = tuple[Array, ...]
"""The candidates of each unit."""

CLOSE = 0.002
"""Part of the best choice's seconds by which the bound may be lower at the end."""
NEAR = 1.02
"""Choices that take up to so many times the best one's seconds are worth a descent."""
RATIO = 0.25
"""The first r for all choices; for a part of a region it is the best of the region."""
APPROACHES = 3
STEP = 1.5
BESIDE = (0.75, 1.33)
"""Other r than a region's best are better for some of its parts."""
MOST_entries = 4e8
"""Of all tables that are made: some ten seconds."""
UNIT_entries = 4000
"""What a unit costs beside its table."""


def close_in(model: Model, best: Choice) -> tuple[float, list[Choice]]:
    """A lower bound of max(A, N) over all choices (0 if the search is too wide), and better choices than `best`, the
    best first."""
    sums = model.mixed(1.0, RATIO)
    whole = Elimination(sums.nodes, sums.edges)
    entries = whole.entries + UNIT_entries * len(best)
    search = _Search(model, best)
    bound = search.run(int(MOST_entries / entries / (APPROACHES + len(BESIDE))) if whole.exact else 0)
    return bound, search.better[::-1]


class _Search:
    """`better`: choices, each better than the one before."""

    def __init__(self, model: Model, best: Choice) -> None:
        self._model, self._critical, self._busy = model, model.critical, model.busy
        self._seconds = model.seconds(best)
        self.better: list[Choice] = []

    def run(self, regions: int) -> float:
        """Divide so many regions, or until the bound is close."""
        numbers = count()
        queue = [(0.0, next(numbers), tuple(np.arange(len(table)) for table in self._model.compute), RATIO)]
        for _ in range(regions):
            if not queue or queue[0][0] >= self._seconds * (1 - CLOSE):
                break
            above, _, region, ratio = heapq.heappop(queue)
            bounds, ratio = self._bounds(region, ratio)
            left = tuple(found[b < self._seconds] for found, b in zip(region, bounds, strict=True))
            several = [u for u, found in enumerate(left) if len(found) > 1]
            if not several or not all(map(len, left)):
                continue  # nothing in it is better than the best choice
            at = max(several, key=lambda u: float(bounds[u].min()))
            for index, bound in zip(region[at], bounds[at], strict=True):
                if bound < self._seconds:
                    part = (*left[:at], np.array([index]), *left[at + 1 :])
                    heapq.heappush(queue, (max(above, float(bound)), next(numbers), part, ratio))
        return queue[0][0] if queue else self._seconds

    def _bounds(self, region: Region, ratio: float) -> tuple[list[Array], float]:
        """Of every candidate in a region; and its best r, for which A and N of minimisers cross."""
        bounds = [np.zeros(len(found)) for found in region]
        more_busy = less_busy = None
        for _ in range(APPROACHES):
            best = ratio
            critical, busy = self._look(region, best, bounds)
            if busy > critical:
                more_busy = critical, busy
            else:
                less_busy = critical, busy
            if not more_busy or not less_busy:
                ratio = best * STEP if more_busy else best / STEP
                continue
            rise, fall = less_busy[0] - more_busy[0], more_busy[1] - less_busy[1]
            if rise <= 0 or fall <= 0 or abs(rise / fall / best - 1) < CLOSE:
                break
            ratio = rise / fall
        for factor in BESIDE:
            self._look(region, best * factor, bounds)
        return bounds, best

    def _look(self, region: Region, ratio: float, bounds: list[Array]) -> tuple[float, float]:
        """Raise `bounds` to those for a ratio; A and N of the minimiser, which may be better than the best choice."""
        nodes = [
            critical[found] + ratio * busy[found]
            for critical, busy, found in zip(self._critical.nodes, self._busy.nodes, region, strict=True)
        ]
        edges = {}
        for (u, v), critical in self._critical.edges.items():
            at = np.ix_(region[u], region[v])
            edges[u, v] = critical[at] + ratio * self._busy.edges[u, v][at]
        found = Elimination(nodes, edges)
        for unit, least in enumerate(found.marginals()):
            bounds[unit] = np.maximum(bounds[unit], least / (1 + ratio))
        choice = tuple(int(left[index]) for left, index in zip(region, found.minimum().choice, strict=True))
        critical_seconds, busy_seconds = self._critical.of(choice), self._busy.of(choice)
        if max(critical_seconds, busy_seconds) < self._seconds * NEAR:
            self._consider(descend(self._model, choice))
        return critical_seconds, busy_seconds

    def _consider(self, choice: Choice) -> None:
        if self._model.seconds(choice) < self._seconds:
            self._seconds = self._model.seconds(choice)
            self.better.append(choice)
