"""Small versions of networks that classify images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from tests.networks.blocks import Apply, conv, head, residual, shuffle, squeeze_excite


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 3), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(128, 12), nn.Tanh(), nn.Linear(12, 5),
    )  # fmt: skip


def alexnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3),
        nn.Flatten(), nn.Dropout(0.0), nn.Linear(108, 10), nn.ReLU(), nn.Linear(10, 5),
    )  # fmt: skip


def vgg() -> nn.Module:
    return nn.Sequential(
        conv(3, 6), conv(6, 6), nn.MaxPool2d(2), conv(6, 10), conv(10, 10), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(360, 12), nn.ReLU(), nn.Linear(12, 5),
    )  # fmt: skip


def _bottleneck(c: int, k: int, stride: int = 1, groups: int = 1, extra: nn.Module | None = None) -> nn.Module:
    width = max(8, k // 2)
    body = nn.Sequential(
        conv(c, width, 1),
        conv(width, width, 3, stride, groups=groups),
        nn.Conv2d(width, k, 1, bias=False),
        nn.BatchNorm2d(k),
        extra or nn.Identity(),
    )
    short = None if c == k and stride == 1 else nn.Sequential(nn.Conv2d(c, k, 1, stride), nn.BatchNorm2d(k))
    return residual(body, short, nn.ReLU())


def resnet() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1), _bottleneck(8, 12), _bottleneck(12, 12), _bottleneck(12, 16, 2),
        head(16),
    )  # fmt: skip


def resnet_with_padded_shortcut() -> nn.Module:
    """Shortcuts of type A: every second pixel, zeros for new channels."""
    short = Apply(lambda self, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 5)))
    body = nn.Sequential(conv(8, 16, 3, 2), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
    return nn.Sequential(conv(3, 8), residual(body, short, nn.ReLU()), head(16))


def resnext() -> nn.Module:
    return nn.Sequential(conv(3, 16, 3, 2), _bottleneck(16, 32, 1, 4), _bottleneck(32, 32, 2, 4), head(32))


def se_resnet() -> nn.Module:
    return nn.Sequential(conv(3, 12, 3, 2), _bottleneck(12, 12, extra=squeeze_excite(12, 4)), head(12))


def preact_resnet() -> nn.Module:
    body = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ELU(),
                         nn.Conv2d(8, 8, 3, padding=1))  # fmt: skip
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), residual(body), nn.BatchNorm2d(8), nn.ReLU(), head(8))


def densenet() -> nn.Module:
    layers: list[nn.Module] = [conv(3, 6)]
    for c in (6, 10, 14):
        new = nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 4, 3, padding=1, bias=False))
        layers.append(Apply(lambda self, x: torch.cat([x, self.new(x)], 1), new=new))
    return nn.Sequential(*layers, conv(18, 9, 1), nn.AvgPool2d(2), nn.BatchNorm2d(9), nn.ReLU(), head(9))


def squeezenet() -> nn.Module:
    def fire(c: int, squeeze: int, expand: int) -> nn.Module:
        return Apply(
            lambda self, x: torch.cat([F.relu(e(F.relu(self.s(x)))) for e in (self.one, self.three)], 1),
            s=nn.Conv2d(c, squeeze, 1),
            one=nn.Conv2d(squeeze, expand, 1),
            three=nn.Conv2d(squeeze, expand, 3, padding=1),
        )

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), fire(8, 4, 6), fire(12, 4, 6),
        nn.Dropout(0.0), nn.Conv2d(12, 5, 1), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(),
    )  # fmt: skip


def shufflenet() -> nn.Module:
    """Version 2, with its two kinds of units."""

    def keep(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=1)
        return shuffle(torch.cat([a, self.right(b)], 1), 2)

    def shrink(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return shuffle(torch.cat([self.left(x), self.right(x)], 1), 2)

    def branch(c: int, k: int, stride: int) -> nn.Module:
        deep = nn.Sequential(nn.Conv2d(k, k, 3, stride, 1, groups=k, bias=False), nn.BatchNorm2d(k))
        return nn.Sequential(conv(c, k, 1), deep, conv(k, k, 1))

    left = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8), conv(8, 8, 1))
    return nn.Sequential(
        conv(3, 8, 3, 2), Apply(shrink, left=left, right=branch(8, 8, 2)), Apply(keep, right=branch(8, 8, 1)), head(16)
    )  # fmt: skip


def _inverted(c: int, k: int, expand: int, act: Callable[[], nn.Module], se: bool = False) -> nn.Module:
    body = nn.Sequential(
        conv(c, expand, 1, act=act()),
        conv(expand, expand, 3, groups=expand, act=act()),
        squeeze_excite(expand, 4, nn.Hardsigmoid()) if se else nn.Identity(),
        nn.Conv2d(expand, k, 1, bias=False),
        nn.BatchNorm2d(k),
    )
    return residual(body) if c == k else body


def mobilenet_v1() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, 3, 2), conv(8, 8, groups=8), conv(8, 16, 1), conv(16, 16, 3, 2, groups=16), head(16)
    )


def mobilenet_v2() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, 3, 2, nn.ReLU6()), _inverted(8, 8, 16, nn.ReLU6), _inverted(8, 12, 16, nn.ReLU6), head(12)
    )  # fmt: skip


def mobilenet_v3() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, 3, 2, nn.Hardswish()), _inverted(8, 8, 16, nn.ReLU, True), _inverted(8, 12, 16, nn.Hardswish, True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(12, 16), nn.Hardswish(), nn.Linear(16, 5),
    )  # fmt: skip


def mnasnet() -> nn.Module:
    return nn.Sequential(conv(3, 8, 3, 2), _inverted(8, 8, 24, nn.ReLU), head(8))


def efficientnet() -> nn.Module:
    def gated(c: int) -> nn.Module:
        return Apply(
            lambda self, x: x * torch.sigmoid(self.two(F.silu(self.one(F.adaptive_avg_pool2d(x, 1))))),
            one=nn.Conv2d(c, 4, 1),
            two=nn.Conv2d(4, c, 1),
        )

    body = nn.Sequential(
        conv(8, 16, 1, act=nn.SiLU()), conv(16, 16, 5, groups=16, act=nn.SiLU()), gated(16),
        nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8),
    )  # fmt: skip
    return nn.Sequential(conv(3, 8, 3, 2, nn.SiLU()), residual(body), conv(8, 20, 1, act=nn.SiLU()), head(20))


def googlenet() -> nn.Module:
    def inception(c: int) -> nn.Module:
        return Apply(
            lambda self, x: torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1),
            a=conv(c, 4, 1),
            b=nn.Sequential(conv(c, 3, 1), conv(3, 5)),
            c=nn.Sequential(conv(c, 2, 1), conv(2, 3, 5)),
            d=nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), conv(c, 3, 1)),
        )

    return nn.Sequential(
        conv(3, 8, 7, 2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.LocalResponseNorm(3), inception(8), inception(15),
        head(15),
    )  # fmt: skip


def inception_v3() -> nn.Module:
    """The normalization of its input by channel, factorized windows, average pools in branches."""

    def start(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        parts = [
            x[:, i : i + 1] * scale + shift for i, (scale, shift) in enumerate(((0.5, 0.1), (0.4, -0.1), (0.6, 0)))
        ]
        one = torch.unsqueeze(x[:, 0], 1) * 0.25
        return self.stem(torch.cat([*parts, one], 1))

    def mixed(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(F.avg_pool2d(x, 3, 1, 1)), F.max_pool2d(x, 3, 1, 1)], 1)

    seven = nn.Sequential(nn.Conv2d(8, 5, (1, 7), padding=(0, 3)), nn.Conv2d(5, 6, (7, 1), padding=(3, 0)), nn.ReLU())
    return nn.Sequential(
        Apply(start, stem=conv(4, 8, 3, 2)), Apply(mixed, a=conv(8, 4, 1), b=seven, c=conv(8, 4, 1)), head(22)
    )  # fmt: skip


def regnet() -> nn.Module:
    return nn.Sequential(
        conv(3, 8, 3, 2), _bottleneck(8, 16, 2, 2, squeeze_excite(16, 4)), _bottleneck(16, 16, 1, 2), head(16)
    )


def convnext() -> nn.Module:
    """torchvision's: permutations around LayerNorm and fully connected layers, a learned scale per channel."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((8, 1, 1), 0.3))
            self.deep = nn.Conv2d(8, 8, 7, padding=3, groups=8)
            self.norm, self.one, self.two = nn.LayerNorm(8, 1e-6), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.deep(x).permute(0, 2, 3, 1))
            return x + self.scale * self.two(F.gelu(self.one(y))).permute(0, 3, 1, 2)

    def norm(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    patches = nn.Conv2d(3, 8, 4, 4)
    return nn.Sequential(patches, Apply(norm, layer=nn.LayerNorm(8)), Scaled(), head(8))


def ghostnet() -> nn.Module:
    def ghost(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = self.primary(x)
        return torch.cat([y, self.cheap(y)], 1)[:, :13, :, :]

    return nn.Sequential(conv(3, 8, 3, 2), Apply(ghost, primary=conv(8, 7, 1), cheap=conv(7, 7, groups=7)), head(13))


def resnest() -> nn.Module:
    """Attention over two splits of the channels."""

    def attend(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        n, c, h, w = y.shape
        parts = y.view(n, 2, c // 2, h, w)
        gap = parts.sum(1).mean((2, 3), keepdim=True)
        gates = F.softmax(self.two(F.relu(self.one(gap))).view(n, 2, c // 2, 1, 1), 1)
        return (parts * gates).sum(1)

    parts = Apply(attend, conv=conv(8, 16, groups=2), one=nn.Conv2d(8, 4, 1), two=nn.Conv2d(4, 16, 1))
    return nn.Sequential(conv(3, 8, 3, 2), parts, head(8))


def eca_net() -> nn.Module:
    """A gate per channel from a convolution along the channels."""

    def gate(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x.mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()
        return x * y[:, :, None, None]

    return nn.Sequential(conv(3, 12, 3, 2), Apply(gate, conv=nn.Conv1d(1, 1, 3, padding=1, bias=False)), head(12))


def cbam() -> nn.Module:
    """Gates per channel and per pixel from averages and maxima."""

    def attend(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.sigmoid(self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1)))
        both = torch.cat([x.mean(1, keepdim=True), torch.amax(x, 1, keepdim=True)], 1)
        return x * torch.sigmoid(self.seven(both))

    mlp = nn.Sequential(nn.Conv2d(10, 4, 1), nn.ReLU(), nn.Conv2d(4, 10, 1))
    return nn.Sequential(conv(3, 10, 3, 2), Apply(attend, mlp=mlp, seven=nn.Conv2d(2, 1, 7, padding=3)), head(10))


def res2net() -> nn.Module:
    def hierarchy(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        parts = torch.split(x, 4, 1)
        one = self.a(parts[1])
        two = self.b(parts[2] + one)
        return x + torch.cat([parts[0], one, two], 1)

    return nn.Sequential(conv(3, 12, 3, 2), Apply(hierarchy, a=conv(4, 4), b=conv(4, 4)), head(12))


def group_normalized() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1), nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.GroupNorm(1, 12),
        nn.SELU(), head(12),
    )  # fmt: skip


class _Standardized(nn.Conv2d):
    """Weights of mean 0 and variance 1 per output channel, times a gain."""

    def __init__(self, c: int, k: int, window: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(c, k, window, stride, window // 2, groups=groups)
        self.gain = nn.Parameter(torch.rand(k, 1, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * 0.7).view(-1)
        w = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, w.reshape_as(self.weight), self.bias, self.stride, self.padding, 1, self.groups)


def weight_standardized() -> nn.Module:
    return nn.Sequential(
        _Standardized(3, 12, 3, 2), nn.GroupNorm(3, 12), nn.ReLU(), _Standardized(12, 16, 3), nn.GroupNorm(4, 16),
        nn.ReLU(), _Standardized(16, 16, 3, groups=4), nn.ReLU(), head(16),
    )  # fmt: skip


def vision_transformer() -> nn.Module:
    """Patches as tokens, a position each, attention with two heads, a mean of the tokens."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.place = nn.Conv2d(3, 12, 4, 4), nn.Parameter(torch.randn(1, 36, 12) * 0.1)
            self.one, self.two = nn.LayerNorm(12), nn.LayerNorm(12)
            self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
            self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
            self.head = nn.Linear(12, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2) + self.place
            n, t, c = x.shape
            q, k, v = self.qkv(self.one(x)).reshape(n, t, 3, 2, 6).permute(2, 0, 3, 1, 4)
            weights = ((q * 6**-0.5) @ k.transpose(-2, -1)).softmax(-1)
            x = x + self.out((weights @ v).transpose(1, 2).reshape(n, t, c))
            return self.head((x + self.mlp(self.two(x))).mean(1))

    return Block()
