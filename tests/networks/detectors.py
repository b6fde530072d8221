"""Small versions of networks that detect, and of networks with several inputs or outputs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.networks.blocks import Apply, conv, head, residual


def _leaky(c: int, k: int, window: int = 3, stride: int = 1) -> nn.Module:
    return conv(c, k, window, stride, nn.LeakyReLU(0.1))


def _silu(c: int, k: int, window: int = 1, stride: int = 1) -> nn.Module:
    return conv(c, k, window, stride, nn.SiLU())


def yolo_v2() -> nn.Module:
    """The route through the reorganized map."""

    def reorg(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).transpose(3, 4).contiguous()
        x = x.view(n, c, h // 2 * (w // 2), 4).transpose(2, 3).contiguous()
        x = x.view(n, c, 4, h // 2, w // 2).transpose(1, 2).contiguous()
        return x.view(n, c * 4, h // 2, w // 2)

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        return self.out(torch.cat([reorg(self.side(a)), b], 1))

    return Apply(forward, a=_leaky(3, 8, 3, 2), b=_leaky(8, 8), side=_leaky(8, 3, 1), out=nn.Conv2d(20, 14, 1))


def tiny_yolo() -> nn.Module:
    """The pool of stride 1 that keeps the size by padding on two sides."""
    pool = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(2, 1))
    return nn.Sequential(_leaky(3, 6, 3, 2), nn.MaxPool2d(2), _leaky(6, 8), pool, _leaky(8, 8), nn.Conv2d(8, 7, 1))


def yolo_v3() -> nn.Module:
    def forward(self: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        a = self.a(x)
        b = self.b(a)
        c = torch.cat([F.interpolate(self.side(b), scale_factor=2.0, mode="nearest"), a], 1)
        return [self.out1(b), self.out2(c)]

    body = residual(nn.Sequential(_leaky(8, 4, 1), _leaky(4, 8)))
    return Apply(
        forward, a=nn.Sequential(_leaky(3, 8, 3, 2), body), b=_leaky(8, 8, 3, 2), side=_leaky(8, 4, 1),
        out1=nn.Conv2d(8, 7, 1), out2=nn.Conv2d(12, 7, 1),
    )  # fmt: skip


def yolo_v5() -> nn.Module:
    """Focus, C3, SPPF, and a head whose boxes are decoded and joined."""

    def focus(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)

    def sppf(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        a = F.max_pool2d(x, 5, 1, 2)
        b = F.max_pool2d(a, 5, 1, 2)
        return self.two(torch.cat([x, a, b, F.max_pool2d(b, 5, 1, 2)], 1))

    def boxes(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        n, _, h, w = x.shape
        y = x.view(n, 2, 7, h, w).permute(0, 1, 3, 4, 2).contiguous().sigmoid()
        xy, wh, rest = y.split((2, 2, 3), 4)
        return torch.cat([(xy * 2 + 0.5) * 8, (wh * 2) ** 2 * 3, rest], 4).view(n, -1, 7)

    def c3(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([self.deep(self.a(x)), self.b(x)], 1))

    deep = residual(nn.Sequential(_silu(4, 4), _silu(4, 4, 3)))
    return nn.Sequential(
        Apply(lambda self, x: self.conv(focus(x)), conv=_silu(12, 8, 3)), _silu(8, 8, 3, 2),
        Apply(c3, a=_silu(8, 4), b=_silu(8, 4), deep=deep, out=_silu(8, 8)),
        Apply(sppf, one=_silu(8, 4), two=_silu(16, 8)), nn.Conv2d(8, 14, 1), Apply(boxes),
    )  # fmt: skip


def yolo_v8() -> nn.Module:
    """C2f, and distances as expectations over a softmax."""

    def c2f(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a, b = self.one(x).chunk(2, 1)
        return self.two(torch.cat([a, b, self.deep(b)], 1))

    def expected(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        n, _, h, w = x.shape
        box, scores = x.view(n, 16 + 3, h * w).split((16, 3), 1)
        weights = box.view(n, 4, 4, h * w).transpose(2, 1).softmax(1)
        return torch.cat([self.project(weights).view(n, 4, h * w), scores.sigmoid()], 1)

    deep = residual(nn.Sequential(_silu(4, 4, 3), _silu(4, 4, 3)))
    return nn.Sequential(
        _silu(3, 8, 3, 2), Apply(c2f, one=_silu(8, 8), two=_silu(12, 8), deep=deep), _silu(8, 8, 3, 2),
        nn.Conv2d(8, 19, 1), Apply(expected, project=nn.Conv2d(4, 1, 1, bias=False)),
    )  # fmt: skip


def yolo_11_attention() -> nn.Module:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(x).view(n, 2, 12, h * w).split([4, 4, 4], 2)
        weights = ((q.transpose(-2, -1) @ k) * 0.5).softmax(-1)
        y = (v @ weights.transpose(-2, -1)).view(n, c, h, w) + self.place(v.reshape(n, c, h, w))
        return x + self.out(y)

    block = Apply(
        forward, qkv=nn.Conv2d(8, 24, 1), place=nn.Conv2d(8, 8, 3, padding=1, groups=8), out=nn.Conv2d(8, 8, 1)
    )  # fmt: skip
    return nn.Sequential(_silu(3, 8, 3, 4), block, nn.Conv2d(8, 5, 1))


def ssd() -> nn.Module:
    """Heads of two resolutions, permuted, flattened and joined; a learned scale over a unit length."""

    def forward(self: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        a = self.a(x)
        b = self.b(a)
        a = self.scale.view(1, -1, 1, 1) * F.normalize(a, dim=1)
        places, scores = (
            torch.cat([part.permute(0, 2, 3, 1).reshape(x.shape[0], -1, last) for part in parts], 1)
            for parts, last in (((self.l1(a), self.l2(b)), 4), ((self.c1(a), self.c2(b)), 3))
        )
        return [places, scores]

    return Apply(
        forward, a=conv(3, 8, 3, 4), b=conv(8, 8, 3, 2), l1=nn.Conv2d(8, 8, 3, padding=1),
        l2=nn.Conv2d(8, 12, 3, padding=1), c1=nn.Conv2d(8, 6, 3, padding=1), c2=nn.Conv2d(8, 9, 3, padding=1),
        scale=nn.Parameter(torch.full((8,), 2.0)),
    )  # fmt: skip


def feature_pyramid() -> nn.Module:
    """A shared head on every level."""

    def forward(self: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        a = self.a(x)
        b = self.b(a)
        top = self.two(b)
        middle = self.one(a) + F.interpolate(top, size=a.shape[-2:], mode="nearest")
        return [self.head(middle), self.head(top), self.head(F.max_pool2d(top, 1, 2))]

    return Apply(
        forward, a=conv(3, 6, 3, 2), b=conv(6, 8, 3, 2), one=nn.Conv2d(6, 5, 1), two=nn.Conv2d(8, 5, 1),
        head=nn.Conv2d(5, 4, 3, padding=1),
    )  # fmt: skip


def siamese() -> nn.Module:
    """Two images through the same trunk; their distance, weighted."""

    def forward(self: nn.Module, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.out(torch.abs(self.trunk(a) - self.trunk(b)))

    return Apply(forward, trunk=nn.Sequential(conv(3, 6, 3, 2), head(6, 8)), out=nn.Linear(8, 1))


def two_inputs() -> nn.Module:
    """An image and numbers, joined; two outputs."""

    def forward(self: nn.Module, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.cat([self.trunk(a), F.relu(self.numbers(b))], 1)
        return self.one(y), self.two(y)

    return Apply(
        forward, trunk=nn.Sequential(conv(3, 6, 3, 2), head(6, 8)), numbers=nn.Linear(4, 5), one=nn.Linear(13, 3),
        two=nn.Linear(13, 2),
    )  # fmt: skip
