"""ResNet-50 (He et al., arXiv 1512.03385), with torchvision's names and its stride in the 3x3 convolution.

python -m models.resnet50 --size 224 --classes 1000 -o resnet50.onnx
"""

import onnx

from models.builder import Builder, parser, scaled, write

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # filters, blocks
EXPANSION = 4


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
    net = Builder("resnet50", channels=channels, size=size, batch=batch, seed=seed)
    x = net.conv("conv1", "x", scaled(64, width), kernel=7, stride=2, bias=False)
    x = net.relu("relu", net.batch_norm("bn1", x))
    x = net.max_pool("maxpool", x, kernel=3, stride=2, pad=1)
    for stage, (filters, blocks) in enumerate(STAGES, 1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            x = bottleneck(net, f"layer{stage}.{block}", x, scaled(filters, width), stride=stride)
    x = net.flatten("flatten", net.global_average_pool("avgpool", x))
    return net.model(net.linear("fc", x, classes))


def bottleneck(net: Builder, name: str, x: str, filters: int, *, stride: int) -> str:
    """1x1, 3x3 and 1x1 around a shortcut, which is a 1x1 convolution where the shape changes."""
    y = x
    for i, (kernel, step) in enumerate(((1, 1), (3, stride)), 1):
        y = net.conv(f"{name}.conv{i}", y, filters, kernel=kernel, stride=step, bias=False)
        y = net.relu(f"{name}.relu{i}", net.batch_norm(f"{name}.bn{i}", y))
    y = net.conv(f"{name}.conv3", y, filters * EXPANSION, kernel=1, bias=False)
    y = net.batch_norm(f"{name}.bn3", y)
    if net.shapes[x] != net.shapes[y]:
        x = net.conv(f"{name}.downsample.0", x, filters * EXPANSION, kernel=1, stride=stride, bias=False)
        x = net.batch_norm(f"{name}.downsample.1", x)
    return net.relu(f"{name}.relu3", net.add(f"{name}.add", y, x))


if __name__ == "__main__":
    write(parser("ResNet-50 as ONNX", size=224, classes=1000), build)
