"""Convolutions to count: a layer, a phase and an algorithm become work for an emulated CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np

from benchmarks.emulated.work import Lower, Work, work
from fusetile.codegen import conv, conv_choice, winograd
from fusetile.codegen.job import Numerics
from fusetile.codegen.lower import lower
from fusetile.codegen.targets import Target
from fusetile.ops import row

PHASES = ("forward", "input gradient", "weight gradient")
FAMILIES = dict(zip(PHASES, ("conv", "conv_input_grad", "conv_weight_grad"), strict=True))
DIRECT = conv_choice.DIRECT


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution: channels in and out, rows of the map, size of the window, stride, groups; columns of the map, if
    it has not as many as rows; images."""

    c: int
    k: int
    size: int
    window: int
    stride: int = 1
    groups: int = 1
    columns: int = 0
    images: int = 1

    @property
    def pad(self) -> int:
        return self.window // 2

    @property
    def out(self) -> tuple[int, int]:
        """Rows and columns of the result."""
        rows, columns = ((n + 2 * self.pad - self.window) // self.stride + 1 for n in self._map)
        return rows, columns

    @property
    def _map(self) -> tuple[int, int]:
        return self.size, self.columns or self.size

    @property
    def ideal(self) -> float:
        """Vector multiply-adds (of 4 floats) of any phase, if none is wasted."""
        return self.images * self.k * self.c // self.groups * self.window**2 * prod(self.out) / 4

    def __str__(self) -> str:
        more = f" s{self.stride}" * (self.stride > 1) + f" g{self.groups}" * (self.groups > 1)
        more = f"x{self.columns}" * (self.columns > 0) + more + f" b{self.images}" * (self.images > 1)
        return f"{self.window}x{self.window} {self.c}->{self.k} @{self.size}{more}"

    def phases(self) -> tuple[str, ...]:
        """The phases that training needs: nobody wants the gradient of the images."""
        return PHASES if self.c > 3 else (PHASES[0], PHASES[2])

    def algorithms(self) -> tuple[int, ...]:
        """Direct, and the sides of Winograd's tiles."""
        return (DIRECT, 2, 4) if (self.window, self.stride, self.groups) == (3, 1, 1) and self.c > 3 else (DIRECT,)

    def chosen(self, phase: str, target: Target, numerics: Numerics = "fast") -> int:
        """What the compiler chooses."""
        if len(self.algorithms()) == 1:
            return DIRECT
        c, k = (self.k, self.c) if phase == PHASES[1] else (self.c, self.k)
        return conv_choice.tile(FAMILIES[phase], self.images, *self.out, c, k, target=target, numerics=numerics)

    def work(self, phase: str, algorithm: int, target: Target) -> Work:
        """The phase on random data."""
        random = np.random.default_rng(0)
        x = random.standard_normal((self.images, self.c, *self._map), np.float32)
        w = random.standard_normal((self.k, self.c // self.groups, self.window, self.window), np.float32)
        dy = random.standard_normal((self.images, self.k, *self.out), np.float32)
        attrs: dict[str, Any] = {"strides": (self.stride,) * 2, "dilations": (1, 1), "pads": (self.pad,) * 4}
        attrs |= {"groups": self.groups} if self.groups > 1 else {}
        if phase == PHASES[0]:
            return _work("Conv", [x, w], attrs, target, algorithm, filters=[1], raw=[0])
        if phase == PHASES[1]:
            return _work("ConvInputGrad", [dy, w], {**attrs, "input_shape": x.shape}, target, algorithm, filters=[1])
        return _work("ConvWeightGrad", [x, dy], {**attrs, "kernel_shape": w.shape[2:]}, target, algorithm, raw=[0])


def _work(
    kind: str,
    values: Sequence[np.ndarray],
    attrs: dict[str, Any],
    target: Target,
    algorithm: int,
    *,
    filters: Sequence[int] = (),
    raw: Sequence[int] = (),
) -> Work:
    family = row(kind).kernel
    with_lower: Lower = getattr(conv, f"lower_{family}")
    if algorithm:
        with_lower = partial(getattr(winograd, f"lower_{family}"), m=algorithm)
    if "groups" in attrs:
        with_lower = lower
    few = [i for i in raw if values[i].shape[1] < target.block]
    return work(kind, values, attrs, target, filters=filters, raw=few, with_lower=with_lower)
