"""Kernels to libraries: caching, errors, and what a library asks of a device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusetile.codegen import move
from fusetile.codegen.build import build_library, check_portable
from fusetile.codegen.calls import Kernel, make_kernel
from fusetile.codegen.elf import needed_libraries, undefined_symbols
from fusetile.codegen.targets import TARGETS, detect, host, target_named
from fusetile.errors import FusetileError, PlanError, UserError
from fusetile.program import Buffer
from tests.codegen.harness import Case, kernels_of

X = np.zeros((2, 19, 6, 5), np.float32)
FLAT = np.zeros((2, 19), np.float32)
STATS = np.zeros((2, 19), np.float32)
WIDE = np.zeros((2, 19), np.float64)
C = np.zeros(19, np.float32)
ONE, STEP = np.zeros(1, np.float32), np.zeros(1, np.int32)
WINDOW = {"kernel": (3, 3), "strides": (2, 2), "dilations": (1, 1), "pads": (1, 1, 1, 1), "ceil_mode": 0}
AVERAGE = {**WINDOW, "count_include_pad": 0}
SMALL = np.zeros((2, 19, 3, 3), np.float32)
OPS: list[tuple[str, list[np.ndarray], dict[str, Any]]] = [
    ("LeakyRelu", [X], {"alpha": 0.1}),
    ("SGD", [C, C, ONE, C], {"momentum": 0.9, "weight_decay": 0.1}),
    ("Adam", [C, C, ONE, C, C, ONE, ONE], {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8}),
    ("GradientNorm", [C, C], {}),
    ("Dropout", [X, STEP], {"ratio": 0.5, "seed": 1, "site": 0}),
    ("MaxPool", [X], WINDOW),
    ("MaxPoolGrad", [SMALL, SMALL.astype(np.uint8)], {**WINDOW, "input_shape": X.shape}),
    ("AveragePool", [X], AVERAGE),
    ("AveragePoolGrad", [SMALL], {**AVERAGE, "input_shape": X.shape}),
    ("GlobalAveragePool", [X], {}),
    ("NormalizeMoments", [X, X, STATS], {}),
    ("BatchStatistics", [WIDE], {"count": 2, "epsilon": 1e-5}),
    ("RunningStatistics", [WIDE, C, C], {"count": 2, "momentum": 0.9}),
    ("Normalize", [X, STATS, C, C], {"count": 2, "activation": "leaky_relu", "alpha": 0.1}),
    ("NormalizeInputGrad", [X, X, STATS, C, WIDE], {"count": 2}),
    ("CrossEntropy", [FLAT, np.zeros(2, np.int32)], {"count": 2}),
    ("CrossEntropyGrad", [FLAT, np.zeros(2, np.int32)], {"count": 2}),
    ("CrossEntropy", [FLAT, np.zeros(2, np.int32), FLAT[0], ONE], {"count": 2, "smoothing": 0.1}),
    ("BinaryCrossEntropy", [X, X], {"count": 2}),
    ("Concat", [X, X], {"axis": 1}),
    ("Reshape", [X], {"shape": (2, 570)}),
]


def simple(symbol: str, statement: str = "X[u] = T.float32(1)") -> Kernel:
    return make_kernel(symbol, pointers={"X": "float32"}, body=f"for u in T.serial(lo, hi):\n    {statement}")


@pytest.mark.parametrize("name", ["pi3", "armv7", "avx2"])
def test_every_family_links_for_every_device(name: str, tmp_path: Path) -> None:
    kernels = {kernel.symbol: kernel for op in OPS for kernel in kernels_of(Case(*op), host())}
    buffer = Buffer("x", ((0, 8),), "float32", (1, 8))
    kernels |= {call.kernel.symbol: call.kernel for call in (move.zero(buffer), move.copy(buffer, buffer, buffer.box))}
    seen: list[tuple[int, int]] = []
    path = build_library(
        kernels.values(), TARGETS[name], tmp_path, progress=lambda done, total: seen.append((done, total))
    )
    image = path.read_bytes()
    assert {"expf", "log"} <= undefined_symbols(image)
    assert any(library.startswith("libm.") for library in needed_libraries(image))
    assert image[18] == {"avx2": 62, "armv7": 40}.get(name, 183)  # e_machine: x86-64, ARM or AArch64
    assert seen[-1] == (len(kernels), len(kernels))


def test_libraries_are_named_by_content_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_library([simple("one")], host(), tmp_path / "a")
    monkeypatch.setattr("subprocess.run", lambda *args, **options: pytest.fail("the linker runs again"))
    again = build_library([simple("one"), simple("one")], host(), tmp_path / "b")
    assert again.name == first.name and again.read_bytes() == first.read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == [first.name]


def test_a_kernel_that_does_not_compile_is_named(tmp_path: Path) -> None:
    with pytest.raises(FusetileError, match="kernel broken does not compile"):
        build_library([simple("broken", "X[u] = nonsense")], host(), tmp_path)


def test_a_kernel_that_does_not_compile_is_named_by_the_compiler_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusetile.codegen.build.KERNELS_PER_PROCESS", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    with pytest.raises(FusetileError, match="kernel broken does not compile"):
        build_library([simple("fine"), simple("broken", "X[u] = nonsense")], host(), tmp_path)


def test_a_compiler_process_does_without_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "fusetile.codegen.compiler_process"]
    job = {"symbol": "broken", "source": "nonsense", "target": host().tvm, "zig": [], "path": "/nowhere/kernel.o"}
    result = subprocess.run(command, input=json.dumps(job) + "\n", capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert json.loads(result.stdout)["symbol"] == "broken" and "tvm" in imported
    assert "torch.nn" not in imported


def test_two_kernels_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="two different kernels are called same"):
        build_library([simple("same"), simple("same", "X[u] = T.float32(2)")], host(), tmp_path)


def test_foreign_symbols_are_refused() -> None:
    libm = Path("/lib/x86_64-linux-gnu/libm.so.6")
    if not libm.exists():
        pytest.skip("no such library here")
    with pytest.raises(FusetileError, match="which a device need not have"):
        check_portable(libm.read_bytes(), host())


def test_targets() -> None:
    x86 = "flags : fma avx2 bmi1 bmi2 f16c movbe abm "
    assert detect("x86_64", x86).name == "avx2"
    assert detect("x86_64", x86 + "avx512f avx512bw avx512cd avx512dq avx512vl").block == 16
    assert detect("aarch64", "CPU part : 0xd08").name == "pi4"
    assert detect("aarch64", "CPU part : 0x000").name == "arm64"
    with pytest.raises(UserError, match="no AVX2"):
        detect("x86_64", "flags : sse2")
    with pytest.raises(UserError, match="unknown device type 'pi9'"):
        target_named("pi9")
