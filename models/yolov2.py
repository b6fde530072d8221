"""The first layers of YOLOv2 (Redmon and Farhadi, arXiv 1612.08242): convolution, BatchNorm, leaky ReLU; max pools.

python -m models.yolov2 --layers 16 --size 416 -o yolov2.onnx
"""

from collections.abc import Sequence

import onnx

from models.builder import Builder, parser, scaled, write

POOL = (0, 2)
# (filters, kernel) as darknet's yolov2.cfg numbers them, up to its first route
LAYERS = (
    *((32, 3), POOL),
    *((64, 3), POOL),
    *((128, 3), (64, 1), (128, 3), POOL),
    *((256, 3), (128, 1), (256, 3), POOL),
    *((512, 3), (256, 1), (512, 3), (256, 1), (512, 3), POOL),
    *((1024, 3), (512, 1), (1024, 3), (512, 1), (1024, 3), (1024, 3), (1024, 3)),
)


def build(
    *,
    layers: int = 16,
    size: int = 416,
    channels: int = 3,
    classes: int | None = None,
    width: float = 1.0,
    batch: int | None = None,
    seed: int = 0,
) -> onnx.ModelProto:
    """Images [batch, channels, size, size] -> the map of the last layer, or with `classes` a 1x1 convolution of it:
    logits per pixel."""
    if not 1 <= layers <= len(LAYERS):
        raise ValueError(f"--layers {layers} is not in 1..{len(LAYERS)}")
    net = Builder(f"yolov2-{layers}", channels=channels, size=size, batch=batch, seed=seed)
    x = darknet_layers(net, LAYERS[:layers], width)
    return net.model(net.conv("head", x, classes, kernel=1) if classes else x)


def darknet_layers(net: Builder, layers: Sequence[tuple[int, int]], width: float) -> str:
    """Pools, and convolutions with BatchNorm and leaky ReLU, from the image on."""
    x = "x"
    for i, (filters, kernel) in enumerate(layers):
        if filters == 0:
            x = net.max_pool(f"layer{i}.pool", x)
        else:
            x = net.conv(f"layer{i}.conv", x, scaled(filters, width), kernel=kernel, bias=False)
            x = net.leaky_relu(f"layer{i}.leaky", net.batch_norm(f"layer{i}.bn", x), alpha=0.1)
    return x


if __name__ == "__main__":
    options = parser("The first layers of YOLOv2 as ONNX", size=416, classes=None)
    options.add_argument("--layers", type=int, default=16, help=f"how many layers, pools counted (1 to {len(LAYERS)})")
    write(options, build)
