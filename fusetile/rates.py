"""The learning rate of every step, and what else an optimizer is fed that depends on the step's number.

Steps count from 1. With `total` steps in the run and t = step - 1:

    constant     rate
    step         rate * gamma ^ (t // step_size)
    multistep    rate * gamma ^ (how many milestones are at most t)
    cosine       from rate to `minimum`, along half a cosine over the run
    one-cycle    up from rate / 25 to rate over the first 30 %, down to rate / 250000, both along half a cosine
    polynomial   rate * (1 - t / total) ^ power

These are PyTorch's StepLR, MultiStepLR, CosineAnnealingLR, OneCycleLR (which here leaves momentum alone) and
PolynomialLR, advanced once per step. The first `warmup` steps have 1/warmup, 2/warmup, ... of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Schedule = Literal["constant", "step", "multistep", "cosine", "one-cycle", "polynomial"]

_RISE, _START, _END = 0.3, 25.0, 1e4  # PyTorch's pct_start, div_factor, final_div_factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """See the module. `betas` are Adam's."""

    learning_rate: float
    schedule: Schedule = "constant"
    warmup: int = 0
    step_size: int = 1
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    power: float = 1.0
    minimum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)

    def controls(self, step: int, total: int) -> Mapping[str, float]:
        """By role: the learning rate; for Adam, the rate over 1 - beta1^step, and 1 / sqrt(1 - beta2^step)."""
        rate = self.rate(step, total)
        mean, square = (1 - _power(beta, step) for beta in self.betas)
        return {"learning_rate": rate, "corrected_rate": rate / mean, "correction": 1 / math.sqrt(square)}

    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step."""
        return min(1.0, step / max(1, self.warmup)) * self._scheduled(step - 1, total)

    def _scheduled(self, t: int, total: int) -> float:
        rate = self.learning_rate
        match self.schedule:
            case "constant":
                return rate
            case "step":
                return rate * _power(self.gamma, t // self.step_size)
            case "multistep":
                return rate * _power(self.gamma, sum(milestone <= t for milestone in self.milestones))
            case "cosine":
                return _between(rate, self.minimum, t / total)
            case "one-cycle":
                top, last = _RISE * total - 1, total - 1
                if t <= top:
                    return _between(rate / _START, rate, t / top if top else 1.0)
                return _between(rate, rate / _START / _END, (t - top) / (last - top) if last > top else 0.0)
            case "polynomial":
                return rate * max(0.0, 1 - t / total) ** self.power


def _between(start: float, stop: float, part: float) -> float:
    """Along half a cosine."""
    return stop + (start - stop) * (1 + math.cos(math.pi * part)) / 2


def _power(base: float, exponent: int) -> float:
    """By multiplication alone: the same on every computer."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result
