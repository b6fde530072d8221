"""Which networks work: small versions of what people export, through both exporters, checked against PyTorch.

    python -m benchmarks.coverage [NAME ...] [--kernels] [--opset 13 ...]

For each: the loss and all gradients of one step, as imported, and partitioned for four nodes by several plans (both in
float64), and, with --kernels, compiled for four nodes and run with the real kernels in one process (float32; the limit
is three times what float32 itself loses, or 1e-3).
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

from tests.networks import EXPORTERS, NETWORKS
from tests.networks.compare import error_of, kernel_error, plan_error, step_of

PLANS = ("grid:2x2", "batch", "channel", "random:1")
NODES = 4
EXACT = 1e-5  # relative to the largest element of a tensor; numbers in the file are float32


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", help="networks; all by default")
    options.add_argument("--kernels", action="store_true", help="compile and run, which takes most of the time")
    options.add_argument("--exporter", choices=EXPORTERS, action="append", help="one of the exporters")
    options.add_argument("--opset", type=int, action="append", help="one of the opsets; the exporter's own by default")
    arguments = options.parse_args()
    columns = ("as imported", *PLANS, *(("kernels",) if arguments.kernels else ()))
    print("| network | exporter | ops | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 3) + "|")
    good = total = 0
    for name in arguments.names or NETWORKS:
        exporters = [by for by in NETWORKS[name].exporters if by in (arguments.exporter or EXPORTERS)]
        for exporter, opset in itertools.product(exporters, arguments.opset or [None]):
            total += 1
            start = time.perf_counter()
            cells, works = _row(name, exporter, opset, kernels=arguments.kernels)
            good += works
            by = exporter if opset is None else f"{exporter}, opset {opset}"
            print(
                f"| {name} | {by} | " + " | ".join(cells) + f" | <!-- {time.perf_counter() - start:.0f} s -->",
                flush=True,
            )
    print(f"\n{good} of {total} work")


def _row(name: str, exporter: str, opset: int | None, *, kernels: bool) -> tuple[list[str], bool]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            step = step_of(name, exporter, Path(folder), opset)
            cells, works = [str(len(step.graph.ops))], True
            for error, where in (error_of(step), *(plan_error(step, plan, NODES) for plan in PLANS)):
                cells.append(f"{error:.0e}" + (f" at {where}" if error > EXACT else ""))
                works &= error <= EXACT
            if kernels:
                error, limit, where = kernel_error(step, "auto", NODES, Path(folder))
                cells.append(f"{error:.0e}" + (f" at {where} (limit {limit:.0e})" if error > limit else ""))
                works &= error <= limit
        except Exception as error:  # whatever it is, it is what the table is to show
            text = " ".join(f"{type(error).__name__}: {error}".split())
            return [f"**{text[:400]}**"], False
    return cells, works


if __name__ == "__main__":
    main()
