"""YOLOv2 (Redmon and Farhadi, arXiv 1612.08242), whole or its first layers: convolution, BatchNorm, leaky ReLU; pools.

python -m models.yolov2 --layers 16 --size 416 -o yolov2.onnx
python -m models.yolov2 --layers 31 --size 416 --classes 80 -o yolov2.onnx
python -m models.yolov2 --tiny --anchors 3 --size 208 --classes 20 -o tiny.onnx
"""

from collections.abc import Sequence

import onnx

from models.builder import Builder, parser, scaled, write

POOL = (0, 2)
# (filters, kernel) as darknet's yolov2.cfg numbers them, up to its first route; the whole has WHOLE layers
LAYERS = (
    *((32, 3), POOL),
    *((64, 3), POOL),
    *((128, 3), (64, 1), (128, 3), POOL),
    *((256, 3), (128, 1), (256, 3), POOL),
    *((512, 3), (256, 1), (512, 3), (256, 1), (512, 3), POOL),
    *((1024, 3), (512, 1), (1024, 3), (512, 1), (1024, 3), (1024, 3), (1024, 3)),
)

WHOLE, PASSED, ANCHORS = 31, 16, 5  # PASSED: the layer whose map goes past the last pool
# darknet's yolov2-tiny.cfg without its last two pools and its widest layers: cells of 16 pixels, not 32
TINY = (*((16, 3), POOL), *((32, 3), POOL), *((64, 3), POOL), *((128, 3), POOL), *((256, 3), (256, 3)))


def build(
    *,
    layers: int = 16,
    size: int = 416,
    channels: int = 3,
    classes: int | None = None,
    tiny: bool = False,
    anchors: int = ANCHORS,
    width: float = 1.0,
    batch: int | None = None,
    seed: int = 0,
) -> onnx.ModelProto:
    """Images [batch, channels, size, size] -> the map of the last layer, or with `classes` a 1x1 convolution of it:
    logits per pixel. The whole network, or the tiny one: per pixel and anchor a box, its confidence, and the logits of
    the classes."""
    filters = anchors * (5 + (80 if classes is None else classes))
    if tiny:
        net = Builder("yolov2-tiny", channels=channels, size=size, batch=batch, seed=seed)
        return net.model(net.conv("head", darknet_layers(net, TINY, width)[-1], filters, kernel=1))
    if not 1 <= layers <= len(LAYERS) and layers != WHOLE:
        raise ValueError(f"--layers {layers} is neither in 1..{len(LAYERS)} nor {WHOLE}, the whole network")
    net = Builder(f"yolov2-{layers}", channels=channels, size=size, batch=batch, seed=seed)
    maps = darknet_layers(net, LAYERS[:layers], width)
    if layers == WHOLE:
        return net.model(net.conv("layer30.conv", _detector(net, maps, width), filters, kernel=1))
    x = maps[-1]
    return net.model(net.conv("head", x, classes, kernel=1) if classes else x)


def darknet_layers(net: Builder, layers: Sequence[tuple[int, int]], width: float) -> list[str]:
    """The maps of pools, and of convolutions with BatchNorm and leaky ReLU, from the image on."""
    maps = ["x"]
    for i, (filters, kernel) in enumerate(layers):
        if filters == 0:
            maps.append(net.max_pool(f"layer{i}.pool", maps[-1]))
        else:
            maps.append(_convolution(net, i, maps[-1], scaled(filters, width), kernel))
    return maps[1:]


def _convolution(net: Builder, number: int, x: str, filters: int, kernel: int) -> str:
    x = net.conv(f"layer{number}.conv", x, filters, kernel=kernel, bias=False)
    return net.leaky_relu(f"layer{number}.leaky", net.batch_norm(f"layer{number}.bn", x), alpha=0.1)


def _detector(net: Builder, maps: Sequence[str], width: float) -> str:
    """Layers 25 to 29: an earlier map, with 2x2 pixels made channels, beside the last one."""
    passed = _convolution(net, 26, maps[PASSED], scaled(64, width), 1)
    both = net.concat("layer28", net.space_to_depth("layer27", passed), maps[-1])
    return _convolution(net, 29, both, scaled(1024, width), 3)


if __name__ == "__main__":
    options = parser("YOLOv2 or its first layers as ONNX", size=416, classes=None)
    options.add_argument(
        "--layers", type=int, default=16, help=f"how many layers, pools counted: 1 to {len(LAYERS)}, or {WHOLE}: all"
    )
    options.add_argument("--classes", type=int, help="without it: none, or COCO's 80 of the whole or small network")
    options.add_argument("--tiny", action="store_true", help="the small network instead")
    options.add_argument("--anchors", type=int, default=ANCHORS, help="of the whole network, or of the small one")
    write(options, build)
