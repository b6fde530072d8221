"""Minimise a sum of tables, one per variable and per pair of variables; exactly, if tables stay small.

    min over x of  sum_v node[v][x_v] + sum_uv edge[u, v][x_u, x_v]

Variables are eliminated one by one, the one with the smallest table first: what depends on it becomes one table over
its neighbours (non-serial dynamic programming: Bertele and Brioschi, 1972). On series-parallel graphs (chains, residual
networks, U-shapes) no table has more than three axes. Where tables would be too large, the core that is left is a
mixed-integer program if it is small. If it is large as well (hourglasses behind each other), the minimum is taken of
several smaller tables, each by itself: a lower bound, and a choice that is near the best (mini-buckets: Dechter and
Rish, 2003).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

Table = np.ndarray
Edges = Mapping[tuple[int, int], Table]

LARGEST_TABLE_entries = 20_000_000
BUCKET_entries = 200_000  # of any table where some would be larger than that: larger ones are slower, hardly better
PROGRAM_entries = 20_000  # of all tables of a core: with more an integer program takes minutes


@dataclass(frozen=True, slots=True)
class Minimum:
    """An index per variable, its cost, and a proven lower bound: the cost itself unless a core was too large."""

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
    """A variable is eliminated from `parts`: `joined` is their sum, its first axis the variable's, `rest` the minimum
    along it."""

    joined: _Factor
    parts: Sequence[_Factor]
    rest: _Factor


class Elimination:
    """All variables eliminated in turn, down to a core if there is one that is small. `exact`: there is none, and each
    was eliminated from all of its tables at once."""

    def __init__(self, nodes: Sequence[Table], edges: Edges) -> None:
        self._nodes, self._edges = nodes, edges
        self._sizes = sizes = [len(table) for table in nodes]
        self._steps: list[list[_Step]] = []  # of every variable
        self._factors: list[dict[int, _Factor]] = [{} for _ in nodes]  # of every variable, by their ids
        self._constant = 0.0
        for factor in (*map(_Factor, zip(range(len(nodes))), nodes), *map(_Factor, edges, edges.values())):
            self._add(factor)
        order = list(_order(_neighbours(len(nodes), edges), sizes))
        widest = max((entries for _, entries in order), default=0)
        most = LARGEST_TABLE_entries if widest <= LARGEST_TABLE_entries else BUCKET_entries
        for v, entries in order:
            if entries > most and sum(factor.table.size for factor in self._left()) <= PROGRAM_entries:
                break
            buckets = _buckets(list(self._factors[v].values()), sizes, most)
            self._steps.append([self._eliminated(v, parts) for parts in buckets])
        self._core = self._left()
        self.exact = not self._core and all(len(steps) == 1 for steps in self._steps)

    def _left(self) -> list[_Factor]:
        """The tables over what is not eliminated yet."""
        return list({id(factor): factor for found in self._factors for factor in found.values()}.values())

    def _eliminated(self, v: int, parts: Sequence[_Factor]) -> _Step:
        others = sorted({u for part in parts for u in part.variables} - {v})
        joined = _join(parts, (v, *others), self._sizes)
        rest = _Factor(joined.variables[1:], joined.table.min(axis=0))
        for part in parts:
            for u in part.variables:
                del self._factors[u][id(part)]
        self._add(rest)
        return _Step(joined, parts, rest)

    def _add(self, factor: _Factor) -> None:
        for v in factor.variables:
            self._factors[v][id(factor)] = factor
        if not factor.variables:
            self._constant += float(factor.table)

    @property
    def entries(self) -> int:
        """Of all tables that were joined."""
        return sum(step.joined.table.size for steps in self._steps for step in steps)

    def minimum(self) -> Minimum:
        """The best index of every variable."""
        choice: dict[int, int] = {}
        bound = self._constant
        if self._core:
            from fusetile.planner.integer import minimise_core  # scipy takes long to import

            choice, core_bound = minimise_core([(f.variables, f.table) for f in self._core], self._sizes)
            bound += core_bound
        for steps in reversed(self._steps):
            columns = []
            for step in steps:
                v, *others = step.joined.variables
                column: Any = (slice(None), *(choice[u] for u in others))
                columns.append(step.joined.table[column])
            choice[v] = int(np.argmin(np.sum(columns, axis=0)))
        picked = tuple(choice[v] for v in range(len(self._nodes)))
        cost = cost_of_choice(self._nodes, self._edges, picked)
        return Minimum(picked, cost, min(bound, cost))

    def marginals(self) -> list[Table]:
        """Per variable and index, the least cost of all choices that have it; only of what is exact."""
        assert self.exact
        beside: dict[int, Table] = {}  # the least that all else costs, by a factor's id
        found: dict[int, Table] = {}
        for (step,) in reversed(self._steps):
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


def _order(near: dict[int, set[int]], sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Which variable is eliminated next, the one with the smallest table, and the entries of that; uses up `near`."""
    width = {v: prod(sizes[u] for u in (v, *near[v])) for v in near}
    queue = [(width[v], v) for v in near]
    heapq.heapify(queue)
    while near:
        entries, v = heapq.heappop(queue)
        if v not in near or entries != width[v]:
            continue  # it is done, or stands elsewhere in the queue
        yield v, entries
        others = near.pop(v)
        for u in others:
            near[u] = (near[u] | others) - {u, v}
            width[u] = prod(sizes[w] for w in (u, *near[u]))
            heapq.heappush(queue, (width[u], u))


def cost_of_choice(nodes: Sequence[Table], edges: Edges, choice: Sequence[int]) -> float:
    """The sum that is minimised."""
    return float(
        sum(table[choice[v]] for v, table in enumerate(nodes))
        + sum(table[choice[u], choice[v]] for (u, v), table in edges.items())
    )


def _buckets(parts: list[_Factor], sizes: Sequence[int], most: int) -> list[list[_Factor]]:
    """Tables in groups that can be joined: all, or else the largest first, in the first group with room."""
    if prod(sizes[u] for u in {u for part in parts for u in part.variables}) <= most:
        return [parts]
    buckets: list[list[_Factor]] = []
    scopes: list[set[int]] = []
    for part in sorted(parts, key=lambda part: -part.table.size):
        for bucket, scope in zip(buckets, scopes, strict=True):
            if prod(sizes[u] for u in scope.union(part.variables)) <= most:
                bucket.append(part)
                scope.update(part.variables)
                break
        else:
            buckets.append([part])
            scopes.append({*part.variables})
    return buckets


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
