"""Shifts of flow matching's step list that depend on how large a sample is: diffusers' dynamic shifting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

USUAL_STEPS = 50
"""The step count that a shift is told for where none is given."""


class Mu(Protocol):
    """μ of samples of that many tokens, for that many steps."""

    def __call__(self, tokens: int, steps: int) -> float: ...


@dataclass(frozen=True)
class LinearMu:
    """A line through two points, as in Flux, SD3, Lumina2 and Qwen-Image; it does not depend on the steps."""

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096

    def __call__(self, tokens: int, steps: int) -> float:
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return self.base_shift + slope * (tokens - self.base_tokens)


@dataclass(frozen=True)
class EmpiricalMu:
    """FLUX.2's fit: between the lines of 10 and of 200 steps, and beyond 4300 tokens the latter's alone."""

    def __call__(self, tokens: int, steps: int) -> float:
        many = 0.00016927 * tokens + 0.45666666
        if tokens > 4300:
            return many
        few = 8.73809524e-05 * tokens + 1.89833333
        return many + (many - few) / 190 * (steps - 200)


@dataclass(frozen=True)
class DynamicShift:
    """The shift of samples of `tokens` tokens: e^μ, or μ itself for schedulers of `time_shift_type` linear."""

    mu: Mu
    tokens: int
    exponential: bool = True

    def shift(self, steps: int) -> float:
        """For that many steps."""
        mu = self.mu(self.tokens, steps)
        return math.exp(mu) if self.exponential else mu
