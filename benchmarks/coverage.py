"""Which networks work: small versions of what people export, through both exporters, checked against PyTorch.

    python -m benchmarks.coverage [NAME ...] [--kernels] [--opset 13 ...] [--nodes 1,2,3,4,6] [--plans grid,random:5]

For each: the loss and all gradients of one step, as imported, and partitioned for four nodes (or so many) by several
plans (both in float64), and, with --kernels, compiled for four nodes and run with the real kernels in one process
(float32; the limit is three times what float32 itself loses, or 1e-3).
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.networks import EXPORTERS, NETWORKS
from tests.networks.compare import error_of, kernel_error, plan_error, step_of
from tests.training import GRIDS

PLANS = "grid,batch,channel,random:1"
NODES = 4
EXACT = 1e-5  # relative to the largest element of a tensor; numbers in the file are float32


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", help="networks; all by default")
    options.add_argument("--kernels", action="store_true", help="compile and run, which takes most of the time")
    options.add_argument("--exporter", choices=EXPORTERS, action="append", help="one of the exporters")
    options.add_argument("--opset", type=int, action="append", help="one of the opsets; the exporter's own by default")
    options.add_argument("--nodes", default=str(NODES), help="how many, separated by commas")
    options.add_argument("--plans", default=PLANS, help="grid stands for all grids of so many nodes")
    arguments = options.parse_args()
    tried = plans_of([int(nodes) for nodes in arguments.nodes.split(",")], arguments.plans.split(","))
    columns = (
        "as imported",
        *(f"{plan} on {nodes}" for plan, nodes in tried),
        *(("kernels",) if arguments.kernels else ()),
    )
    print("| network | exporter | ops | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 3) + "|")
    good = total = 0
    for name in arguments.names or NETWORKS:
        exporters = [by for by in NETWORKS[name].exporters if by in (arguments.exporter or EXPORTERS)]
        for exporter, opset in itertools.product(exporters, arguments.opset or [None]):
            total += 1
            start = time.perf_counter()
            cells, works = _row(name, exporter, opset, tried, kernels=arguments.kernels)
            good += works
            by = exporter if opset is None else f"{exporter}, opset {opset}"
            print(
                f"| {name} | {by} | " + " | ".join(cells) + f" | <!-- {time.perf_counter() - start:.0f} s -->",
                flush=True,
            )
    print(f"\n{good} of {total} work")


def plans_of(nodes: Sequence[int], plans: Sequence[str]) -> list[tuple[str, int]]:
    """Every plan on every number of nodes; on one node all are one."""
    pairs = []
    for count in nodes:
        for plan in plans if count > 1 else ["single"]:
            pairs += [(each, count) for each in (GRIDS[count] if plan == "grid" else [plan])]
    return pairs


def _row(
    name: str, exporter: str, opset: int | None, tried: Sequence[tuple[str, int]], *, kernels: bool
) -> tuple[list[str], bool]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            step = step_of(name, exporter, Path(folder), opset)
            cells, works = [str(len(step.graph.ops))], True
            for error, where in (error_of(step), *(plan_error(step, *pair) for pair in tried)):
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
