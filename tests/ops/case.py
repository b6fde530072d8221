"""A small graph of a single op, with values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusetile.graph import Graph, Op
from fusetile.ops import Domain, domain_of

F, V = "filter", "map"
COUNT = {"count": 24}
RELU = {"activation": "relu", "alpha": 0.0}


@dataclass(frozen=True)
class Case:
    """`inputs`: (shape, kind or dtype) of each operand; `filter` is a float32 weight, anything else but `map` a dtype.
    `fixed`: operands whose values matter, by position."""

    name: str
    kind: str
    inputs: tuple[tuple[tuple[int, ...], str], ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[int, np.ndarray] = field(default_factory=dict)

    def build(self) -> tuple[Graph, Op, Domain]:
        graph = Graph(self.name)
        names = []
        for i, (shape, what) in enumerate(self.inputs):
            dtype = "float32" if what in (F, V) else what
            names.append(graph.add_tensor(f"x{i}", shape, dtype, F if what == F else V))
        op = graph.ops[graph.add(self.kind, names, attrs=self.attrs, outputs=None, stem="y")[0]]
        return graph, op, domain_of(graph, op)

    def values(self, seed: int = 0) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        found = []
        for i, (shape, what) in enumerate(self.inputs):
            if i in self.fixed:
                found.append(np.asarray(self.fixed[i]))
            elif what == "int32":
                found.append(rng.integers(0, 3, shape, dtype=np.int32))
            elif what == "uint8":
                found.append(rng.integers(0, int(np.prod(self.attrs["kernel"])), shape, dtype=np.uint8))
            else:
                found.append(rng.standard_normal(shape).astype("float64" if what == "float64" else "float32"))
        return found
