"""Minimise a sum of tables, one per variable and per pair of variables, over one index per variable: exactly.

    min over x of  sum_v node[v][x_v] + sum_uv edge[u, v][x_u, x_v]

Variables are eliminated one by one, the one with the smallest table first: what depends on it becomes one table over
its neighbours (non-serial dynamic programming: Bertele and Brioschi, 1972). On series-parallel graphs (chains, residual
networks, U-shapes) no table has more than three axes. A core for which tables would be too large is left to a
mixed-integer program.
"""

from __future__ import annotations

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
    factors = [_Factor((v,), table) for v, table in enumerate(nodes)]
    factors += [_Factor(pair, table) for pair, table in edges.items()]
    sizes = [len(table) for table in nodes]
    eliminated: list[tuple[int, _Factor]] = []
    constant = 0.0
    near = _neighbours(len(nodes), edges)
    width = {v: prod(sizes[u] for u in (v, *near[v])) for v in near}
    while near:
        v = min(near, key=lambda v: (width[v], v))
        if width[v] > LARGEST_TABLE_entries:
            break
        others = near.pop(v)
        joined = _join([f for f in factors if v in f.variables], (v, *sorted(others)), sizes)
        eliminated.append((v, joined))
        factors = [f for f in factors if v not in f.variables]
        rest = joined.table.min(axis=0)
        if others:
            factors.append(_Factor(tuple(sorted(others)), rest))
        else:
            constant += float(rest)
        for u in others:
            near[u] = (near[u] | others) - {u, v}
            width[u] = prod(sizes[w] for w in (u, *near[u]))
    choice: dict[int, int] = {}
    bound = constant
    if near:
        from fusetile.planner.integer import minimise_core  # scipy takes long to import

        core, core_bound = minimise_core([(f.variables, f.table) for f in factors], sizes)
        choice.update(core)
        bound += core_bound
    for v, joined in reversed(eliminated):
        column: Any = (slice(None), *(choice[u] for u in joined.variables[1:]))
        choice[v] = int(np.argmin(joined.table[column]))
    picked = tuple(choice[v] for v in range(len(nodes)))
    cost = cost_of_choice(nodes, edges, picked)
    return Minimum(picked, cost, min(bound, cost))


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
