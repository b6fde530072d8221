"""What is known in the midst of an import, and what rules do with it: operands, parameters, new ops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx

from fusetile.errors import UnsupportedOp, UserError
from fusetile.graph import FORWARD, Graph, Parameter
from fusetile.onnx_import import folding
from fusetile.onnx_import.contents import Array, Node, initializers_of, labels_of, live_nodes
from fusetile.onnx_import.untrained import buffers_of
from fusetile.onnx_import.views import View
from fusetile.ops.rearrange import Dims, reshaped, whole_view
from fusetile.ops.resample import Taps, resample

if TYPE_CHECKING:
    from fusetile.onnx_import.rules.unpool import Places


@dataclass(frozen=True, slots=True)
class Mask:
    """Random numbers that a model draws, of this shape: those between `low` and `low` + 1 while `kept` is None, and
    after a comparison `factor` with the probability `kept`, else 0."""

    shape: tuple[int, ...]
    kept: float | None = None
    factor: float = 1.0
    low: float = 0.0


class Importer:
    """State of one import. Rules (rules/) read a node's operands and add ops through its methods."""

    def __init__(
        self, model: onnx.ModelProto, *, where: str, opset: int, bn: str, dropout: float | None, seed: int
    ) -> None:
        self.where, self.opset, self.bn, self.dropout, self.seed = where, opset, bn, dropout, seed
        self.proto = model.graph
        self.graph = Graph(model.graph.name or "model")
        self.initializers = initializers_of(model.graph, where)
        self.nodes = live_nodes(model.graph)
        self.buffers = buffers_of(self.initializers, self.nodes)
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

    def find_constants(self, nodes: Sequence[onnx.NodeProto]) -> None:
        """Find what is constant among nodes, knowing more than when the import began."""
        known = {name: self.initializers.get(name, np.zeros(0, np.int64)) for name in self.constant} | self.initializers
        self.constant |= folding.constant_outputs(nodes, known) - set(self.initializers)

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
        base = self.base_of(name)
        return base in self.graph.parameters and self.graph.tensors[base].kind == "map"

    def base_of(self, name: str) -> str:
        """The initializer or constant that a name stands for, reshaped or transposed or not."""
        base = self.resolved(name)
        base = self.transposes.get(base, base)
        return self.reshapes.get(base, (base, ()))[0]

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
        self.find_constants(self.nodes)

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
        if not array.size:
            raise self.refuse(node, f"its operand {name!r} of shape {array.shape} is empty; is the network too narrow?")
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
            if not onnx_name:  # a constant may have copies
                return self.graph.add_parameter(self.fresh(name), parameter, kind=kind)
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

    def resolved(self, name: str) -> str:
        """The name behind aliases."""
        while name in self.alias:
            name = self.alias[name]
        return name
