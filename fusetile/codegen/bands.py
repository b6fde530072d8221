"""The gradient of a large matrix, made and used a band at a time.

    GemmWeightGrad -> g;  SGD(w, g, v)        per band: GemmWeightGrad -> band of g;  SGD on that band of w and v

A fully connected layer has few samples and many weights, so its gradient is nothing but memory traffic: written, and
read by the update that follows. A band stays in the cache between the two, and the whole gradient exists nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from fusetile.box import Box
from fusetile.graph import UPDATE, Graph
from fusetile.ops import domain_of
from fusetile.passes.buffers import DeviceBuffers
from fusetile.passes.communicate import Communication
from fusetile.passes.schedule import Action, Compute
from fusetile.plan import Plan
from fusetile.program import Buffer

BAND_bytes = 1 << 19
"""A second-level cache, or half of one."""


def banded(
    graph: Graph,
    plan: Plan,
    communication: Communication,
    storage: DeviceBuffers,
    actions: tuple[Action, ...],
    device: int,
) -> dict[str, str]:
    """Update -> the op that makes its gradient, where a device is to do both in bands: the update comes at once, on the
    box that was made, and the gradient is large."""
    found = {}
    for action, following in pairwise(actions):
        if not isinstance(action, Compute) or not isinstance(following, Compute):
            continue
        maker, update = graph.ops[action.op], graph.ops[following.op]
        gradient = maker.outputs[0]
        if maker.kind != "GemmWeightGrad" or update.phase != UPDATE or gradient not in update.inputs:
            continue
        made, taken = (domain_of(graph, op).output(plan.placements[op.name].compute[device]) for op in (maker, update))
        home = storage.home[gradient]
        in_place = storage.delivered[communication.reads[update.name, gradient]] == home
        if in_place and made == taken and home.size_bytes >= 2 * BAND_bytes:
            found[update.name] = maker.name
    return found


def bands(box: Box, buffer: Buffer) -> Iterator[Box]:
    """Cut a box of a matrix in bands of at most about BAND_bytes, the largest first: blocks of rows, and where one is
    too large, columns."""
    (k0, k1), (c0, c1) = box
    block_k, block_c = buffer.block
    elements = BAND_bytes // np.dtype(buffer.dtype).itemsize
    columns = min(c1 - c0, max(block_c, elements // block_k // block_c * block_c))
    rows = max(block_k, elements // columns // block_k * block_k)
    for k in range(k0, k1, rows):
        for c in range(c0, c1, columns):
            yield (k, min(k + rows, k1)), (c, min(c + columns, c1))
