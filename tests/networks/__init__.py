"""Small versions of networks that people export, as PyTorch modules: the set that `benchmarks.coverage` goes through.

Importing this needs PyTorch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.networks import attention, classifiers, dense, detectors, restoration
from tests.networks.blocks import Apply

EXPORTERS = ("legacy", "dynamo")


@dataclass(frozen=True)
class Network:
    """A builder, the shapes of the inputs without the batch, the loss on every output, and who can export it."""

    build: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...] = ((3, 24, 24),)
    loss: str = "cross-entropy"
    exporters: tuple[str, ...] = EXPORTERS


def _all(module: Any, names: str, loss: str) -> dict[str, Network]:
    return {name: Network(getattr(module, name), loss=loss) for name in names.split()}


NETWORKS: dict[str, Network] = {
    **_all(
        classifiers,
        "lenet alexnet vgg resnet resnet_with_padded_shortcut resnext se_resnet preact_resnet densenet squeezenet "
        "shufflenet mobilenet_v1 mobilenet_v2 mobilenet_v3 mnasnet efficientnet googlenet inception_v3 regnet convnext "
        "ghostnet resnest eca_net cbam res2net group_normalized weight_standardized vision_transformer",
        "cross-entropy",
    ),
    **_all(attention, "class_token swin position_encoded", "cross-entropy"),
    **_all(dense, "unet unet_bilinear fcn deeplab pspnet lraspp hrnet", "cross-entropy"),
    **_all(
        dense,
        "srcnn fsrcnn espcn edsr ffdnet dncnn autoencoder style_transfer pix2pix attention_gate",
        "mse",
    ),
    **_all(restoration, "rcan rdn srgan_generator patch_discriminator nafnet cyclegan", "mse"),
    **_all(
        detectors,
        "yolo_v2 tiny_yolo yolo_v3 yolo_v5 yolo_v8 yolo_11_attention ssd feature_pyramid",
        "mse",
    ),
    "adaptive_pyramid": Network(dense.adaptive_pyramid, exporters=("dynamo",)),
    "segnet": Network(dense.segnet, exporters=("dynamo",)),
    "siamese": Network(detectors.siamese, ((3, 24, 24), (3, 24, 24)), "mse"),
    "variational": Network(restoration.variational, ((3, 24, 24), (4,)), "mse"),
    "adaptive_style": Network(restoration.adaptive_style, ((3, 16, 16), (3, 16, 16)), "mse"),
    "two_inputs": Network(detectors.two_inputs, ((3, 24, 24), (4,)), "mse"),
}


def made(name: str) -> nn.Module:
    """The network, in training mode, with seeded weights; norms are not left at one and zero."""
    torch.manual_seed(len(name))
    module = NETWORKS[name].build().train()
    for parameter in module.parameters():
        if parameter.ndim == 1 and parameter.numel() > 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def export(
    module: nn.Module, shapes: Sequence[tuple[int, ...]], path: Path, exporter: str, opset: int | None = None
) -> None:
    """As a user would for training, with a dynamic batch; `opset` None is the exporter's own."""
    inputs = tuple(torch.randn(2, *shape) for shape in shapes)
    names = ["x"] if len(shapes) == 1 else [f"x{i}" for i in range(len(shapes))]
    options: dict[str, Any] = {"input_names": names, **({"opset_version": opset} if opset else {})}
    if exporter == "dynamo":
        options |= {"dynamo": True, "optimize": False, "verbose": False}
        batch = torch.export.Dim("batch", min=1, max=64)
        dims = tuple({0: batch} for _ in shapes)
        options["dynamic_shapes"] = (dims,) if isinstance(module, Apply) else dims  # Apply takes *inputs
    else:
        options |= {"dynamo": False, "do_constant_folding": False, "training": torch.onnx.TrainingMode.TRAINING}
        options["dynamic_axes"] = {name: {0: "batch"} for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, inputs, str(path), **options)
