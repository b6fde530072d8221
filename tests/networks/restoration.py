"""Small versions of networks that restore, enlarge or generate images, and of encoders of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.networks.blocks import Apply, conv, residual, squeeze_excite


def _plain(c: int, k: int, window: int = 3) -> nn.Conv2d:
    return nn.Conv2d(c, k, window, padding=window // 2)


def rcan() -> nn.Module:
    """Groups of residual blocks with a gate per channel, a long skip, two steps of pixel shuffle."""
    block = residual(nn.Sequential(_plain(8, 8), nn.ReLU(), _plain(8, 8), squeeze_excite(8, 2)))
    group = residual(nn.Sequential(block, _plain(8, 8)))
    tail = nn.Sequential(*(m for _ in range(2) for m in (_plain(8, 32), nn.PixelShuffle(2))), _plain(8, 3))
    return Apply(
        lambda self, x: self.tail(self.body(self.head(x - 0.4))) + 0.4,
        head=_plain(3, 8), body=residual(group), tail=tail,
    )  # fmt: skip


def rdn() -> nn.Module:
    """Dense blocks whose layers see all before them, fused locally and globally."""

    def dense(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a = torch.cat([x, F.relu(self.a(x))], 1)
        return x + self.fuse(torch.cat([a, F.relu(self.b(a))], 1))

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        start = self.start(x)
        one = self.one(start)
        return self.up(start + self.fuse(torch.cat([one, self.two(one)], 1)))

    blocks = [Apply(dense, a=_plain(6, 4), b=_plain(10, 4), fuse=nn.Conv2d(14, 6, 1)) for _ in range(2)]
    up = nn.Sequential(nn.Conv2d(6, 27, 3, padding=1), nn.PixelShuffle(3))
    return Apply(forward, start=_plain(3, 6), one=blocks[0], two=blocks[1], fuse=nn.Conv2d(12, 6, 1), up=up)


def srgan_generator() -> nn.Module:
    block = residual(nn.Sequential(_plain(8, 8), nn.BatchNorm2d(8), nn.PReLU(), _plain(8, 8), nn.BatchNorm2d(8)))
    body = residual(nn.Sequential(block, _plain(8, 8), nn.BatchNorm2d(8)))
    up = (_plain(8, 32), nn.PixelShuffle(2), nn.PReLU(8))
    return nn.Sequential(_plain(3, 8, 9), nn.PReLU(), body, *up, _plain(8, 3, 9), nn.Tanh())


def patch_discriminator() -> nn.Module:
    """A score for every patch, from windows of even size."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 12, 4, 2, 1, bias=False), nn.InstanceNorm2d(12),
        nn.LeakyReLU(0.2), nn.Conv2d(12, 14, 4, 1, 1), nn.BatchNorm2d(14), nn.LeakyReLU(0.2), nn.Conv2d(14, 1, 4, 1, 1),
    )  # fmt: skip


def nafnet() -> nn.Module:
    """Normalization of the channels of each pixel, products of halves instead of activations."""

    class Norm(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            centred = x - x.mean(1, keepdim=True)
            y = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
            return self.weight.view(1, -1, 1, 1) * y + self.bias.view(1, -1, 1, 1)

    def gate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=1)
        return a * b

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = gate(self.deep(self.one(self.norm1(x))))
        x = x + self.two(y * self.attention(F.adaptive_avg_pool2d(y, 1))) * self.beta
        return x + self.four(gate(self.three(self.norm2(x)))) * self.gamma

    deep, scale = nn.Conv2d(16, 16, 3, padding=1, groups=16), torch.full((1, 8, 1, 1), 0.4)
    block = Apply(
        forward, norm1=Norm(8), norm2=Norm(8), one=_plain(8, 16, 1), deep=deep, two=_plain(8, 8, 1),
        three=_plain(8, 16, 1), four=_plain(8, 8, 1), attention=_plain(8, 8, 1), beta=nn.Parameter(scale),
        gamma=nn.Parameter(scale.clone()),
    )  # fmt: skip
    inner = nn.Sequential(_plain(3, 8), nn.Conv2d(8, 8, 2, 2), block, nn.Conv2d(8, 12, 1), nn.PixelShuffle(2))
    return residual(inner)


def cyclegan() -> nn.Module:
    def part(c: int, k: int, *layers: nn.Module) -> list[nn.Module]:
        return [*layers, nn.InstanceNorm2d(k), nn.ReLU()]

    block = nn.Sequential(
        nn.ReflectionPad2d(1), nn.Conv2d(10, 10, 3), nn.InstanceNorm2d(10), nn.ReLU(), nn.ReflectionPad2d(1),
        nn.Conv2d(10, 10, 3), nn.InstanceNorm2d(10),
    )  # fmt: skip
    return nn.Sequential(
        nn.ReflectionPad2d(3), *part(3, 6, nn.Conv2d(3, 6, 7)), *part(6, 10, nn.Conv2d(6, 10, 3, 2, 1)),
        residual(block), *part(10, 6, nn.ConvTranspose2d(10, 6, 3, 2, 1, 1)), nn.ReflectionPad2d(3),
        nn.Conv2d(6, 3, 7), nn.Tanh(),
    )  # fmt: skip


def variational() -> nn.Module:
    """Mean and deviation, and what the decoder makes of noise that is an input: three outputs."""

    def forward(self: nn.Module, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.encoder(x).flatten(1)
        mean, log = self.mean(y), self.log(y)
        z = mean + torch.exp(0.5 * log) * noise
        return self.decoder(self.start(z).view(-1, 8, 6, 6)), mean, log

    encoder = nn.Sequential(conv(3, 6, 3, 2), conv(6, 8, 3, 2))
    up = (nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 3, 4, 2, 1))
    return Apply(
        forward, encoder=encoder, mean=nn.Linear(288, 4), log=nn.Linear(288, 4), start=nn.Linear(4, 288),
        decoder=nn.Sequential(*up, nn.Sigmoid()),
    )  # fmt: skip


def adaptive_style() -> nn.Module:
    """Statistics of one image given to the features of another."""

    def forward(self: nn.Module, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        a, b = self.encoder(x), self.encoder(style)
        (am, ad), (bm, bd) = ((y.mean((2, 3), keepdim=True), y.std((2, 3), keepdim=True) + 1e-3) for y in (a, b))
        return self.decoder((a - am) / ad * bd + bm)

    decoder = nn.Sequential(nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.Conv2d(8, 3, 3))
    encoder = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 8, 3), nn.ELU(), nn.AvgPool2d(2))
    return Apply(forward, encoder=encoder, decoder=decoder)
