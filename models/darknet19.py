"""Darknet-19 (Redmon and Farhadi, arXiv 1612.08242, table 6): the classifier whose convolutions YOLOv2 begins with.

python -m models.darknet19 --size 224 --classes 1000 -o darknet19.onnx
"""

import onnx

from models.builder import Builder, parser, write
from models.yolov2 import LAYERS, darknet_layers

CONVOLUTIONS = LAYERS[:23]  # 18 of them, and the pools


def build(
    *,
    size: int = 224,
    channels: int = 3,
    classes: int = 1000,
    width: float = 1.0,
    batch: int | None = None,
    seed: int = 0,
) -> onnx.ModelProto:
    """Images [batch, channels, size, size] -> logits [batch, classes]: those of the pixels, averaged."""
    net = Builder("darknet19", channels=channels, size=size, batch=batch, seed=seed)
    x = net.conv("classifier", darknet_layers(net, CONVOLUTIONS, width)[-1], classes, kernel=1)
    return net.model(net.flatten("flatten", net.global_average_pool("avgpool", x)))


if __name__ == "__main__":
    write(parser("Darknet-19 as ONNX", size=224, classes=1000), build)
