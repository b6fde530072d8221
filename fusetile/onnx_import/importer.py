"""The walk over an ONNX model: inputs and batch, names, parameters, and the rule of each node."""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper

from fusetile.errors import UnsupportedOp, UserError
from fusetile.graph import FORWARD, Graph, Parameter
from fusetile.onnx_import import files, folding
from fusetile.onnx_import.notes import notes_of
from fusetile.onnx_import.unshare import unshare
from fusetile.onnx_import.untrained import buffers_of
from fusetile.onnx_import.views import View
from fusetile.ops.rearrange import Dims, reshaped, whole_view
from fusetile.ops.resample import Taps, resample

if TYPE_CHECKING:
    from fusetile.onnx_import.rules.unpool import Places

Array = np.ndarray
_INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
COMPOSED = ("Attention", "RMSNormalization", "Swish")
"""What newer opsets define by other ops, and the import takes apart into these."""
_LABELLED = ("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss")


@dataclass(frozen=True, slots=True)
class Mask:
    """Random numbers that a model draws, of this shape: those between `low` and `low` + 1 while `kept` is None, and
    after a comparison `factor` with the probability `kept`, else 0."""

    shape: tuple[int, ...]
    kept: float | None = None
    factor: float = 1.0
    low: float = 0.0


@dataclass(frozen=True, slots=True)
class Node:
    """An ONNX node as a rule sees it; `inputs[i]` is "" where an optional input is left out."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    origin: str
    opset: int

    def has(self, i: int) -> bool:
        """Whether input `i` is given."""
        return i < len(self.inputs) and self.inputs[i] != ""


def import_onnx(
    path: str | Path,
    *,
    batch: int | None = None,
    bn: Literal["train", "frozen"] = "train",
    dropout: float | None = None,
    seed: int = 0,
    loss: str | Path | None = None,
) -> Graph:
    """The forward graph of an ONNX file, with the running statistics' updates of its BatchNormalizations.

    batch    binds the first dimension of every input, also where the model has another number there. By default the
             model's own number, or 1 if it is dynamic.
    bn       "train": statistics of the batch, and running statistics by ONNX's rule; "frozen": the stored statistics.
             The nodes' own training_mode does not matter.
    dropout  overrides the ratio of every Dropout. Dropout always drops, whatever training_mode says.
    seed     of the dropout masks; their step counter is the control tensor "step".
    loss     an ONNX file that follows the model: its first output is the graph's only one (see appended.py).

    Tensors keep their ONNX names; `notes` say what an export for inference lacks and which weights it had merged.
    Raises UserError if the file can't be read, is no valid model, or has a dynamic dimension other than the batch;
    UnsupportedOp, naming all nodes concerned, if an op can't be trained.
    """
    where = str(path)
    original = files.read_model(path)
    model = unshare(original)
    if model.functions:
        model = inliner.inline_local_functions(model)
    if any(node.op_type in COMPOSED for node in model.graph.node):
        model = decomposed(model)
    opset = files.opset_of(model, where)
    importer = Importer(model, where=where, opset=opset, bn=bn, dropout=dropout, seed=seed)
    importer.refuse_unsupported()
    files.check_model(model, where)
    importer.bind_inputs(batch)
    importer.run()
    trained = {parameter.onnx_name for parameter in importer.graph.parameters.values() if parameter.trainable}
    merged = trained - {tensor.name for tensor in original.graph.initializer}
    importer.graph.notes = notes_of(model.graph, where=where, bn=bn, merged=merged)
    if loss is not None:
        from fusetile.onnx_import.appended import append_loss  # which needs Importer

        append_loss(importer, loss)
    return importer.graph


class Importer:
    """State of one import. Rules (rules.py) read a node's operands and add ops through its methods."""

    def __init__(
        self, model: onnx.ModelProto, *, where: str, opset: int, bn: str, dropout: float | None, seed: int
    ) -> None:
        self.where, self.opset, self.bn, self.dropout, self.seed = where, opset, bn, dropout, seed
        self.proto = model.graph
        self.graph = Graph(model.graph.name or "model")
        self.initializers = self._read_initializers()
        self.buffers = buffers_of(self.initializers)
        self.nodes = live_nodes(model.graph)
        self.constant = folding.constant_outputs(self.nodes, self.initializers)
        self.values = {name: array for name, array in self.initializers.items() if name in self.constant}
        self.alias: dict[str, str] = {}
        self.transposes: dict[str, str] = {}
        self.reshapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.views: dict[str, View] = {}
        self.sequences: dict[str, list[View]] = {}
        self.masks: dict[str, Mask] = {}
        self.zero_padded: dict[str, tuple[str, tuple[int, ...]]] = {}  # what a convolution may pad itself: (x, pads)
        self.places: dict[str, Places] = {}
        self._tensors: dict[View, str] = {}
        self.uses = Counter(name for node in self.nodes for name in node.input)
        self.uses.update(output.name for output in model.graph.output)
        self.reserved = {name for node in model.graph.node for name in (*node.input, *node.output)}
        self.reserved.update(value.name for value in (*model.graph.input, *model.graph.output))
        self.batch = 1
        self.baked_batch: int | None = None
        self.dropout_sites = 0
        self.labels = labels_of(self.nodes)

    # -- the steps of an import -------------------------------------------------------------------------------------

    def refuse_unsupported(self) -> None:
        """Raise UnsupportedOp that names every op without a rule, if there is one."""
        from fusetile.onnx_import.rules import RULES  # the rules need this class

        refused: dict[str, list[str]] = {}
        for node in self.nodes:
            standard = node.domain in ("", "ai.onnx")
            if not all(name in self.constant for name in node.output if name) and not (
                standard and (node.op_type in RULES or (node.op_type == "If" and node.input[0] in self.constant))
            ):
                label = node.op_type if standard else f"{node.domain}::{node.op_type}"
                refused.setdefault(label, []).append(repr(node.name or node.output[0]))
        if refused:
            lines = [
                f"{label} ({'node' if len(names) == 1 else 'nodes'} {', '.join(names[:3])}{', ...' * (len(names) > 3)})"
                for label, names in sorted(refused.items())
            ]
            raise UnsupportedOp(
                f"{self.where}: can't train {'; '.join(lines)}. Supported ops: {', '.join(sorted(RULES))}, and "
                "Constant and arithmetic on constants and shapes"
            )

    def bind_inputs(self, batch: int | None) -> None:
        """Declare the data inputs, their first dimension bound to the batch."""
        inputs = [value for value in self.proto.input if value.name not in self.initializers]
        if not inputs or not self.proto.output:
            raise UserError(f"{self.where}: the model has no {'outputs' if inputs else 'inputs for data'}")
        shapes = {value.name: self.input_dims(value) for value in inputs}
        baked = {name: shape[0] for name, shape in shapes.items() if shape[0] is not None}
        if len(set(baked.values())) > 1:
            raise UserError(
                f"{self.where}: the first dimension must be the batch, but the inputs differ in it: {baked}"
            )
        self.baked_batch = next(iter(baked.values()), None)
        self.batch = batch if batch is not None else self.baked_batch or 1
        if self.batch < 1:
            raise UserError(f"the batch size must be at least 1, not {self.batch}")
        for name, shape in shapes.items():
            sizes = [self.batch, *(size for size in shape[1:] if size is not None)]
            dtype = "int32" if name in self.labels else "float32"
            self.graph.inputs.append(self.graph.add_tensor(name, sizes, dtype))

    def run(self) -> None:
        """Translate the nodes, in their (topological) order, and name the outputs."""
        self._walk(self.nodes)
        for value in self.proto.output:
            self.graph.outputs.append(self._output(value.name))

    def _walk(self, nodes: Sequence[onnx.NodeProto]) -> None:
        from fusetile.onnx_import.rules import RULES
        from fusetile.onnx_import.rules.unpool import follow

        for proto in nodes:
            node = self._node(proto)
            if all(name in self.constant for name in proto.output if name):
                self._fold(proto, node)
            elif node.kind == "If":
                self._choose(node)
            elif any(self.resolved(name) in self.places for name in node.inputs):
                follow(self, node, proto)
            elif node.kind not in RULES:
                raise self.refuse(node, "the op is not supported")
            elif any(node.outputs):
                RULES[node.kind](self, node)

    def _choose(self, node: Node) -> None:
        """The branch of an If whose condition is known, in its place."""
        chosen = bool(self.constant_input(node, 0, "condition").reshape(()))
        branch: onnx.GraphProto = node.attrs["then_branch" if chosen else "else_branch"]
        self.initializers |= {tensor.name: numpy_helper.to_array(tensor) for tensor in branch.initializer}
        self._fold_more(branch.node)
        self.uses.update(name for inner in branch.node for name in inner.input)
        self._walk(branch.node)
        for output, inner in zip(node.outputs, branch.output, strict=True):
            self.alias[output] = inner.name

    def _fold_more(self, nodes: Sequence[onnx.NodeProto]) -> None:
        """Find what is constant among nodes, knowing more than when the import began."""
        known = {name: self.initializers.get(name, np.zeros(0, np.int64)) for name in self.constant} | self.initializers
        self.constant |= folding.constant_outputs(nodes, known) - set(self.initializers)

    # -- what rules use ---------------------------------------------------------------------------------------------

    def refuse(self, node: Node, why: str) -> UnsupportedOp:
        """The error to raise for a form of an op that is not supported."""
        return UnsupportedOp(f"{self.where}: {node.origin}: {why}")

    def view(self, node: Node, i: int = 0) -> View:
        """A feature-map operand as a view of a graph tensor."""
        name = self.resolved(node.inputs[i])
        if name in self.views:
            return self.views[name]
        if name in self.graph.tensors and name not in self.graph.parameters:
            return self.whole(name)
        if name in self.masks:
            raise self.refuse(
                node, f"its input {node.inputs[i]!r} is random; only a dropout, random < p times a map, is"
            )
        return self._weight_as_map(node, i)

    def _weight_as_map(self, node: Node, i: int) -> View:
        """An initializer or a constant as a feature map: a class token, a table of biases. It is stored with a first
        dimension of one, so that nothing takes that for the batch."""
        name = self.resolved(node.inputs[i])
        source = self.transposes.get(name, name)
        array, base = self.weight(source), self.reshapes.get(source, (source, ()))[0]
        if array is None or not array.size:
            raise self.refuse(node, f"its input {node.inputs[i]!r} is {'not known' if array is None else 'empty'}")
        if self.is_map(base):
            view = self.whole(base).reshaped(array.shape)
        else:
            stored = array.shape if array.shape[:1] == (1,) and array.ndim < 5 else (1, *array.shape)
            stored = stored if len(stored) < 5 else (*stored[:3], prod(stored[3:]))
            whole = replace(node, inputs=(source,))
            view = self.whole(self.parameter(whole, 0, shape=stored, kind="map")).reshaped(array.shape)
        if view is None:
            raise self.refuse(node, f"its input {node.inputs[i]!r} is shared with a node that uses it in another way")
        return view if source == name else view.permuted((1, 0))

    def is_map(self, name: str) -> bool:
        """Whether an initializer or constant is already used as a feature map."""
        base = self.resolved(name)
        base = self.transposes.get(base, base)
        base = self.reshapes.get(base, (base, ()))[0]
        return base in self.graph.parameters and self.graph.tensors[base].kind == "map"

    def mask(self, name: str) -> Mask | None:
        """The random numbers that an operand is, if it is that."""
        return self.masks.get(self.resolved(name))

    def whole(self, name: str) -> View:
        """The view of a graph tensor as it is."""
        return View(name, whole_view(self.shape(name)))

    def seen_through(self, view: View) -> Dims | None:
        """The dimensions of a view, None if it is the tensor as it is stored."""
        return None if view.is_whole(self.shape(view.base)) else view.dims

    def data(self, node: Node, i: int = 0) -> str:
        """A feature-map operand as a graph tensor with the dimensions that the model sees."""
        return self.tensor(node, self.view(node, i))

    def tensor(self, node: Node, view: View, name: str = "") -> str:
        """A graph tensor with the dimensions of a view; made, under this name, when it is first asked for."""
        if self.seen_through(view) is None:
            return view.base
        if view not in self._tensors:
            shape, stored = view.shape, self.shape(view.base)
            if not 1 <= len(shape) <= 4:
                raise self.refuse(node, f"a tensor of shape {shape} is needed; supported are 1 to 4 dimensions")
            in_order = reshaped(view.dims, stored) == whole_view(stored)
            plain = in_order and shape[0] == stored[0] and min(len(shape), len(stored)) > 1
            kind, attrs = ("Reshape", {"shape": shape}) if plain else ("Rearrange", {"dims": view.dims})
            outputs = [name or self.fresh(f"{view.base}.{'x'.join(map(str, shape))}")]
            self._tensors[view] = self.emit(node, kind, [view.base], attrs, outputs=outputs)
        return self._tensors[view]

    def define(self, node: Node, view: View, name: str = "") -> None:
        """The node's output, or another name, is this view. The name of a weight stands for its own shape, not for the
        one that it is stored in."""
        if self.seen_through(view) is None and view.base not in self.graph.parameters:
            self.alias[name or node.outputs[0]] = view.base
        else:
            self.views[name or node.outputs[0]] = view

    def shape(self, name: str) -> tuple[int, ...]:
        """Static shape of a graph tensor."""
        return self.graph.tensors[name].shape

    def known_shape(self, name: str) -> tuple[int, ...]:
        """The shape of an operand, whatever it is."""
        name = self.resolved(name)
        if name in self.views:
            return self.views[name].shape
        if name in self.masks:
            return self.masks[name].shape
        if name in self.places:
            return self.places[name].shape
        array = self.weight(name)
        if array is None:
            return self.graph.tensors[name].shape
        return array.shape[::-1] if name in self.transposes else array.shape

    def constant_input(self, node: Node, i: int, what: str) -> Array:
        """The value of an operand that must be known now, such as a shape or a ratio."""
        name = self.resolved(node.inputs[i])
        if name not in self.values:
            raise self.refuse(node, f"its {what} ({node.inputs[i]!r}) must be a constant")
        return self.values[name]

    def new_constant(self, stem: str, value: Array) -> str:
        """A name under which rules find a value that they have made."""
        name = self.fresh(stem)
        self.values[name] = value
        return name

    def now_known(self, name: str, value: Array) -> None:
        """An output of the model has turned out to be constant."""
        self.values[name] = value
        self.constant.add(name)
        self._fold_more(self.nodes)

    def constant_shape(self, node: Node, i: int) -> tuple[int, ...]:
        """The shape of an operand that is an initializer or a constant, or the transpose of one."""
        name = self.resolved(node.inputs[i])
        array = self.weight(name)
        if array is None:
            raise self.refuse(node, f"its operand {node.inputs[i]!r} must be an initializer, not computed")
        return array.shape[::-1] if name in self.transposes else array.shape

    def weight(self, name: str) -> Array | None:
        """The value of an initializer or constant, if `name` is one, in the shape in which it is used."""
        name = self.resolved(name)
        if name in self.reshapes:
            base, shape = self.reshapes[name]
            return np.asarray(self.initializers.get(base, self.values.get(base))).reshape(shape)
        name = self.transposes.get(name, name)
        return self.initializers.get(name, self.values.get(name))

    def is_initializer(self, name: str) -> bool:
        """Whether a weight is one of the model's own, not a constant."""
        name = self.resolved(name)
        return self.reshapes.get(name, (name, ()))[0] in self.initializers

    def parameter(
        self,
        node: Node,
        i: int,
        *,
        rank: int | None = None,
        shape: Sequence[int] | None = None,
        transposed: bool = False,
        trainable: bool = True,
        kind: Literal["map", "filter"] | None = None,
        more: tuple[int, ...] = (),
    ) -> str:
        """Operand `i` as a parameter: of this shape, if it has as many elements; its first two dimensions swapped on
        demand; with `more` dimensions behind its own. Constants become parameters that are not trained."""
        name = self.resolved(node.inputs[i])
        if name in self.transposes:
            if shape is not None:
                raise self.refuse(
                    node, f"its operand {node.inputs[i]!r} is a transposed weight, which only a layer uses"
                )
            name, transposed = self.transposes[name], not transposed
        array = self.weight(name)
        name = self.reshapes.get(name, (name, ()))[0]
        if array is None:
            raise self.refuse(node, f"its operand {node.inputs[i]!r} must be an initializer, not computed")
        if array.dtype != np.float32:
            raise self.refuse(node, f"its operand {name!r} is {array.dtype}; export the model in float32")
        if rank not in (None, array.ndim):
            raise self.refuse(node, f"its operand {name!r} has shape {array.shape}; expected {rank} dimensions")
        shape = tuple(shape if shape is not None else (*array.shape, *more))
        if prod(shape) != array.size:
            raise self.refuse(node, f"its operand {name!r} has shape {array.shape}; expected {shape}")
        value = np.ascontiguousarray(array.reshape(shape).swapaxes(0, 1) if transposed else array.reshape(shape))
        onnx_name = name if name in self.initializers else ""
        trainable = trainable and bool(onnx_name) and onnx_name not in self.buffers
        parameter = Parameter(value, trainable, onnx_name, transposed)
        if name not in self.graph.parameters:
            return self.graph.add_parameter(name, parameter, kind=kind)
        was = self.graph.parameters[name]
        kind = kind or ("filter" if value.ndim >= 2 else "map")
        if (was.value.shape, was.transposed, was.trainable, self.graph.tensors[name].kind) != (
            value.shape,
            transposed,
            parameter.trainable,
            kind,
        ):
            raise self.refuse(node, f"its operand {name!r} is shared with a node that uses it in another way")
        return name

    def vector(self, node: Node, i: int, channels: int) -> str:
        """Operand `i` as one number per channel: a parameter, or computed."""
        if self.weight(node.inputs[i]) is not None:
            return self.parameter(node, i, shape=(channels,))
        view = self.view(node, i)
        flat = view.reshaped((channels,)) if prod(view.shape) == channels else None
        if flat is None:
            raise self.refuse(node, f"its operand {node.inputs[i]!r} has shape {view.shape}; expected {(channels,)}")
        return self.tensor(node, flat)

    def filter(self, node: Node, i: int, *, row: bool = False) -> str:
        """Operand `i` as the weights of a convolution: a parameter, or computed (weight standardization). `row`: its
        window lacks the rows."""
        shape = self.known_shape(node.inputs[i])
        if self.weight(node.inputs[i]) is not None:
            return self.parameter(node, i, shape=(*shape[:2], *(1,) * row, *shape[2:]))
        view = self.view(node, i)
        view = View(view.base, (*view.dims[:2], *((),) * row, *view.dims[2:]))
        return self.step(node, "weights", "FilterOf", [self.tensor(node, view)])

    def emit(
        self,
        node: Node,
        kind: str,
        inputs: Sequence[str],
        attrs: Mapping[str, Any] | None = None,
        *,
        outputs: Sequence[str] | None = None,
        phase: str = FORWARD,
    ) -> str:
        """Add an op, by default with the node's output; returns its first output."""
        names = outputs if outputs is not None else node.outputs[:1]
        try:
            return self.graph.add(kind, inputs, attrs=attrs, outputs=names, phase=phase, origin=node.origin)[0]
        except UserError as error:
            raise type(error)(f"{self.where}: {node.origin}: {error}") from None

    def step(
        self, node: Node, label: str, kind: str, inputs: Sequence[str], attrs: Mapping[str, Any] | None = None
    ) -> str:
        """Add an op on the way to the node's output; returns its output."""
        return self.emit(node, kind, inputs, attrs, outputs=[self.fresh(f"{node.outputs[0]}.{label}")])

    def resampled(self, node: Node, x: str, rows: Taps, columns: Taps, *, name: str = "") -> str:
        """Add a linear map of rows and columns; returns its output, called `name` if that is given."""
        outputs = [name or self.fresh(f"{node.outputs[0]}.map")]
        return resample(self.graph, x, rows, columns, outputs=outputs, origin=node.origin)

    def convolved(self, node: Node, x: str, weights: Array, label: str) -> str:
        """Add a 1x1 convolution with constant weights [K, C, 1, 1]; returns its output."""
        name = self.fresh(f"{node.outputs[0]}.{label}.weights")
        self.graph.add_parameter(name, Parameter(weights, trainable=False))
        window = {"strides": (1, 1), "dilations": (1, 1), "pads": (0, 0, 0, 0)}
        return self.step(node, label, "Conv", [x, name], window)

    def made_by(self, name: str, tensor: str) -> bool:
        """Whether the model's tensor `name` is the first that stands for a graph tensor: no alias of another."""
        return name == tensor or (name in self.views and self.views[name].base.startswith(f"{name}."))

    def reshape_weight(self, node: Node, shape: Sequence[int], weight: Array) -> None:
        """The node's output is an initializer in another shape, for `parameter` to see through."""
        source = self.resolved(node.inputs[0])
        if source in self.transposes:
            raise self.refuse(node, f"it reshapes {node.inputs[0]!r}, a transposed weight")
        base = self.reshapes.get(source, (source, ()))[0]
        self.reshapes[node.outputs[0]] = (base, weight.reshape(tuple(shape)).shape)

    def transpose(self, node: Node) -> None:
        """The node's output is the transpose of an initializer, for `parameter` to see through."""
        self.transposes[node.outputs[0]] = self.resolved(node.inputs[0])

    def fresh(self, stem: str) -> str:
        """A tensor name that neither the graph nor the model has, now or later."""
        while (name := self.graph.fresh(stem)) in self.reserved:
            stem = f"{stem}_"
        return name

    def control(self, role: str) -> str:
        """The control tensor of a role, declared when first asked for."""
        for name, held in self.graph.controls.items():
            if held == role:
                return name
        name = self.graph.add_tensor(self.fresh(role), (1,), "int32")
        self.graph.controls[name] = role
        return name

    def require_unused(self, node: Node, outputs: Sequence[str]) -> None:
        """Refuse a node of which optional outputs are read."""
        for name in outputs:
            if self.uses[name]:
                raise self.refuse(node, f"its output {name!r} is used; only the first output is supported")

    def input_dims(self, value: onnx.ValueInfoProto, *, ranks: tuple[int, ...] = (2, 4)) -> list[int | None]:
        """Sizes of an input, None for a dynamic batch. `ranks`: what it may have of dimensions if it has no labels."""
        tensor = value.type.tensor_type
        place = f"{self.where}: input {value.name!r}"
        labels = value.name in self.labels
        if tensor.elem_type not in (_INTEGERS if labels else (onnx.TensorProto.FLOAT,)):
            kinds = {number: kind.lower() for kind, number in onnx.TensorProto.DataType.items()}
            kind = kinds.get(tensor.elem_type, f"of the unknown type {tensor.elem_type}")
            if labels:
                raise UserError(
                    f"{place} is {kind}; the labels of a loss of classes are int64 or int32. For class probabilities "
                    "write the loss out: -(targets * log_softmax(y, 1)).sum(1).mean()"
                )
            raise UserError(f"{place} is {kind}; fusetile's inputs are float32: export the model in float32")
        dims = [dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim]
        if len(dims) not in ((1, 3) if labels else ranks):
            raise UserError(f"{place} has {len(dims)} dimensions; supported are [N, C, H, W] and [N, C]")
        dynamic = [
            f"{(tensor.shape.dim[i].dim_param or '?')!r} (dimension {i})" for i in range(1, len(dims)) if not dims[i]
        ]
        if dynamic:
            raise UserError(
                f"{place} has the dynamic dimensions {', '.join(dynamic)}; only the batch may be dynamic: export with "
                "fixed sizes, or fix them with `python -m onnxruntime.tools.make_dynamic_shape_fixed`"
            )
        return dims

    # -- inside -----------------------------------------------------------------------------------------------------

    def _read_initializers(self) -> dict[str, Array]:
        if self.proto.sparse_initializer:
            name = self.proto.sparse_initializer[0].values.name
            raise UserError(f"{self.where}: initializer {name!r} is sparse; export the model with dense weights")
        arrays = {}
        for tensor in self.proto.initializer:
            try:
                arrays[tensor.name] = numpy_helper.to_array(tensor)
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{self.where}: initializer {tensor.name!r} is damaged ({error}); copy or export the model again"
                ) from None
        return arrays

    def _node(self, proto: onnx.NodeProto) -> Node:
        attrs = {attribute.name: helper.get_attribute_value(attribute) for attribute in proto.attribute}
        attrs = {
            key: value.decode(errors="replace") if isinstance(value, bytes) else value for key, value in attrs.items()
        }
        origin = f"{proto.op_type} node {(proto.name or proto.output[0])!r}"
        return Node(proto.op_type, tuple(proto.input), tuple(proto.output), attrs, origin, self.opset)

    def _fold(self, proto: onnx.NodeProto, node: Node) -> None:
        known = ChainMap(self.values, self.initializers)
        values = {name: known[name] for name in node.inputs if name in known}
        if (described := folding.SHAPE_ONLY.get(node.kind)) is not None and node.inputs[described] not in values:
            name = node.inputs[described]
            values[name] = np.broadcast_to(np.float32(0), self.known_shape(name))
        self.values |= folding.evaluate(proto, self.opset, values, origin=f"{self.where}: {node.origin}")

    def resolved(self, name: str) -> str:
        """The name behind aliases."""
        while name in self.alias:
            name = self.alias[name]
        return name

    def _output(self, name: str) -> str:
        """An output keeps its name."""
        source = self.resolved(name)
        node = Node("Identity", (name,), (name,), {}, f"output {name!r}", self.opset)
        if source in self.views:
            view = self.views[source]
            if len(view.dims) > 4:  # raw heads of detectors: kept with the last dimensions as one
                flat = view.reshaped((*view.shape[:3], prod(view.shape[3:])))
                assert flat is not None  # neighbours can always be put together
                view = flat
            source = (
                self.tensor(node, view, name) if view.dims else view.base
            )  # a scalar is stored with dimensions of 1
        if source in self.places:
            raise self.refuse(node, "it is the indices of a MaxPool; only unpooling by them is supported")
        if source not in self.graph.tensors or source in self.graph.parameters:
            raise UserError(f"{self.where}: output {name!r} does not depend on the model's inputs")
        if source != name:
            self.graph.add("Identity", [source], outputs=[name], origin=node.origin)
        return name


def decomposed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with ops that ONNX defines by others taken apart; how depends on the types of their operands."""
    described = onnx.shape_inference.infer_shapes(model)
    known = (helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in described.graph.initializer)
    described.graph.value_info.extend(known)
    return inliner.inline_selected_functions(described, [("", op) for op in COMPOSED], inline_schema_functions=True)


def live_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes on which an output depends, in the graph's order."""
    wanted = {output.name for output in graph.output}
    live = []
    for node in reversed(graph.node):
        if wanted.intersection(name for name in node.output if name):
            wanted.update(node.input)
            for branch in (attribute.g for attribute in node.attribute if attribute.HasField("g")):
                wanted.update(name for inner in branch.node for name in inner.input)
            live.append(node)
    return live[::-1]


def labels_of(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    """What losses of classes read as labels, and nothing else reads but their shape."""
    reads = [
        (name, node.op_type in _LABELLED and i == 1)
        for node in nodes
        for i, name in enumerate(node.input)
        if folding.SHAPE_ONLY.get(node.op_type) != i
    ]
    return {name for name, labels in reads if labels} - {name for name, labels in reads if not labels}
