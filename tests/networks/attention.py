"""Small versions of networks that look at patches of an image as tokens."""

from __future__ import annotations

import torch
from torch import nn

from tests.networks.blocks import Apply, conv


def class_token() -> nn.Module:
    """A token that the image has no part in, in front of the patches; the classes are read from it."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.token = nn.Conv2d(3, 8, 6, 6), nn.Parameter(torch.randn(1, 1, 8))
            self.place = nn.Parameter(torch.randn(1, 17, 8) * 0.1)
            self.block = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, norm_first=True)
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
            return self.head(self.norm(self.block(x))[:, 0])

    return Tokens()


def swin() -> nn.Module:
    """Attention in windows that are shifted, with a table of biases by relative position, and what has come around
    masked; four patches become one."""

    class Window(nn.Module):
        def __init__(self, c: int, shift: int) -> None:
            super().__init__()
            self.shift, self.norm = shift, nn.LayerNorm(c)
            self.qkv, self.out = nn.Linear(c, 3 * c), nn.Linear(c, c)
            self.table = nn.Parameter(torch.randn(25, 2) * 0.5)
            y, x = torch.arange(9) // 3, torch.arange(9) % 3
            index = (y[:, None] - y[None] + 2) * 5 + x[:, None] - x[None] + 2
            self.register_buffer("index", index.reshape(-1), persistent=False)
            apart = torch.arange(4)[:, None, None] % 2 * ((y[:, None] - y[None]).abs() > 1)
            self.register_buffer("mask", apart * -100.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, h, w, c = x.shape
            y = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2))
            y = y.view(n, h // 3, 3, w // 3, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, c)
            q, k, v = self.qkv(y).reshape(-1, 9, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
            bias = self.table[self.index].view(9, 9, 2).permute(2, 0, 1).unsqueeze(0)
            scores = (q * 0.7) @ k.transpose(-2, -1) + bias
            if self.shift:
                scores = (scores.view(n, 4, 2, 9, 9) + self.mask[None, :, None]).view(-1, 2, 9, 9)
            y = scores.softmax(-1) @ v
            y = self.out(y.transpose(1, 2).reshape(-1, 9, c))
            y = y.view(n, h // 3, w // 3, 3, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
            return x + torch.roll(y, (self.shift, self.shift), (1, 2))

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.one(self.patches(x).permute(0, 2, 3, 1)))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.merge(x).mean((1, 2)))

    return Apply(
        forward, patches=nn.Conv2d(3, 8, 4, 4), one=Window(8, 0), two=Window(8, 1),
        merge=nn.Linear(32, 12, bias=False), head=nn.Linear(12, 5),
    )  # fmt: skip


def position_encoded() -> nn.Module:
    """A constant map through a layer, and a gate of the channels by their products with each other."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        h, w = x.shape[2:]
        rows, columns = (torch.arange(size, dtype=x.dtype) / size for size in (h, w))
        x = x + self.place(torch.stack([rows[:, None].expand(h, w), columns[None].expand(h, w)])[None])
        q, k, v = (part.flatten(2) for part in self.qkv(x).chunk(3, 1))
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        return self.head(((q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v).mean(-1))

    return Apply(
        forward, stem=conv(3, 8, 3, 4), place=nn.Conv2d(2, 8, 1), qkv=nn.Conv2d(8, 24, 1), head=nn.Linear(8, 5),
        scale=nn.Parameter(torch.ones(1, 1, 1)),
    )  # fmt: skip
