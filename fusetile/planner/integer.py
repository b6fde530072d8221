"""The core that elimination leaves, as a mixed-integer program for HiGHS.

One binary variable per choice; per table one variable per entry, tied to the choices by its marginals (the local
polytope). HiGHS: Huangfu and Hall, Parallelizing the dual revised simplex method (2018).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from fusetile.errors import PlanError

TIME_LIMIT_seconds = 20.0


def minimise_core(
    tables: Sequence[tuple[tuple[int, ...], np.ndarray]], sizes: Sequence[int]
) -> tuple[dict[int, int], float]:
    """Tables over variables -> an index per variable that occurs, and a lower bound of their sum, which is the minimum
    unless the time was up. Raises PlanError if no choice is allowed, or none was found in time."""
    variables = sorted({v for names, _ in tables for v in names})
    first: dict[int, int] = {}
    count = 0
    for v in variables:
        first[v] = count
        count += sizes[v]
    costs = [np.zeros(count)]
    rows: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    signs: list[np.ndarray] = []
    wanted: list[float] = []
    for v in variables:
        rows.append(np.full(sizes[v], len(wanted)))
        columns.append(first[v] + np.arange(sizes[v]))
        signs.append(np.ones(sizes[v]))
        wanted.append(1.0)
    upper = [np.ones(count)]
    for names, table in tables:
        entries = count + np.arange(table.size).reshape(table.shape)
        costs.append(np.where(np.isfinite(table), table, 0.0).ravel())
        upper.append(np.isfinite(table).ravel().astype(float))
        for axis, v in enumerate(names):
            for index in range(sizes[v]):
                inside = entries.take(index, axis).ravel()
                rows.append(np.full(inside.size + 1, len(wanted)))
                columns.append(np.append(inside, first[v] + index))
                signs.append(np.append(np.ones(inside.size), -1.0))
                wanted.append(0.0)
        count += table.size
    matrix = coo_array(
        (np.concatenate(signs), (np.concatenate(rows), np.concatenate(columns))), shape=(len(wanted), count)
    )
    integrality = (np.arange(count) < sum(sizes[v] for v in variables)).astype(int)
    result = milp(
        np.concatenate(costs),
        constraints=LinearConstraint(matrix.tocsr(), wanted, wanted),
        integrality=integrality,
        bounds=Bounds(0, np.concatenate(upper)),
        options={"time_limit": TIME_LIMIT_seconds},
    )
    if result.x is None:
        raise PlanError(f"no plan was found for {len(variables)} layers that depend on each other: {result.message}")
    choice = {v: int(np.argmax(result.x[first[v] : first[v] + sizes[v]])) for v in variables}
    return choice, float(result.mip_dual_bound)
