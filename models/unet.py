"""U-Net (Ronneberger, Fischer, Brox, arXiv 1505.04597) as it is used today: padded, with BatchNorm.

python -m models.unet --size 256 --classes 2 -o unet.onnx
"""

import onnx

from models.builder import Builder, parser, scaled, write

WIDTHS = (64, 128, 256, 512, 1024)
WAYS_UP = ("transpose", "resize")


def build(
    *,
    size: int = 256,
    channels: int = 3,
    classes: int = 2,
    width: float = 1.0,
    up: str = "transpose",
    batch: int | None = None,
    seed: int = 0,
) -> onnx.ModelProto:
    """Images [batch, channels, size, size] -> logits [batch, classes, size, size]."""
    halvings = len(WIDTHS) - 1
    if size % 2**halvings:
        raise ValueError(f"--size {size} can't be halved {halvings} times: give a multiple of {2**halvings}")
    net = Builder("unet", channels=channels, size=size, batch=batch, seed=seed)
    x, skips = "x", []
    for level, filters in enumerate(WIDTHS):
        x = _double(net, f"down{level}", net.max_pool(f"down{level}.pool", x) if level else x, scaled(filters, width))
        skips.append(x)
    for level in reversed(range(halvings)):
        filters = scaled(WIDTHS[level], width)
        x = _up(net, f"up{level}.up", x, filters, up)
        x = _double(net, f"up{level}", net.concat(f"up{level}.concat", skips[level], x), filters)
    return net.model(net.conv("head", x, classes, kernel=1))


def _double(net: Builder, name: str, x: str, filters: int) -> str:
    """Twice convolution, BatchNorm, ReLU."""
    for i in (0, 3):
        x = net.conv(f"{name}.{i}", x, filters, bias=False)
        x = net.relu(f"{name}.{i + 2}", net.batch_norm(f"{name}.{i + 1}", x))
    return x


def _up(net: Builder, name: str, x: str, filters: int, way: str) -> str:
    """Twice the height and width: a transposed convolution, or a Resize and a convolution."""
    if way == "transpose":
        return net.conv_transpose(name, x, filters)
    return net.conv(f"{name}.conv", net.upsample(name, x), filters, kernel=1)


if __name__ == "__main__":
    options = parser("U-Net as ONNX", size=256, classes=2)
    options.add_argument("--up", choices=WAYS_UP, default="transpose", help="transposed convolution, or Resize")
    write(options, build)
