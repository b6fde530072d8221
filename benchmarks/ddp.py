"""One process of PyTorch's data parallel training over gloo, for benchmarks.cluster.

    python -m benchmarks.ddp FOLDER LOSS STEPS OUT.json ADDRESS RANK NODES

FOLDER holds model.onnx and data.npz. Every process takes its part of the batch; BatchNorm uses the part's statistics,
as is DDP's way. Rank 0 writes the seconds of the steps.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers import torch_network

PORT = 29_500


def main() -> None:
    """Meet, train, write."""
    folder, loss, steps, out, address, rank, nodes = sys.argv[1:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    part, parts = int(rank), int(nodes)
    network: Any = torch_network(Path(folder) / "model.onnx")
    if parts > 1:
        meeting = f"tcp://{address}:{PORT}"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=part, world_size=parts)
        network = DistributedDataParallel(network)
    data = np.load(Path(folder) / "data.npz")
    mine = slice(len(data["x"]) * part // parts, len(data["x"]) * (part + 1) // parts)
    x, y = (torch.from_numpy(data[name][mine]) for name in ("x", "y"))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    measure = torch.nn.functional.mse_loss if loss == "mse" else torch.nn.functional.cross_entropy
    seconds = []
    for _ in range(int(steps)):
        began = time.perf_counter()
        optimizer.zero_grad()
        measure(network(x), y).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    if part == 0:
        Path(out).write_text(json.dumps(seconds))
    if parts > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
