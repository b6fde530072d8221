"""Reading an ONNX file; whatever may be wrong with it ends in one message that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import external_data_helper

from fusetile.errors import UserError

OLDEST_OPSET = 7  # before it, broadcasting and BatchNormalization were written differently
SIGNATURES = {
    b"PK\x03\x04": "it is a zip archive, perhaps a PyTorch checkpoint: export it with torch.onnx.export",
    b"version https://git-lfs": "it is a Git LFS pointer: fetch the file itself with `git lfs pull`",
    b"\x89HDF": "it is an HDF5 file, perhaps of Keras: convert it with tf2onnx",
}


def read_model(path: str | Path) -> onnx.ModelProto:
    """The model of a file with its external data loaded. Raises UserError if there is no such file, it is no ONNX
    model, it is cut off, or its external data are missing."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't read the model: {error.strerror}") from None
    model = _parse(data, path)
    if not model.graph.node:
        raise UserError(f"{path}: the model is empty (it has no nodes); export it again")
    try:
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, TypeError, onnx.checker.ValidationError) as error:
        raise UserError(
            f"{path}: can't read the weights that are stored beside it: {_first_line(error)}. "
            "Copy the data file to the same folder, or export the model into a single file"
        ) from None
    return model


def self_contained(path: str | Path) -> bytes:
    """A file that `read_model` reads, in one piece: as it is, or with its external data taken in."""
    tensors = onnx.load_model(path, load_external_data=False).graph.initializer
    if any(external_data_helper.uses_external_data(tensor) for tensor in tensors):
        return bytes(read_model(path).SerializeToString())
    return Path(path).read_bytes()


def opset_of(model: onnx.ModelProto, where: str) -> int:
    """The version of the default operator set. Raises UserError if it is missing, too old or too new."""
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    newest = onnx.defs.onnx_opset_version()
    if not versions:
        raise UserError(f"{where}: the model does not say its opset (it may be cut off); export it again")
    if versions[0] < OLDEST_OPSET:
        raise UserError(f"{where}: opset {versions[0]} is not supported; export with opset {OLDEST_OPSET} to {newest}")
    if versions[0] > newest:
        raise UserError(
            f"{where}: opset {versions[0]} is newer than the installed onnx package knows ({newest}); "
            f"update it (pip install -U onnx) or export with an older opset"
        )
    return versions[0]


def check_model(model: onnx.ModelProto, where: str) -> None:
    """Raise UserError if onnx.checker finds the model to be malformed."""
    try:
        onnx.checker.check_model(_current(model))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise UserError(f"{where}: the model is not valid ONNX: {_first_line(error)}; export it again") from None


def _current(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model for the checker. It rejects GroupNormalization before opset 21, with a scale per group, as deprecated;
    ONNX Runtime runs it. InstanceNormalization takes the same operands."""
    old = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0) < 21
    if not old or all(node.op_type != "GroupNormalization" for node in model.graph.node):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type == "GroupNormalization":
            node.op_type = "InstanceNormalization"
            kept = [attribute for attribute in node.attribute if attribute.name == "epsilon"]
            del node.attribute[:]
            node.attribute.extend(kept)
    return copy


def _parse(data: bytes, path: Path) -> onnx.ModelProto:
    if not data:
        raise UserError(f"{path}: the file is empty; export the model again")
    for signature, explanation in SIGNATURES.items():
        if data.startswith(signature):
            raise UserError(f"{path}: not an ONNX model: {explanation}")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        # a serialized ONNX model starts with field 1, the IR version
        if data[0] == 0x08:
            raise _damaged(path, data) from None
        raise UserError(f"{path}: not an ONNX model; give the .onnx file that torch.onnx.export wrote") from None
    if not model.ir_version or not model.HasField("graph"):
        raise UserError(f"{path}: not an ONNX model, or one that is cut off: it holds no graph; export it again")
    if not all(isinstance(text, str) for text in _texts(model.graph)):
        raise _damaged(path, data)
    return model


def _damaged(path: Path, data: bytes) -> UserError:
    return UserError(f"{path}: the ONNX model is damaged or cut off ({len(data)} bytes); copy or export it again")


def _texts(graph: onnx.GraphProto) -> Iterator[str | bytes]:
    """Names in a graph. Protocol buffers give those that are not UTF-8 as bytes."""
    yield from (item.name for item in (*graph.initializer, *graph.input, *graph.output))
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
