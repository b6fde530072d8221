"""One training step of an ONNX model in PyTorch, float64, read off the ONNX nodes: shares no code with fusetile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch.nn import functional

_TRAINED = {"Clip": 1, "Resize": 1}  # how many inputs of a node may be trained: the others are its numbers


@dataclass(frozen=True)
class StepResult:
    """By initializer name: `gradients` of what is trained, `updated` values of all that changes."""

    loss: float
    gradients: dict[str, np.ndarray]
    updated: dict[str, np.ndarray]


def torch_step(
    proto: onnx.ModelProto,
    x: np.ndarray,
    target: np.ndarray,
    *,
    loss: str,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> StepResult:
    """BatchNormalization uses the batch's statistics and updates the running ones by ONNX's rule."""
    weights = {t.name: torch.tensor(numpy_helper.to_array(t).astype(np.float64)) for t in proto.graph.initializer}
    constant = {name for n in proto.graph.node for name in n.input[_TRAINED.get(n.op_type, 3) :]}
    trained = {name: value.requires_grad_() for name, value in weights.items() if name not in constant}
    values = {**weights, proto.graph.input[0].name: torch.tensor(x.astype(np.float64))}
    running: dict[str, torch.Tensor] = {}
    for node in proto.graph.node:
        _run(node, values, running)
    output = values[proto.graph.output[0].name]
    if loss == "mse":
        total = functional.mse_loss(output, torch.tensor(target.astype(np.float64)))
    else:
        total = functional.cross_entropy(output, torch.tensor(target.astype(np.int64)))
    total.backward()
    gradients = {name: value.grad.numpy().copy() for name, value in trained.items()}
    optimizer = torch.optim.SGD(list(trained.values()), learning_rate, momentum=momentum, weight_decay=weight_decay)
    optimizer.step()
    updated = {name: value.detach().numpy() for name, value in (trained | running).items()}
    return StepResult(total.item(), gradients, updated)


def _run(node: onnx.NodeProto, values: dict[str, torch.Tensor], running: dict[str, torch.Tensor]) -> None:
    attrs: Mapping = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    x, *rest = (values[name] for name in node.input if name)
    match node.op_type:
        case "Conv":
            bias = rest[1] if len(rest) > 1 else None
            strides, dilations, groups = (attrs[key] for key in ("strides", "dilations", "group"))
            y = functional.conv2d(_padded(x, attrs, 0.0), rest[0], bias, strides, 0, dilations, groups)
        case "ConvTranspose":
            y = functional.conv_transpose2d(x, *rest, attrs["strides"])
        case "Gemm":
            assert attrs["transB"] == 1
            y = functional.linear(x, rest[0], rest[1])
        case "BatchNormalization":
            gamma, beta, mean, variance = rest
            y = functional.batch_norm(x, None, None, gamma, beta, True, 0.0, attrs["epsilon"])
            keep, axes = attrs["momentum"], (0, 2, 3)
            running[node.input[3]] = (keep * mean + (1 - keep) * x.mean(axes)).detach()
            running[node.input[4]] = (keep * variance + (1 - keep) * x.var(axes, unbiased=False)).detach()
        case "Relu":
            y = functional.relu(x)
        case "LeakyRelu":
            y = functional.leaky_relu(x, attrs["alpha"])
        case "Clip":
            y = functional.hardtanh(x, *(value.item() for value in rest))
        case "Concat":
            y = torch.cat([x, *rest], attrs["axis"])
        case "SpaceToDepth":
            block = attrs["blocksize"]
            y = x.unflatten(3, (-1, block)).unflatten(2, (-1, block)).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
        case "Resize":
            y = functional.interpolate(x, scale_factor=[scale.item() for scale in rest[0][2:]])
        case "AveragePool":
            y = functional.avg_pool2d(_padded(x, attrs, 0.0), attrs["kernel_shape"], attrs["strides"])
        case "MaxPool":
            y = functional.max_pool2d(_padded(x, attrs, -torch.inf), attrs["kernel_shape"], attrs["strides"])
        case "GlobalAveragePool":
            y = x.mean((2, 3), keepdim=True)
        case "Add":
            y = x + rest[0]
        case "Flatten":
            y = x.flatten(1)
        case kind:
            raise AssertionError(f"no PyTorch for {kind}: add its case here")
    values[node.output[0]] = y


def _padded(x: torch.Tensor, attrs: Mapping, value: float) -> torch.Tensor:
    top, left, bottom, right = attrs.get("pads", (0, 0, 0, 0))
    return functional.pad(x, (left, right, top, bottom), value=value)
