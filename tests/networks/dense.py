"""Small versions of networks that give a map: segmentation, restoration, generation."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.networks.blocks import Apply, conv, residual, up


def unet() -> nn.Module:
    """With transposed convolutions, and maps cut to fit."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        b = self.d(torch.cat([self.up1(c)[:, :, 1:-1, :], b[:, :, 1:-1, :]], 1))
        y = F.pad(self.up2(b), [0, 0, 2, 2])
        return self.e(torch.cat([y, a], 1))

    return Apply(
        forward, a=conv(3, 6), b=conv(6, 8), c=conv(8, 10), d=conv(16, 8), up1=nn.ConvTranspose2d(10, 8, 2, 2),
        up2=nn.ConvTranspose2d(8, 6, 2, 2), e=nn.Conv2d(12, 4, 1),
    )  # fmt: skip


def segnet() -> nn.Module:
    """Goes back to where the maxima were. PyTorch's older exporter refuses it."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a, at = F.max_pool2d(self.a(x), 2, return_indices=True)
        b, below = F.max_pool2d(self.b(a), 2, return_indices=True)
        b = F.max_unpool2d(self.c(b), below, 2, output_size=a.shape[2:])
        return self.e(F.max_unpool2d(self.d(b), at, 2))

    return Apply(
        forward, a=conv(3, 6), b=conv(6, 8), c=conv(8, 8), d=conv(8, 6), e=nn.Conv2d(6, 4, 3, padding=1)
    )  # fmt: skip


def unet_bilinear() -> nn.Module:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        y = F.interpolate(self.b(F.max_pool2d(a, 2)), scale_factor=2, mode="bilinear", align_corners=True)
        return self.c(torch.cat([a, y], 1))

    return Apply(forward, a=conv(3, 6), b=conv(6, 6), c=nn.Conv2d(12, 4, 3, padding=1))


def fcn() -> nn.Module:
    body = nn.Sequential(conv(3, 8, 3, 2), nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(8, 4, 1))
    return Apply(
        lambda self, x: F.interpolate(self.body(x), size=x.shape[-2:], mode="bilinear", align_corners=False), body=body
    )


def deeplab() -> nn.Module:
    """Atrous pyramid with a branch that is pooled to one pixel and blown up again."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        pooled = F.interpolate(self.pool(y), size=y.shape[-2:], mode="bilinear", align_corners=False)
        y = self.join(torch.cat([self.a(y), self.b(y), pooled], 1))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)

    return Apply(
        forward, stem=conv(3, 8, 3, 2), a=conv(8, 5, 1), b=nn.Conv2d(8, 5, 3, padding=3, dilation=3),
        pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 5, 1), nn.ReLU()), join=nn.Conv2d(15, 4, 1),
    )  # fmt: skip


def pspnet() -> nn.Module:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        sizes = [F.interpolate(p(F.avg_pool2d(y, k)), y.shape[2:], mode="bilinear", align_corners=True)
                 for p, k in ((self.a, 6), (self.b, 4))]  # fmt: skip
        return self.out(torch.cat([y, *sizes], 1))

    return Apply(forward, stem=conv(3, 8, 3, 2), a=conv(8, 4, 1), b=conv(8, 4, 1), out=nn.Conv2d(16, 4, 1))


def adaptive_pyramid() -> nn.Module:
    """Pools to sizes that do not divide the map's, which only PyTorch's newer exporter exports."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        pooled = [F.interpolate(part(F.adaptive_avg_pool2d(y, size)), y.shape[2:], mode="bilinear")
                  for part, size in ((self.a, 5), (self.b, 7))]  # fmt: skip
        return self.out(torch.cat([y, *pooled], 1))

    return Apply(forward, stem=conv(3, 8, 3, 2), a=conv(8, 3, 1), b=conv(8, 3, 1), out=nn.Conv2d(14, 4, 1))


def lraspp() -> nn.Module:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        low = self.low(x)
        high = self.high(low)
        y = self.a(high) * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(high, 1)))
        y = F.interpolate(y, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return F.interpolate(self.one(low) + self.two(y), size=x.shape[-2:], mode="bilinear", align_corners=False)

    return Apply(
        forward, low=conv(3, 6, 3, 2), high=conv(6, 8, 3, 2), a=conv(8, 6, 1), gate=nn.Conv2d(8, 6, 1),
        one=nn.Conv2d(6, 4, 1), two=nn.Conv2d(6, 4, 1),
    )  # fmt: skip


def hrnet() -> nn.Module:
    """Two resolutions that exchange."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        high = self.stem(x)
        low = self.down(high)
        high, low = (
            F.relu(high + F.interpolate(self.up(low), scale_factor=2, mode="nearest")),
            F.relu(low + self.again(high)),
        )
        return self.out(torch.cat([high, F.interpolate(low, size=high.shape[-2:], mode="bilinear")], 1))

    return Apply(
        forward, stem=conv(3, 6, 3, 2), down=conv(6, 8, 3, 2), up=nn.Conv2d(8, 6, 1), again=conv(6, 8, 3, 2),
        out=nn.Conv2d(14, 4, 1),
    )  # fmt: skip


