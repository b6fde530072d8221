"""LeNet-5 (LeCun et al., 1998) with ReLU and max pooling.

python -m models.lenet -o lenet.onnx
"""

import onnx

from models.builder import Builder, parser, scaled, write


def build(
    *,
    size: int = 28,
    channels: int = 1,
    classes: int = 10,
    width: float = 1.0,
    batch: int | None = None,
    seed: int = 0,
) -> onnx.ModelProto:
    """Images [batch, channels, size, size] -> logits [batch, classes]."""
    net = Builder("lenet", channels=channels, size=size, batch=batch, seed=seed)
    x = net.relu("relu1", net.conv("conv1", "x", scaled(6, width), kernel=5))
    x = net.max_pool("pool1", x)
    x = net.relu("relu2", net.conv("conv2", x, scaled(16, width), kernel=5, pad=0))
    x = net.max_pool("pool2", x)
    x = net.flatten("flatten", x)
    x = net.relu("relu3", net.linear("fc1", x, scaled(120, width)))
    x = net.relu("relu4", net.linear("fc2", x, scaled(84, width)))
    return net.model(net.linear("fc3", x, classes))


if __name__ == "__main__":
    write(parser("LeNet-5 as ONNX", size=28, channels=1), build)
