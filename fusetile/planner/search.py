"""Minimise a sum of tables, one per variable and per pair of variables, over one index per variable: exactly.

    min over x of  sum_v node[v][x_v] + sum_uv edge[u, v][x_u, x_v]

Variables are eliminated one by one, the one with the smallest table first: what depends on it becomes one table over
its neighbours (non-serial dynamic programming: Bertele and Brioschi, 1972). On series-parallel graphs (chains, residual
networks, U-shapes) no table has more than three axes. A core for which tables would be too large is left to a
mixed-integer program.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

Table = np.ndarray
Edges = Mapping[tuple[int, int], Table]

LARGEST_TABLE_entries = 20_000_000


@dataclass(frozen=True, slots=True)
class Minimum:
    """An index per variable, its cost, and a proven lower bound: the cost itself unless the solver ran out of time."""

    choice: tuple[int, ...]
    cost: float
    bound: float


@dataclass(frozen=True, slots=True)
class _Factor:
    variables: tuple[int, ...]
    table: Table


def minimise(nodes: Sequence[Table], edges: Edges) -> Minimum:
    """`edges[u, v]` has u along its rows. No table may be empty; infinite entries are forbidden choices."""
    return Elimination(nodes, edges).minimum()


@dataclass(frozen=True, slots=True)
class _Step:
    """A variable is eliminated: `joined` is the sum of `parts`, its first axis the variable's, `rest` the minimum along
    it."""

    joined: _Factor
    parts: Sequence[_Factor]
    rest: _Factor


class Elimination:
    """All variables eliminated in turn, down to constants or to a core."""

    def __init__(self, nodes: Sequence[Table], edges: Edges) -> None:
        self._nodes, self._edges = nodes, edges
        self._sizes = sizes = [len(table) for table in nodes]
        self._steps: list[_Step] = []
        near = _neighbours(len(nodes), edges)
        self._factors: list[dict[int, _Factor]] = [{} for _ in nodes]  # of every variable, by their ids
        self._constant = 0.0
        for factor in (*map(_Factor, zip(range(len(nodes))), nodes), *map(_Factor, edges, edges.values())):
            self._add(factor)
        width = {v: prod(sizes[u] for u in (v, *near[v])) for v in near}
        queue = [(width[v], v) for v in near]
        heapq.heapify(queue)
        while near:
            entries, v = heapq.heappop(queue)
            if v not in near or entries != width[v]:
                continue  # it is done, or stands elsewhere in the queue
            if entries > LARGEST_TABLE_entries:
                break
            others = near.pop(v)
            parts = list(self._factors[v].values())
            joined = _join(parts, (v, *sorted(others)), sizes)
            rest = _Factor(joined.variables[1:], joined.table.min(axis=0))
            self._steps.append(_Step(joined, parts, rest))
            for part in parts:
                for u in part.variables:
                    del self._factors[u][id(part)]
            self._add(rest)
            for u in others:
                near[u] = (near[u] | others) - {u, v}
                width[u] = prod(sizes[w] for w in (u, *near[u]))
                heapq.heappush(queue, (width[u], u))
        self._core = list({id(factor): factor for found in self._factors for factor in found.values()}.values())

    def _add(self, factor: _Factor) -> None:
        for v in factor.variables:
            self._factors[v][id(factor)] = factor
        if not factor.variables:
            self._constant += float(factor.table)

    @property
    def entries(self) -> float:
        """Of all tables that were joined; infinite if there is a core."""
        return sum(step.joined.table.size for step in self._steps) if not self._core else float("inf")

    def minimum(self) -> Minimum:
        """The best index of every variable."""
        choice: dict[int, int] = {}
        bound = self._constant
        if self._core:
            from fusetile.planner.integer import minimise_core  # scipy takes long to import

            core, core_bound = minimise_core([(f.variables, f.table) for f in self._core], self._sizes)
            choice.update(core)
            bound += core_bound
        for step in reversed(self._steps):
            v, *others = step.joined.variables
            column: Any = (slice(None), *(choice[u] for u in others))
            choice[v] = int(np.argmin(step.joined.table[column]))
        picked = tuple(choice[v] for v in range(len(self._nodes)))
        cost = cost_of_choice(self._nodes, self._edges, picked)
        return Minimum(picked, cost, min(bound, cost))

    def marginals(self) -> list[Table]:
        """Per variable and index, the least cost of all choices that have it. Only without a core."""
        assert not self._core, "marginals of a core are not known"
        beside: dict[int, Table] = {}  # the least that all else costs, by a factor's id
        found: dict[int, Table] = {}
        for step in reversed(self._steps):
            variables = step.joined.variables
            alone = np.asarray(self._constant - step.rest.table)  # what is eliminated last depends on nothing
            total = step.joined.table + (beside.pop(id(step.rest)) if variables[1:] else alone)
            found[variables[0]] = total.reshape(len(total), -1).min(axis=1)
            for part in step.parts:
                least = total.min(axis=tuple(i for i, v in enumerate(variables) if v not in part.variables))
                kept = [v for v in variables if v in part.variables]
                beside[id(part)] = _minus(least.transpose([kept.index(v) for v in part.variables]), part.table)
        return [found[v] for v in range(len(self._nodes))]


def _neighbours(count: int, edges: Edges) -> dict[int, set[int]]:
    """Per variable, those that it shares a table with."""
    near: dict[int, set[int]] = {v: set() for v in range(count)}
    for u, v in edges:
        near[u].add(v)
        near[v].add(u)
    return near


def cost_of_choice(nodes: Sequence[Table], edges: Edges, choice: Sequence[int]) -> float:
    """The sum that is minimised."""
    return float(
        sum(table[choice[v]] for v, table in enumerate(nodes))
        + sum(table[choice[u], choice[v]] for (u, v), table in edges.items())
    )


def _join(factors: Sequence[_Factor], variables: tuple[int, ...], sizes: Sequence[int]) -> _Factor:
    """The sum of tables as one table over `variables`."""
    total = np.zeros([sizes[v] for v in variables])
    for factor in factors:
        axes = sorted(range(len(factor.variables)), key=lambda i: variables.index(factor.variables[i]))
        shape = [sizes[v] if v in factor.variables else 1 for v in variables]
        total += factor.table.transpose(axes).reshape(shape)
    return _Factor(variables, total)


def _minus(total: Table, part: Table) -> Table:
    """Infinite where a part is."""
    return np.subtract(total, part, out=np.full(part.shape, np.inf), where=np.isfinite(part))
