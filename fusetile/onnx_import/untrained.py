"""Initializers that PyTorch does not train: an ONNX file does not tell a module's buffers from its parameters.

Those that common layers keep are known by their names:

    c.weight_orig, c.weight_u, c.weight_v     spectral norm: the two vectors of its power iteration
    a.relative_coords_table                   Swin V2: the coordinates that a small network turns into biases
    p.filt                                    the fixed filter of a blurring pool (timm, antialiased-cnns)
"""

from __future__ import annotations

from collections.abc import Iterable

TABLES = ("relative_coords_table", "filt")
ITERATED = {"_orig": ("_u", "_v"), ".original": (".0._u", ".0._v")}
"""How the name of a weight under spectral norm ends: by torch.nn.utils, and by its parametrizations."""


def buffers_of(initializers: Iterable[str]) -> frozenset[str]:
    """Which of these initializers are buffers."""
    names = frozenset(initializers)
    vectors = {
        name.removesuffix(weight) + end
        for name in names
        for weight, ends in ITERATED.items()
        if name.endswith(weight)
        for end in ends
    }
    return names & vectors | {name for name in names if name.rpartition(".")[2] in TABLES}
