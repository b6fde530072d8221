"""MobileNetV2 (Sandler et al., arXiv 1801.04381), with torchvision's names.

python -m models.mobilenetv2 --size 224 --classes 1000 -o mobilenetv2.onnx
"""

import onnx

from models.builder import Builder, parser, scaled, write

# expansion, output channels, blocks, stride of the first
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def build(
    *,
    size: int = 224,
    channels: int = 3,
    classes: int = 1000,
    width: float = 1.0,
    batch: int | None = None,
    seed: int = 0,
) -> onnx.ModelProto:
    """Images [batch, channels, size, size] -> logits [batch, classes]."""
    net = Builder("mobilenetv2", channels=channels, size=size, batch=batch, seed=seed)
    x, number = _unit(net, "features.0", "x", scaled(32, width), stride=2), 1
    for expansion, filters, blocks, first_stride in STAGES:
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            x = inverted_residual(net, f"features.{number}", x, scaled(filters, width), expansion, stride=stride)
            number += 1
    x = _unit(net, f"features.{number}", x, scaled(1280, width), kernel=1)
    x = net.flatten("flatten", net.global_average_pool("avgpool", x))
    return net.model(net.linear("classifier.1", x, classes))


def _unit(net: Builder, name: str, x: str, filters: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> str:
    """Convolution, BatchNorm, ReLU6."""
    x = net.conv(f"{name}.0", x, filters, kernel=kernel, stride=stride, bias=False, groups=groups)
    return net.relu6(f"{name}.2", net.batch_norm(f"{name}.1", x))


def inverted_residual(net: Builder, name: str, x: str, filters: int, expansion: int, *, stride: int) -> str:
    """1x1 to more channels, depthwise 3x3, 1x1 to `filters`; a shortcut where the shape stays."""
    in_channels = net.shapes[x][0]
    y, layer = x, 0
    if expansion > 1:
        y, layer = _unit(net, f"{name}.conv.0", y, in_channels * expansion, kernel=1), 1
    hidden = net.shapes[y][0]
    y = _unit(net, f"{name}.conv.{layer}", y, hidden, stride=stride, groups=hidden)
    y = net.conv(f"{name}.conv.{layer + 1}", y, filters, kernel=1, bias=False)
    y = net.batch_norm(f"{name}.conv.{layer + 2}", y)
    return net.add(f"{name}.add", x, y) if net.shapes[x] == net.shapes[y] else y


if __name__ == "__main__":
    write(parser("MobileNetV2 as ONNX", size=224, classes=1000), build)
