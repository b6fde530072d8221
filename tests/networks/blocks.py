"""Parts that several networks have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Apply(nn.Module):
    """A module with parts, and a forward pass that is a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def conv(
    c: int, k: int, window: int = 3, stride: int = 1, act: nn.Module | None = None, groups: int = 1, norm: bool = True
) -> nn.Sequential:
    """Convolution, BatchNorm, activation."""
    parts: list[nn.Module] = [nn.Conv2d(c, k, window, stride, window // 2, groups=groups, bias=not norm)]
    parts += [nn.BatchNorm2d(k)] if norm else []
    return nn.Sequential(*parts, act or nn.ReLU())


def head(c: int, classes: int = 5) -> nn.Sequential:
    """Global pooling and a fully connected layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))


def residual(body: nn.Module, shortcut: nn.Module | None = None, act: nn.Module | None = None) -> Apply:
    """act(body(x) + shortcut(x))."""
    return Apply(
        lambda self, x: self.act(self.body(x) + self.shortcut(x)),
        body=body,
        shortcut=shortcut or nn.Identity(),
        act=act or nn.Identity(),
    )


def squeeze_excite(c: int, inner: int, gate: nn.Module | None = None) -> Apply:
    """A gate per channel."""
    return Apply(
        lambda self, x: x * self.gate(self.two(F.relu(self.one(x.mean((2, 3), keepdim=True))))),
        one=nn.Conv2d(c, inner, 1),
        two=nn.Conv2d(inner, c, 1),
        gate=gate or nn.Sigmoid(),
    )


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """ShuffleNet's channel shuffle."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def up(c: int, k: int) -> nn.Sequential:
    """Twice as large, bilinearly, then a convolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), conv(c, k))
