"""A network of no use but to be timed: convolutions of all kinds on maps of all sizes, and what stands between them.
Most of the sizes are no multiples of the kernels' tiles, as those of networks and of parts of them.

python -m models.probe -o probe.onnx
"""

import onnx

from models.builder import Builder, parser, scaled, write

# behind each other: kernel and output channels (0: as many as there are, in groups of one), on maps half as large each
STAGES = (
    ((3, 16), (3, 32)),
    ((3, 32), (1, 16), (3, 32), (3, 0)),
    ((3, 64), (1, 32), (3, 64), (5, 32), (3, 0)),
    ((3, 128), (1, 64), (3, 128)),
    ((3, 256), (1, 128), (3, 256)),
    ((3, 512), (1, 256), (3, 512)),
)
TILE = ((3, 16), (3, 32), (1, 32), (3, 32), (3, 0), (5, 32))
"""The same on a small map, as on a tile: the costs that do not grow with it."""


def build(
    *,
    size: int = 208,
    channels: int = 3,
    classes: int = 100,
    width: float = 1.0,
    batch: int | None = None,
    seed: int = 0,
) -> onnx.ModelProto:
    """Images [batch, channels, size, size] -> logits [batch, classes]."""
    net = Builder("probe", channels=channels, size=size, batch=batch, seed=seed)
    x = "x"
    for number, stage in enumerate(STAGES):
        for layer, (kernel, filters) in enumerate(stage):
            x = _unit(net, f"stage.{number}.{layer}", x, scaled(filters, width) if filters else 0, kernel)
        if number < len(STAGES) - 1:
            x = net.max_pool(f"stage.{number}.pool", x)
    tile = net.average_pool("tile.pool", "x", kernel=16, stride=16)
    for layer, (kernel, filters) in enumerate(TILE):
        tile = _unit(net, f"tile.{layer}", tile, scaled(filters, width) if filters else 0, kernel)
    tile = _unit(net, "tile.narrow", tile, net.shapes[tile][0], 3, stride=2, pad=0)
    x = net.concat("join", x, tile)
    y = _unit(net, "residual", x, net.shapes[x][0], 1)
    x = net.flatten("flatten", net.global_average_pool("average", net.add("add", x, y)))
    return net.model(net.linear("classifier", x, classes))


def _unit(
    net: Builder, name: str, x: str, filters: int, kernel: int, *, stride: int = 1, pad: int | None = None
) -> str:
    """Convolution, BatchNorm, leaky ReLU; without filters, one for each channel."""
    groups = 1 if filters else net.shapes[x][0]
    filters = filters or groups
    x = net.conv(f"{name}.conv", x, filters, kernel=kernel, stride=stride, pad=pad, bias=False, groups=groups)
    return net.leaky_relu(f"{name}.act", net.batch_norm(f"{name}.bn", x), alpha=0.1)


if __name__ == "__main__":
    write(parser("A network to be timed, as ONNX", size=208, classes=100), build)
