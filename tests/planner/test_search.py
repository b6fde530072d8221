"""The search against brute force: chains, residual nets, U-shapes, and cores of which tables are large."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from fusetile.planner import search
from fusetile.planner.search import Elimination, Table, cost_of_choice, minimise

SHAPES = {
    "chain": [(0, 1), (1, 2), (2, 3), (3, 4)],
    "residual": [(0, 1), (1, 2), (0, 2), (2, 3), (3, 4), (2, 4)],
    "U": [(0, 1), (1, 2), (2, 3), (3, 4), (1, 3), (0, 4)],
    "core of treewidth 3": [*combinations(range(4), 2), (3, 4)],
    "core of treewidth 4": list(combinations(range(5), 2)),
    "apart": [(0, 1), (2, 3)],
}


def instance(shape: str, seed: int) -> tuple[list[Table], dict[tuple[int, int], Table]]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, 5)
    nodes = [rng.random(size) for size in sizes]
    nodes[seed % 5][1:] = np.inf  # forbidden choices
    edges = {(u, v): rng.random((sizes[u], sizes[v])) * (rng.random() < 0.8) for u, v in SHAPES[shape]}
    return nodes, edges


def brute_force(nodes: list[Table], edges: dict[tuple[int, int], Table]) -> float:
    return min(cost_of_choice(nodes, edges, choice) for choice in product(*(range(len(table)) for table in nodes)))


@pytest.mark.parametrize("shape", SHAPES)
def test_search_equals_brute_force(shape: str) -> None:
    for seed in range(60):
        nodes, edges = instance(shape, seed)
        found = minimise(nodes, edges)
        best = brute_force(nodes, edges)
        assert found.cost == pytest.approx(best) == cost_of_choice(nodes, edges, found.choice)
        assert found.bound == pytest.approx(best)


@pytest.mark.parametrize("shape", SHAPES)
def test_marginals_equal_brute_force(shape: str) -> None:
    for seed in range(12):
        nodes, edges = instance(shape, seed)
        least = [np.full(len(table), np.inf) for table in nodes]
        for choice in product(*(range(len(table)) for table in nodes)):
            for v, index in enumerate(choice):
                least[v][index] = min(least[v][index], cost_of_choice(nodes, edges, choice))
        for found, expected in zip(Elimination(nodes, edges).marginals(), least, strict=True):
            np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_small_core_that_is_too_wide_for_tables_is_an_integer_program(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "LARGEST_TABLE_entries", 6)
    monkeypatch.setattr(search, "BUCKET_entries", 6)
    for seed in range(8):
        nodes, edges = instance(shape, seed)
        found = minimise(nodes, edges)
        best = brute_force(nodes, edges)
        assert found.cost == pytest.approx(best)
        assert found.bound <= best + 1e-9 and found.bound == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_tables_that_would_be_too_large_are_looked_at_in_parts(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "LARGEST_TABLE_entries", 16)
    monkeypatch.setattr(search, "BUCKET_entries", 16)
    monkeypatch.setattr(search, "PROGRAM_entries", 0)
    for seed in range(8):
        nodes, edges = instance(shape, seed)
        found, best = minimise(nodes, edges), brute_force(nodes, edges)
        assert found.bound <= best + 1e-9 <= found.cost + 2e-9 < np.inf
        assert found.cost == pytest.approx(cost_of_choice(nodes, edges, found.choice))
        assert found.cost <= best * 1.5 and found.bound >= best * 0.5
        if Elimination(nodes, edges).exact:
            assert found.cost == pytest.approx(best) == found.bound


def test_one_shape_needs_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, edges = [np.zeros(4)] * 5, {pair: np.zeros((4, 4)) for pair in SHAPES["core of treewidth 4"]}
    assert Elimination(nodes, edges).exact
    monkeypatch.setattr(search, "LARGEST_TABLE_entries", 100)
    monkeypatch.setattr(search, "BUCKET_entries", 100)
    monkeypatch.setattr(search, "PROGRAM_entries", 0)
    assert not Elimination(nodes, edges).exact
