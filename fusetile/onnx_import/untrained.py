"""Initializers that PyTorch does not train: an ONNX file does not tell a module's buffers from its parameters.

Those that common layers keep are known by their names, or by what is in them:

    c.weight_orig, c.weight_u, c.weight_v     spectral norm: the two vectors of its power iteration
    a.relative_coords_table                   Swin V2: the coordinates that a small network turns into biases
    a.rpe_biases                              the same, of DAT
    p.filt                                    the fixed filter of a blurring pool (timm, antialiased-cnns)
    mean, m.std, pixel_mean, pixel_std        what inputs are normalized with
    b.norm.eps                                what a norm adds to a variance
    b.running_mean, b.running_var             and b.weight, b.bias, if no BatchNormalization reads them: frozen ones
    a.attn_mask                               zeros, and one number so low that a softmax makes 0 of it: shifted windows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

TABLES = ("relative_coords_table", "rpe_biases", "filt", "mean", "std", "pixel_mean", "pixel_std", "eps")
STATISTICS = ("running_mean", "running_var")
MASKED = -100.0
"""What shifted windows add to a score that must not count, or less."""
ITERATED = {"_orig": ("_u", "_v"), ".original": (".0._u", ".0._v")}
"""How the name of a weight under spectral norm ends: by torch.nn.utils, and by its parametrizations."""


def buffers_of(initializers: Mapping[str, np.ndarray], nodes: Sequence[onnx.NodeProto]) -> frozenset[str]:
    """Which of these initializers, that the nodes read, are buffers."""
    names = frozenset(initializers)
    vectors = {
        name.removesuffix(weight) + end
        for name in names
        for weight, ends in ITERATED.items()
        if name.endswith(weight)
        for end in ends
    }
    tables = {name for name in names if name.rpartition(".")[2] in TABLES}
    normalized = {name for node in nodes if node.op_type == "BatchNormalization" for name in node.input}
    layers = {name.rpartition(".")[0] for name in names - normalized if name.rpartition(".")[2] in STATISTICS}
    frozen = {f"{layer}.{part}" for layer in layers for part in (*STATISTICS, "weight", "bias")}
    return names & (vectors | frozen) | tables | {name for name, array in initializers.items() if _is_mask(array)}


def _is_mask(array: np.ndarray) -> bool:
    """Whether all that it holds are zeros and one low number. Most weights are told by their smallest value alone."""
    if array.dtype.kind != "f" or array.ndim < 2 or not array.size:
        return False
    low = array.min()
    return bool(low <= MASKED and ((array == low) != (array == 0)).all() and (array == 0).any())
