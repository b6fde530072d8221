"""Kernels -> one shared library per target: objects by TVM, the thread pool and trampolines in C, linked with zig.

Objects and libraries are cached by the content that they follow from, in `cache_directory()`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from fusetile.codegen.calls import BODY, Kernel
from fusetile.codegen.elf import needed_libraries, undefined_symbols
from fusetile.codegen.targets import Target
from fusetile.codegen.zig import zig_cc
from fusetile.errors import FusetileError, PlanError

Progress = Callable[[int, int], None]

HERE = Path(__file__).parent
COMPILE = ("-O2", "-fPIC", "-fvisibility=hidden", "-fno-unwind-tables", "-fno-asynchronous-unwind-tables")
# zig would first compile a runtime of its own, for seconds, that nothing here needs
LINK = ("-shared", "-s", "-nostdlib", "-Wl,--no-undefined")
LIBRARIES = ("-lm", "-lpthread", "-lc")
# A compiler process takes seconds to start, a kernel tenths of one to compile: few are compiled in this process.
KERNELS_PER_PROCESS = 6

MATH = {"expf", "exp", "logf", "log", "sqrtf", "sqrt", "powf", "tanhf", "fmaf", "fma", "floorf", "roundf"}
LIBC = {"memcpy", "memmove", "memset", "syscall", "clock_gettime", "sigfillset", "pthread_sigmask", "sigprocmask"}
THREADS = {"pthread_create", "pthread_join"}
ALLOWED_SYMBOLS = MATH | LIBC | THREADS
ALLOWED_LIBRARIES = ("libc.so.", "libm.so.", "libpthread.so.", "ld-linux")


def cache_directory() -> Path:
    """Where compiled kernels are kept: $FUSETILE_CACHE, or ~/.cache/fusetile."""
    path = Path(os.environ.get("FUSETILE_CACHE") or Path.home() / ".cache" / "fusetile")
    path.mkdir(parents=True, exist_ok=True)
    return path


def build_library(
    kernels: Iterable[Kernel], target: Target, directory: Path, *, progress: Progress | None = None
) -> Path:
    """Write DIRECTORY/kernels-HASH.so with these kernels and the thread pool; HASH is that of its content.

    `progress(done, total)` is told of every compiled kernel. Raises FusetileError if a kernel does not compile or the
    library would need more of a device than its C library.
    """
    by_symbol: dict[str, Kernel] = {}
    for kernel in kernels:
        if by_symbol.setdefault(kernel.symbol, kernel) != kernel:
            raise PlanError(f"two different kernels are called {kernel.symbol}")
    distinct = [by_symbol[symbol] for symbol in sorted(by_symbol)]
    objects = compile_kernels(distinct, target, progress or (lambda done, total: None))
    library = _link(distinct, objects, target)
    content = hashlib.sha256(library.read_bytes()).hexdigest()[:16]
    path = directory / f"kernels-{content}.so"
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        os.replace(shutil.copy(library, scratch), path)
    return path


def trampolines(kernels: Iterable[Kernel]) -> str:
    """C source: for every kernel the exported function that unpacks a call and runs its body."""
    text = ['#include "segment.h"']
    for kernel in kernels:
        body = BODY.format(kernel.symbol)
        sorts = (
            ("void *", "pointers", kernel.pointers),
            ("int32_t", "ints", kernel.ints),
            ("float", "floats", kernel.floats),
        )
        types = ", ".join(["int32_t"] * 3 + [sort for sort, _, count in sorts for _ in range(count)])
        values = ", ".join(f"call->{name}[{i}]" for _, name, count in sorts for i in range(count))
        text.append(f"void {body}({types});")
        head = f"EXPORT void {kernel.symbol}(int32_t lo, int32_t hi, const ft_call *call, int32_t worker)"
        text.append(f"{head} {{ {body}(lo, hi, worker, {values}); }}")
    return "\n".join(text) + "\n"


def check_portable(image: bytes, target: Target) -> None:
    """Raise FusetileError if a library needs symbols or libraries that a device need not have."""
    unknown = undefined_symbols(image) - ALLOWED_SYMBOLS
    strange = {name for name in needed_libraries(image) if not name.startswith(ALLOWED_LIBRARIES)}
    if unknown or strange:
        raise FusetileError(
            f"the kernel library for {target.name} needs {', '.join(sorted(unknown | strange))}, "
            "which a device need not have: this is a fault of fusetile"
        )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def compile_kernels(kernels: Sequence[Kernel], target: Target, progress: Progress) -> list[Path]:
    """The object file of every kernel, compiled if it is not in the cache."""
    ours = ((HERE / name).read_text() for name in ("script.py", "tvm_pipeline.py"))
    tools = [importlib.metadata.version("apache-tvm"), json.dumps(target.tvm), *ours]
    if target.ir_flags:
        tools += [importlib.metadata.version("ziglang"), *target.ir_flags]
    objects = [cache_directory() / f"{_digest(kernel.source, *tools)}.o" for kernel in kernels]
    machine = {"target": target.tvm, "zig": target.ir_flags}
    jobs = [
        json.dumps({"symbol": kernel.symbol, "source": kernel.source, **machine, "path": str(path)})
        for kernel, path in zip(kernels, objects, strict=True)
        if not path.exists()
    ]
    done, lock = len(kernels) - len(jobs), Lock()

    def finished(line: str) -> None:
        nonlocal done
        result = json.loads(line)
        if result["error"]:
            raise FusetileError(f"kernel {result['symbol']} does not compile for {target.name}:\n{result['error']}")
        with lock:
            done += 1
            progress(done, len(kernels))

    progress(done, len(kernels))
    jobs.sort(key=len, reverse=True)  # a long source compiles longest
    count = min(len(os.sched_getaffinity(0)), len(jobs) // KERNELS_PER_PROCESS)
    if count < 2:
        _compile_here(jobs, finished)
        return objects
    shared = iter(jobs)
    with ThreadPoolExecutor(count) as threads:
        for future in [threads.submit(_compile_jobs, shared, finished) for _ in range(count)]:
            future.result()
    return objects


def _compile_here(jobs: Sequence[str], finished: Callable[[str], None]) -> None:
    if jobs:
        from fusetile.codegen.tvm_pipeline import answer  # loading TVM takes seconds

        for job in jobs:
            finished(answer(job))


def _compile_jobs(jobs: Iterator[str], finished: Callable[[str], None]) -> None:
    """Feed jobs to a compiler process, one at a time. Other threads take from the same iterator, a list's: taking is
    one step of the interpreter."""
    command = [sys.executable, "-m", "fusetile.codegen.compiler_process"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdin and process.stdout
        try:
            for job in jobs:
                process.stdin.write(job + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
                if not answer:
                    errors.seek(0)
                    raise FusetileError(
                        f"the compiler died on kernel {json.loads(job)['symbol']}:\n{errors.read()[-2000:]}"
                    )
                finished(answer)
        except BrokenPipeError:
            errors.seek(0)
            raise FusetileError(f"the compiler did not start:\n{errors.read()[-2000:]}") from None
        finally:
            process.kill()


def _link(kernels: Sequence[Kernel], objects: Sequence[Path], target: Target) -> Path:
    """The linked and checked library, in the cache."""
    source, pool = trampolines(kernels), _pool(target)
    library = cache_directory() / f"{_digest(source, *_tools(target), pool.name, *(path.name for path in objects))}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            c, made = Path(scratch) / "trampolines.c", Path(scratch) / "kernels.so"
            c.write_text(source)
            _zig(target, *COMPILE, *LINK, "-o", made, c, pool, *objects, *LIBRARIES)
            check_portable(made.read_bytes(), target)
            os.replace(made, library)
    return library


def _pool(target: Target) -> Path:
    """The object file of the thread pool, in the cache."""
    sources = [(HERE / name).read_text() for name in ("segment.h", "segment.c")]
    pool = cache_directory() / f"{_digest(*sources, *_tools(target))}.o"
    if not pool.exists():
        with tempfile.TemporaryDirectory(dir=pool.parent) as scratch:
            made = Path(scratch) / "segment.o"
            _zig(target, *COMPILE, "-c", "-o", made, HERE / "segment.c")
            os.replace(made, pool)
    return pool


def _tools(target: Target) -> tuple[str, ...]:
    """What a file that zig makes follows from, besides its sources."""
    return (*target.zig, importlib.metadata.version("ziglang"), *COMPILE, *LINK)


def _zig(target: Target, *arguments: str | Path) -> None:
    result = zig_cc(*target.zig, "-I", str(HERE), *map(str, arguments))
    if result.returncode:
        raise FusetileError(f"the kernel library for {target.name} does not link:\n{result.stderr[-2000:]}")
