"""DnCNN (Zhang, Zuo, Chen, Meng, Zhang, arXiv 1608.03981): takes noise out of images.

python -m models.dncnn --size 64 --layers 17 -o dncnn.onnx
"""

import onnx

from models.builder import Builder, parser, scaled, write

FILTERS = 64
GAIN = 0.1  # of the last layer, so that the network begins with adding little


def build(
    *,
    size: int = 64,
    channels: int = 3,
    layers: int = 17,
    width: float = 1.0,
    batch: int | None = None,
    seed: int = 0,
) -> onnx.ModelProto:
    """Images [batch, channels, size, size] -> images of that shape: the network adds what the noise took away."""
    if layers < 2:
        raise ValueError(f"--layers {layers}: the first and the last make 2")
    net, filters = Builder("dncnn", channels=channels, size=size, batch=batch, seed=seed), scaled(FILTERS, width)
    x = net.relu("relu0", net.conv("conv0", "x", filters))
    for layer in range(1, layers - 1):
        x = net.conv(f"conv{layer}", x, filters, bias=False)
        x = net.relu(f"relu{layer}", net.batch_norm(f"bn{layer}", x))
    x = net.conv(f"conv{layers - 1}", x, channels, gain=GAIN)
    return net.model(net.add("sum", "x", x))


if __name__ == "__main__":
    options = parser(__doc__ or "", size=64, classes=None)
    options.add_argument("--layers", type=int, default=17, help="of which the first and the last have no BatchNorm")
    write(options, build)
