"""Imports point one way, read off the sources of all files."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusetile

ROOT = Path(fusetile.__file__).parent
MODULES = {".".join(("fusetile", *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")}
BASE = {"box", "plan", "program", "errors", "philox", "rates", "yolo"}

# What each part may import of fusetile besides itself; `graph` and `ops` are one layer, `passes` and `planner` another:
# one pass asks the planner, which plays its plans through those that follow.
ALLOWED: dict[str, set[str]] = {
    "box": set(),
    "errors": set(),
    "philox": set(),
    "rates": set(),
    "yolo": set(),
    "plan": {"box", "errors"},
    "program": {"box", "rates"},
    "graph": BASE | {"ops"},
    "ops": BASE | {"graph"},
    "trace": {"graph"},
    "command_line": {"errors"},
    "options": {"command_line", "errors", "rates", "cluster", "passes"},
    "run_options": {"command_line", "errors"},
    "reference": BASE | {"graph", "ops"},
    "device": {"errors"},
    "cluster": {"errors", "device"},
    "cost": BASE | {"graph", "ops", "cluster", "device"},
    "onnx_import": BASE | {"graph", "ops"},
    "passes": BASE | {"graph", "ops", "cluster", "cost", "planner"},
    "planner": BASE | {"graph", "ops", "cluster", "device", "cost", "passes"},
    "curves": set(),
    "picture": {"curves"},
    "plan_executor": BASE | {"graph", "ops", "passes", "reference"},
    "codegen": BASE | {"graph", "ops", "cluster", "passes"},
    "groups": BASE | {"graph", "ops", "cluster", "cost", "passes", "planner", "codegen"},
    "report": BASE | {"options", "graph", "ops", "cluster", "cost", "passes", "planner", "codegen", "groups"},
    "bundle": BASE
    | {
        "options",
        "graph",
        "ops",
        "cluster",
        "cost",
        "onnx_import",
        "passes",
        "codegen",
        "report",
        "picture",
        "runtime",
    },
    "pipeline": BASE
    | {
        "graph",
        "trace",
        "options",
        "cluster",
        "cost",
        "onnx_import",
        "passes",
        "codegen",
        "report",
        "bundle",
        "plan_executor",
    },
    "runtime": BASE,
}
TOP = {
    "__main__",
    "api",
    "checks",
    "cli",
    "explain",
    "local",
    "onnx_export",
    "profiling",
    "progress",
    "rehearsal",
    "simulation",
    "__init__",
}  # the command line


def part(module: str) -> str:
    """The part of fusetile that a module belongs to."""
    return [*module.split("."), "__init__"][1]


def imports(path: Path, module: str) -> Iterator[str]:
    """Every module that a file imports, wherever in the file, except for type checking only."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES or f"{full}.__init__" in MODULES else str(node.module)


def own_imports(module: str) -> set[str]:
    return {part(name) for name in imports(MODULES[module], module) if name.split(".")[0] == "fusetile"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module: str) -> None:
    mine = part(module)
    if mine in TOP:
        return
    assert mine in ALLOWED, f"say in this test what {mine} may import"
    wrong = own_imports(module) - ALLOWED[mine] - {mine, "__init__"}
    assert not wrong, f"{module} imports {sorted(wrong)}"


def test_nothing_below_imports_the_command_line() -> None:
    assert not {module for module in MODULES if part(module) not in TOP and own_imports(module) & (TOP - {"__init__"})}


def test_every_rule_is_about_a_part_that_exists() -> None:
    assert set(ALLOWED) | TOP == {part(module) for module in MODULES}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if part(m) in BASE | {"runtime"}))
def test_a_device_needs_only_numpy(module: str) -> None:
    """What runs on a device; rich, and Pillow for images, may be there or not."""
    outside = {name.split(".")[0] for name in imports(MODULES[module], module)} - set(sys.stdlib_module_names)
    assert outside <= {"fusetile", "numpy"} | ({"rich", "PIL"} if part(module) == "runtime" else set())


def test_ops_and_passes_know_no_tvm() -> None:
    """Only code generation does."""
    for module, path in MODULES.items():
        if any(name.split(".")[0] in ("tvm", "tvm_ffi") for name in imports(path, module)):
            assert part(module) == "codegen", module


def test_numpy_starts_no_threads_of_its_own_in_a_node() -> None:
    code = "import os, fusetile.runtime.node; print(len(os.listdir('/proc/self/task')))"
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
