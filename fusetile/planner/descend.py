"""Make a choice better by the model: change one unit, or two that meet, as long as max(A, N) falls.

The minimisers of weighted sums lie on the convex hull of (A, N); between its corners there may be better plans.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from fusetile.planner.model import Array, Model, Sums

Choice = tuple[int, ...]
LEAST = 1e-6
"""Part of max(A, N) by which a change must lower it."""


def descend(model: Model, choice: Choice) -> Choice:
    """The end of the steepest way down from a choice."""
    while True:
        seconds = model.seconds(choice)
        best = min(_changes(model, choice), default=(seconds, choice))
        if best[0] >= seconds * (1 - LEAST):
            return choice
        choice = best[1]


def _changes(model: Model, choice: Choice) -> Iterator[tuple[float, Choice]]:
    """The best change of every unit and of every pair that meets: seconds, choice."""
    sides = _Side(model.critical, choice), _Side(model.busy, choice)
    for u in range(len(choice)):
        seconds = np.maximum(*(side.total + side.rows[u] for side in sides))
        best = int(seconds.argmin())
        yield float(seconds[best]), (*choice[:u], best, *choice[u + 1 :])
    for u, v in model.busy.edges:
        seconds = np.maximum(*(side.total + side.pair(u, v) for side in sides))
        i, j = (int(index) for index in np.unravel_index(seconds.argmin(), seconds.shape))
        yield float(seconds[i, j]), (*choice[:u], i, *choice[u + 1 : v], j, *choice[v + 1 :])


class _Side:
    """A or N near a choice: its `total`, and by how much each candidate of a unit changes it (`rows`)."""

    def __init__(self, sums: Sums, choice: Choice) -> None:
        self.sums, self.choice, self.total = sums, choice, sums.of(choice)
        self.rows: dict[int, Array] = defaultdict(lambda: np.zeros(1))
        for u, table in enumerate(sums.nodes):
            self.rows[u] = table - table[choice[u]]
        for (u, v), table in sums.edges.items():
            here = table[choice[u], choice[v]]
            self.rows[u] = self.rows[u] + table[:, choice[v]] - here
            self.rows[v] = self.rows[v] + table[choice[u]] - here

    def pair(self, u: int, v: int) -> Array:
        """[candidates of u, candidates of v]: the change that both make together."""
        changes = self.rows[u][:, None] + self.rows[v]
        if (table := self.sums.edges.get((u, v))) is not None:
            here = table[self.choice[u], self.choice[v]]
            changes = changes + table - table[:, self.choice[v], None] - table[self.choice[u]] + here
        return changes