def srcnn() -> nn.Module:
    return nn.Sequential(
        nn.Upsample(scale_factor=1.5, mode="bicubic", align_corners=False),
        nn.Conv2d(3, 8, 9, padding=4), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 5, padding=2),
    )  # fmt: skip


def fsrcnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 10, 5, padding=2), nn.PReLU(10), nn.Conv2d(10, 4, 1), nn.PReLU(), nn.Conv2d(4, 4, 3, padding=1),
        nn.PReLU(4), nn.ConvTranspose2d(4, 3, 9, 2, 4, output_padding=1),
    )  # fmt: skip


def espcn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.Tanh(), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2))


def edsr() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    scaled = Apply(lambda self, x: x + self.body(x) * 0.1, body=body)
    tail = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(8, 3, 3, padding=1))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), residual(scaled), tail)


def ffdnet() -> nn.Module:
    """Works on images folded into channels."""
    return nn.Sequential(nn.PixelUnshuffle(2), conv(12, 10, norm=False), conv(10, 12), nn.PixelShuffle(2))


def dncnn() -> nn.Module:
    noise = nn.Sequential(conv(3, 8, norm=False), conv(8, 8), nn.Conv2d(8, 3, 3, padding=1))
    return Apply(lambda self, x: x - self.noise(x), noise=noise)


def autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.LeakyReLU(0.1), nn.Conv2d(6, 8, 3, 2, 1), nn.LeakyReLU(0.1), nn.Flatten(),
        nn.Linear(288, 10), nn.ReLU(), nn.Linear(10, 288), nn.Unflatten(1, (8, 6, 6)),
        nn.ConvTranspose2d(8, 6, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose2d(6, 3, 4, 2, 1), nn.Sigmoid(),
    )  # fmt: skip


def style_transfer() -> nn.Module:
    def padded(c: int, k: int, window: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(
            nn.ReflectionPad2d(window // 2),
            nn.Conv2d(c, k, window, stride),
            nn.InstanceNorm2d(k, affine=True),
            nn.ReLU(),
        )

    return nn.Sequential(
        padded(3, 6, 9), padded(6, 8, 3, 2), residual(padded(8, 8, 3)), nn.Upsample(scale_factor=2, mode="nearest"),
        padded(8, 6, 3), nn.ReplicationPad2d(2), nn.Conv2d(6, 3, 5),
    )  # fmt: skip


def pix2pix() -> nn.Module:
    """InstanceNorm without weights, skips, tanh."""
    inner = nn.Sequential(
        nn.LeakyReLU(0.2), nn.Conv2d(6, 8, 4, 2, 1), nn.InstanceNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.InstanceNorm2d(6),
    )  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 2, 1), Apply(lambda self, x: torch.cat([x, self.inner(x)], 1), inner=inner), nn.ReLU(),
        nn.ConvTranspose2d(12, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


def attention_gate() -> nn.Module:
    """Non-local attention over the pixels."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        n, c, h, w = y.shape
        q, k, v = (part(y).flatten(2) for part in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k, -1)
        return self.out(y + self.gamma * (v @ weights.transpose(1, 2)).view(n, c, h, w))

    return Apply(
        forward, stem=conv(3, 8, 3, 4), q=nn.Conv2d(8, 4, 1), k=nn.Conv2d(8, 4, 1), v=nn.Conv2d(8, 8, 1),
        gamma=nn.Parameter(torch.full((1,), 0.5)), out=up(8, 3),
    )  # fmt: skip
