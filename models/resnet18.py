"""ResNet-18 (He et al., arXiv 1512.03385), with torchvision's names.

python -m models.resnet18 --size 224 --classes 1000 -o resnet18.onnx
"""

import onnx

from models.builder import Builder, parser, scaled, write


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
    net = Builder("resnet18", channels=channels, size=size, batch=batch, seed=seed)
    x = net.conv("conv1", "x", scaled(64, width), kernel=7, stride=2, bias=False)
    x = net.relu("relu", net.batch_norm("bn1", x))
    x = net.max_pool("maxpool", x, kernel=3, stride=2, pad=1)
    for stage, filters in enumerate((64, 128, 256, 512), 1):
        for block in (0, 1):
            stride = 2 if stage > 1 and block == 0 else 1
            x = basic_block(net, f"layer{stage}.{block}", x, scaled(filters, width), stride=stride)
    x = net.flatten("flatten", net.global_average_pool("avgpool", x))
    return net.model(net.linear("fc", x, classes))


def basic_block(net: Builder, name: str, x: str, filters: int, *, stride: int) -> str:
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where the shape changes."""
    y = net.conv(f"{name}.conv1", x, filters, stride=stride, bias=False)
    y = net.relu(f"{name}.relu1", net.batch_norm(f"{name}.bn1", y))
    y = net.batch_norm(f"{name}.bn2", net.conv(f"{name}.conv2", y, filters, bias=False))
    if net.shapes[x] != net.shapes[y]:
        x = net.conv(f"{name}.downsample.0", x, filters, kernel=1, stride=stride, bias=False)
        x = net.batch_norm(f"{name}.downsample.1", x)
    return net.relu(f"{name}.relu2", net.add(f"{name}.add", y, x))


if __name__ == "__main__":
    write(parser("ResNet-18 as ONNX", size=224, classes=1000), build)
