"""The thread pool, seen through ctypes."""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusetile.codegen.build import build_library
from fusetile.codegen.calls import Kernel, make_kernel
from fusetile.codegen.targets import host
from fusetile.runtime.native import Library, _Call

COUNT = 1000


def add_kernel() -> Kernel:
    """X[u] = X[u] + Y[u + shift]: a missing barrier between calls that depend on each other shows."""
    body = "for u in T.serial(lo, hi):\n    X[u] = X[u] + Y[(u + shift) % size]"
    return make_kernel("add_shifted", pointers={"X": "int32", "Y": "int32"}, ints=("shift", "size"), body=body)


def record_kernel() -> Kernel:
    """X[u] counts how often unit u was done, Y[u] is who did it last."""
    body = "for u in T.serial(lo, hi):\n    X[u] = X[u] + 1\n    Y[u] = worker"
    return make_kernel("record", pointers={"X": "int32", "Y": "int32"}, body=body)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield build_library([add_kernel(), record_kernel()], host(), tmp_path_factory.mktemp("library"))


def segment(library: ctypes.CDLL, x: ctypes.Array, y: ctypes.Array, calls: int) -> ctypes.Array:
    array = (_Call * calls)()
    for i, call in enumerate(array):
        call.kernel = ctypes.cast(library.add_shifted, ctypes.c_void_p).value
        call.split = len(x)
        ends = (x, y) if i % 2 == 0 else (y, x)
        for k, end in enumerate(ends):
            call.pointers[k] = ctypes.addressof(end)
        call.ints[0], call.ints[1] = i, len(x)
    return array


def run(path: Path, threads: int, *, segments: int = 20) -> list[int]:
    library = ctypes.CDLL(str(path))
    x, y = (ctypes.c_int32 * COUNT)(*range(COUNT)), (ctypes.c_int32 * COUNT)(*range(COUNT))
    calls = segment(library, x, y, 10)
    assert library.ft_start(threads) == 0
    for _ in range(segments):
        library.ft_run(calls, len(calls))
    library.ft_stop()
    return list(x)


def test_threads_agree(path: Path) -> None:
    alone = run(path, 1)
    assert alone != list(range(COUNT))
    for threads in (2, 3, 8):  # more than this computer has cores, too
        assert run(path, threads) == alone


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 9])
def test_no_more_workers_than_a_call_has_scratch_for(path: Path, workers: int) -> None:
    library, threads = ctypes.CDLL(str(path)), 4
    times, who = (ctypes.c_int32 * COUNT)(), (ctypes.c_int32 * COUNT)(*[-1] * COUNT)
    call = _Call(kernel=ctypes.cast(library.record, ctypes.c_void_p).value, split=COUNT, workers=workers)
    call.pointers[0], call.pointers[1] = ctypes.addressof(times), ctypes.addressof(who)
    assert library.ft_start(threads) == 0
    for _ in range(50):
        library.ft_run(ctypes.byref(call), 1)
    library.ft_stop()
    assert list(times) == [50] * COUNT and min(who) >= 0 and max(who) < (workers or threads)


def test_start_again_and_stop_join_the_threads(path: Path) -> None:
    def live() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    library = ctypes.CDLL(str(path))
    before = live()
    assert library.ft_start(3) == 0 and live() == before + 2
    assert library.ft_start(2) == 0 and live() == before + 1
    library.ft_stop()
    assert live() == before
    library.ft_stop()
    assert library.ft_start(0) == errno.EINVAL and library.ft_start(1000) == errno.EINVAL


def test_one_thread_starts_no_thread(path: Path) -> None:
    before = threading.active_count(), len(list(Path("/proc/self/task").iterdir()))
    with Library(path, threads=1):
        assert len(list(Path("/proc/self/task").iterdir())) == before[1]


def test_runs_without_a_pool(path: Path) -> None:
    library = ctypes.CDLL(str(path))
    x, y = (ctypes.c_int32 * 4)(1, 2, 3, 4), (ctypes.c_int32 * 4)(10, 20, 30, 40)
    library.ft_run(segment(library, x, y, 1), 1)
    assert list(x) == [11, 22, 33, 44]
