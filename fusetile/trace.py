"""Watch the compiler: how long each pass takes, what the graph looks like after it, and where to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fusetile.graph import Graph, Op


class Stopped(Exception):
    """The pass after which the user wanted to stop is done."""


@dataclass(slots=True)
class Trace:
    """`on_stage(name)` is called when a pass starts, `on_progress(done, total)` inside long ones, `on_note(line)` with
    what the user should know about the model, `on_graph(name, graph)` with the graph after each pass that returns one.
    With `dump`, that is written there, as text and Graphviz. `seconds` collects times."""

    on_stage: Callable[[str], None] = lambda name: None
    on_progress: Callable[[int, int], None] = lambda done, total: None
    dump: Path | None = None
    stop_after: str = ""
    on_note: Callable[[str], None] = lambda line: None
    on_graph: Callable[[str, Graph], None] = lambda name, graph: None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[Graph], Graph]]:
        """Time a pass; call what it yields with the pass's graph."""
        self.on_stage(name)
        start = time.perf_counter()

        def seen(graph: Graph) -> Graph:
            self.on_graph(name, graph)
            if self.dump:
                self.dump.mkdir(parents=True, exist_ok=True)
                stem = self.dump / f"{len(self.seconds):02}-{name}"
                stem.with_suffix(".txt").write_text(as_text(graph))
                stem.with_suffix(".dot").write_text(as_graphviz(graph))
            return graph

        yield seen
        self.seconds[name] = time.perf_counter() - start
        if name == self.stop_after:
            raise Stopped(name)


def as_text(graph: Graph) -> str:
    """One line per op: outputs with shapes, kind, inputs, attributes."""
    return "\n".join(_line(graph, op) for op in graph.ops.values()) + "\n"


def _line(graph: Graph, op: Op) -> str:
    outputs = ", ".join(f"{name}[{','.join(map(str, graph.tensors[name].shape))}]" for name in op.outputs)
    attrs = "".join(f" {key}={value}" for key, value in sorted(op.attrs.items()))
    return f"{op.phase:8} {outputs} = {op.kind}({', '.join(op.inputs)}){attrs}"


def as_graphviz(graph: Graph) -> str:
    """The ops as a directed graph in the DOT language."""
    colours = {"forward": "lightblue", "backward": "lightsalmon", "update": "lightgreen"}
    lines = ["digraph model {", "  node [shape=box, style=filled];"]
    for op in graph.ops.values():
        lines.append(f'  "{op.name}" [label="{op.kind}\\n{op.outputs[0]}", fillcolor={colours[op.phase]}];')
    for source, target, tensor in graph.edges():
        lines.append(f'  "{source}" -> "{target}" [label="{tensor}"];')
    return "\n".join([*lines, "}"]) + "\n"
