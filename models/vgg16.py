"""VGG-16 (Simonyan and Zisserman, arXiv 1409.1556), with torchvision's names.

python -m models.vgg16 --size 224 --classes 1000 -o vgg16.onnx
"""

import onnx

from models.builder import Builder, parser, scaled, write

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # filters, convolutions before the pool


def build(
    *,
    size: int = 224,
    channels: int = 3,
    classes: int = 1000,
    width: float = 1.0,
    dropout: float = 0.5,
    batch: int | None = None,
    seed: int = 0,
) -> onnx.ModelProto:
    """Images [batch, channels, size, size] -> logits [batch, classes]."""
    net = Builder("vgg16", channels=channels, size=size, batch=batch, seed=seed)
    x, number = "x", 0
    for filters, convolutions in STAGES:
        for _ in range(convolutions):
            x = net.conv(f"features.{number}", x, scaled(filters, width))
            x = net.relu(f"features.{number + 1}", x)
            number += 2
        x = net.max_pool(f"features.{number}", x)
        number += 1
    x = net.flatten("flatten", x)
    for number in (0, 3):
        x = net.relu(f"classifier.{number + 1}", net.linear(f"classifier.{number}", x, scaled(4096, width)))
        x = net.dropout(f"classifier.{number + 2}", x, ratio=dropout)
    return net.model(net.linear("classifier.6", x, classes))


if __name__ == "__main__":
    options = parser("VGG-16 as ONNX", size=224, classes=1000)
    options.add_argument("--dropout", type=float, default=0.5, help="ratio; 0 leaves it out")
    write(options, build)
