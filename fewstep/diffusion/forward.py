"""What every forward process x_t = α_t·x_0 + σ_t·ε offers; the processes themselves are in `process.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import UserError


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Times `(B,)` as `(B, 1, 1, ...)`, to broadcast against `like` `(B, *)`."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


@dataclass(frozen=True)
class Kernel:
    """The transition x_t = scale·x_s + std·ε from a cleaner time s to a noisier time t."""

    scale: Tensor
    std: Tensor


class Process(ABC):
    """x_t = α_t·x_0 + σ_t·ε for t in [t_min, t_max]."""

    t_min: float
    t_max: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale α_t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale σ_t."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """dα/dt."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """dσ/dt."""

    @abstractmethod
    def time_at(self, ratio: Tensor) -> Tensor:
        """The time whose noise-to-signal ratio σ/α is `ratio`: the equal-SNR map into this process."""

    @abstractmethod
    def step_list(self, n: int) -> tuple[float, ...]:
        """Start times of an `n`-step sampler, noise end first; the last step goes to clean data."""

    @abstractmethod
    def at(self, fraction: Tensor) -> Tensor:
        """The time at `fraction` of the way from clean data (0) to noise (1), on the scale that windows are told in."""

    def ratio(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio σ_t/α_t, EDM's σ."""
        return self.sigma(t) / self.alpha(t)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """α_t·x_0 + σ_t·ε for `x0`, `noise` `(B, *)` and times `t` `(B,)`."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise

    def kernel(self, s: Tensor, t: Tensor) -> Kernel:
        """The transition from time `s` to a noisier time `t`: scale α_t/α_s, variance σ_t² − scale²·σ_s²."""
        scale = self.alpha(t) / self.alpha(s)
        return Kernel(scale, (self.sigma(t) ** 2 - (scale * self.sigma(s)) ** 2).clamp_min(0).sqrt())

    def renoise(self, x_s: Tensor, noise: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """`x_s` `(B, *)` taken from times `s` `(B,)` to noisier times `t` by the exact transition kernel."""
        kernel = self.kernel(s, t)
        return expand(kernel.scale, x_s) * x_s + expand(kernel.std, x_s) * noise

    def prior(self, noise: Tensor, t: float | None = None) -> Tensor:
        """The state a sampler starts from, given unit noise `(B, *)` and its first time `t` (default `t_max`).

        Pure noise at the scale that the network is fed at its noise end: the noise itself for VP and flow matching
        (also where α(t) is not quite zero, as diffusers' pipelines do), t·noise for EDM, σ_d·noise for TrigFlow.
        """
        return noise

    def times(self, value: float, like: Tensor) -> Tensor:
        """The time `value` for each of the `B` samples of `like` `(B, *)`: `(B,)`, at least float32."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.full((like.shape[0],), value, device=like.device, dtype=dtype)


def check_steps(n: int, most: int | None = None) -> None:
    """Raise a UserError unless a step list of `n` steps exists."""
    if n < 1 or (most is not None and n > most):
        raise UserError(f"steps: {n} given, allowed are " + ("1 and more" if most is None else f"1 to {most}"))
