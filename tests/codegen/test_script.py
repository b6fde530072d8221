"""The function that a kernel's text becomes, against TVM's own parser."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fusetile.codegen.calls import Kernel, make_kernel
from fusetile.codegen.targets import TARGETS
from tests.codegen.harness import Case, kernels_of

STATEMENTS = """
for i in T.serial(lo, hi):
    start: T.int32 = i * 8
    for i in T.unroll(4):  # ends with its block, as `start` does
        for j, k in T.grid(2, 4):
            start: T.int32 = start + i
            ACC[i, j * 4 + k] = X[start + j] * a - T.float32(0.5)
    if i == 0 and (start < hi or lo > 3) and hi != 7:
        for v in T.vectorized(8):
            Y[start + v] = ACC[i % 4, v]
    else:
        if 0 < 1:
            Y[start] = T.Select(X[start] > ACC[0, 0], -a, T.max(a, X[start]))
        else:
            Y[start] = T.float32(1)
        if i >= 2:
            T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(X[i]), T.int32(0), T.int32(3)))
    Y[T.Ramp(start, 1, 4)] = X[T.Ramp(i, 1, 4)]
"""


def written(body: str) -> Kernel:
    pointers, scratch = {"X": "float32", "Y": "float32"}, {"ACC": ((4, 8), "float32")}
    return make_kernel("written", pointers=pointers, floats=["a"], scratch=scratch, body=body)


def kernels(kind: str, inputs: Sequence[np.ndarray], filters: Sequence[int] = (), **attrs: object) -> list[Kernel]:
    return kernels_of(Case(kind, inputs, attrs, filters), TARGETS["pi3"])


X, W = np.zeros((2, 8, 6, 6), np.float32), np.zeros((8, 8, 3, 3), np.float32)
WINDOW = {"kernel": (2, 2), "strides": (2, 2), "dilations": (1, 1), "pads": (0, 0, 0, 0)}
KERNELS = [
    written(STATEMENTS),
    *kernels("Conv", [X, W], [1], strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1), groups=1),
    *kernels("MaxPool", [X], **WINDOW, ceil_mode=0),
    *kernels("Dropout", [X, np.zeros(1, np.int32)], ratio=0.5, seed=1, site=0),
    *kernels("CrossEntropy", [X[:, :, 0, 0], np.zeros(2, np.int32)], count=2),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.symbol)
def test_what_tvm_reads(kernel: Kernel) -> None:
    from tvm.script import from_source, tirx

    from fusetile.codegen.script import function_of

    function, expected = function_of(kernel.source), from_source(kernel.source, {"T": tirx})
    assert function.script() == expected.script()


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("while lo > 3:\n    T.evaluate(0)", "no statement of a kernel: while lo > 3"),
        ("X[lo] += a", "no statement of a kernel"),
        ("x = X[lo]", "x has no type"),
        ("X[lo] = y", "'y' is not defined"),
        ("for i in T.serial(lo):\n    Y[i] = X[i]\nX[lo] = Y[i]", "'i' is not defined"),
    ],
)
def test_refusals(body: str, error: str) -> None:
    from fusetile.codegen.script import function_of

    with pytest.raises((SyntaxError, TypeError, NameError), match=error):
        function_of(written(body).source)
