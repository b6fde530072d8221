"""A VGG-like network (Simonyan and Zisserman, arXiv 1409.1556) with BatchNorm, for images of about 32x32.

python -m models.vgg_small --size 32 -o vgg_small.onnx
"""

import onnx

from models.builder import Builder, parser, scaled, write

STAGES = ((16, 16), (32, 32), (64, 64))  # channels of the convolutions; a pool ends each stage


def build(
    *,
    size: int = 32,
    channels: int = 3,
    classes: int = 10,
    width: float = 1.0,
    batch: int | None = None,
    seed: int = 0,
) -> onnx.ModelProto:
    """Images [batch, channels, size, size] -> logits [batch, classes]."""
    net = Builder("vgg_small", channels=channels, size=size, batch=batch, seed=seed)
    x = "x"
    for i, stage in enumerate(STAGES, 1):
        for j, filters in enumerate(stage, 1):
            x = net.conv(f"conv{i}_{j}", x, scaled(filters, width), bias=False)
            x = net.relu(f"relu{i}_{j}", net.batch_norm(f"bn{i}_{j}", x))
        x = net.max_pool(f"pool{i}", x)
    x = net.flatten("flatten", net.global_average_pool("average", x))
    return net.model(net.linear("fc", x, classes))


if __name__ == "__main__":
    write(parser("A VGG-like network with BatchNorm for small images, as ONNX", size=32), build)
