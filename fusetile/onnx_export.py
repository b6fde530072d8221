"""Trained weights -> ONNX: the model that came in, with new values in its initializers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from fusetile.errors import UserError
from fusetile.onnx_import.contents import type_name
from fusetile.onnx_import.files import check_model, read_model
from fusetile.onnx_import.unshare import unshare
from fusetile.runtime.files import atomic_write


def export_onnx(
    model: str | Path | onnx.ModelProto, trained: Mapping[str, np.ndarray], out_path: str | Path
) -> onnx.ModelProto:
    """Write `model` with the values of `trained` (initializer name -> float32 array) to `out_path`; returns it.

    Nodes and names stay as they are; only where weights had been merged by value (see unshare.py) those get
    initializers of their own. A vector [C] fits an initializer that differs by dimensions of one, such as [1, C].
    The file is checked, then appears whole or not at all. External data are taken into the file. Raises UserError if a
    name or shape is not the model's, or the file can't be written.
    """
    source = "the model" if isinstance(model, onnx.ModelProto) else str(model)
    original = model if isinstance(model, onnx.ModelProto) else read_model(model)
    result = onnx.ModelProto()
    result.CopyFrom(unshare(original))
    tensors = {tensor.name: tensor for tensor in result.graph.initializer}
    for name, array in trained.items():
        if name not in tensors:
            raise UserError(f"{source} has no initializer {name!r}: these weights were trained from another model")
        _set_value(tensors[name], array, source)
    check_model(result, str(out_path))
    atomic_write(Path(out_path), lambda file: file.write(result.SerializeToString()))
    return result


def _set_value(tensor: onnx.TensorProto, array: np.ndarray, source: str) -> None:
    dims = tuple(tensor.dims)
    if tensor.data_type != onnx.TensorProto.FLOAT or array.dtype != np.float32:
        kind = type_name(tensor.data_type)
        raise UserError(f"{source}: {tensor.name!r} is {kind}, its trained value {array.dtype}; both must be float32")
    if [size for size in dims if size != 1] != [size for size in array.shape if size != 1]:
        raise UserError(
            f"{source}: {tensor.name!r} has shape {dims}, its trained value {array.shape}: another model's?"
        )
    documentation = tensor.doc_string
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array).reshape(dims), tensor.name))
    if documentation:
        tensor.doc_string = documentation
