"""DenseNet-121 (Huang et al., arXiv 1608.06993), with torchvision's names.

python -m models.densenet121 --size 224 --classes 1000 -o densenet121.onnx
"""

import onnx

from models.builder import Builder, parser, scaled, write

BLOCKS = (6, 12, 24, 16)  # layers
GROWTH, BOTTLENECK = 32, 4


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
    net = Builder("densenet121", channels=channels, size=size, batch=batch, seed=seed)
    x = net.conv("features.conv0", "x", scaled(2 * GROWTH, width), kernel=7, stride=2, bias=False)
    x = net.relu("features.relu0", net.batch_norm("features.norm0", x))
    x = net.max_pool("features.pool0", x, kernel=3, stride=2, pad=1)
    for number, layers in enumerate(BLOCKS, 1):
        for layer in range(1, layers + 1):
            new = dense_layer(net, f"features.denseblock{number}.denselayer{layer}", x, scaled(GROWTH, width))
            x = net.concat(f"features.denseblock{number}.concat{layer}", x, new)
        if number < len(BLOCKS):
            name = f"features.transition{number}"
            x = net.conv(f"{name}.conv", _norm_relu(net, name, "", x), net.shapes[x][0] // 2, kernel=1, bias=False)
            x = net.average_pool(f"{name}.pool", x)
    x = net.relu("relu", net.batch_norm("features.norm5", x))
    x = net.flatten("flatten", net.global_average_pool("avgpool", x))
    return net.model(net.linear("classifier", x, classes))


def dense_layer(net: Builder, name: str, x: str, growth: int) -> str:
    """The channels that a layer adds: 1x1 and 3x3 convolutions, each behind BatchNorm and ReLU."""
    x = net.conv(f"{name}.conv1", _norm_relu(net, name, "1", x), BOTTLENECK * growth, kernel=1, bias=False)
    return net.conv(f"{name}.conv2", _norm_relu(net, name, "2", x), growth, bias=False)


def _norm_relu(net: Builder, name: str, number: str, x: str) -> str:
    return net.relu(f"{name}.relu{number}", net.batch_norm(f"{name}.norm{number}", x))


if __name__ == "__main__":
    write(parser("DenseNet-121 as ONNX", size=224, classes=1000), build)
