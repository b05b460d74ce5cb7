"""The forward processes x_t = α_t·x_0 + σ_t·ε: what a noise level means.

Every process has its own continuous time t, noise end at `t_max`, data end at `t_min`, and gives α, σ and their
derivatives there. Times are float32 or float64 tensors of any shape; results have the same shape and dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from fewstep.diffusion.forward import Kernel, Process, check_steps, expand
from fewstep.diffusion.shift import USUAL_STEPS, DynamicShift
from fewstep.errors import UserError

__all__ = ["EDM", "VP", "Flow", "Kernel", "Process", "State", "TrigFlow", "expand", "transfer"]


@dataclass(frozen=True)
class State:
    """A noisy sample `x` `(B, *)` at the times `t` `(B,)` of some process."""

    x: Tensor
    t: Tensor


@dataclass(frozen=True, eq=False)
class VP(Process):
    """Variance preserving, α² + σ² = 1, from the ᾱ table of a diffusers scheduler; time is the real-valued table index.

    Between two entries log(σ/α) is linear, so the table's own entries are met exactly (Song et al. 2021, eq. 11, in
    the discretisation of Ho et al. 2020).

    Attributes:
        alphas_cumprod: `(N,)` the table ᾱ, decreasing. A terminal entry of zero (zero terminal SNR) is capped at
            log(σ/α) = 20, i.e. α = 2e-9.
    """

    alphas_cumprod: Tensor
    t_min: float = field(init=False, default=0.0)
    t_max: float = field(init=False)
    _tables: dict[tuple[torch.device, torch.dtype], Tensor] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        table = self.alphas_cumprod.detach().double().cpu()
        decreasing = table.ndim == 1 and len(table) >= 2 and bool((table.diff() < 0).all())
        if not (decreasing and table[0] < 1 and table[-1] >= 0):
            raise UserError("alphas_cumprod: a list that decreases strictly from below 1 to 0 or more is needed")
        object.__setattr__(self, "alphas_cumprod", table)
        object.__setattr__(self, "t_max", float(len(self.alphas_cumprod) - 1))

    def _log_ratio_table(self, like: Tensor) -> Tensor:
        key = (like.device, like.dtype)
        if key in self._tables:
            return self._tables[key]
        abar = self.alphas_cumprod
        log_ratio = (0.5 * (torch.log1p(-abar) - torch.log(abar))).clamp(max=20.0)
        table = log_ratio.to(like.device, like.dtype)
        if not is_functorch_wrapped_tensor(table):  # else made inside a forward derivative, beyond which it is invalid
            self._tables[key] = table
        return table

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table = self._log_ratio_table(t)
        lower = t.detach().floor().clamp(0, len(table) - 2).long()
        return table[lower], table[lower + 1], t - lower

    def _log_ratio(self, t: Tensor) -> Tensor:
        low, high, weight = self._segment(t)
        return low + weight * (high - low)

    def alpha(self, t: Tensor) -> Tensor:
        """√ᾱ_t."""
        return torch.sigmoid(-2 * self._log_ratio(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """√(1 − ᾱ_t)."""
        return torch.sigmoid(2 * self._log_ratio(t)).sqrt()

    def ratio(self, t: Tensor) -> Tensor:
        """√((1 − ᾱ_t)/ᾱ_t)."""
        return self._log_ratio(t).exp()

    def d_alpha(self, t: Tensor) -> Tensor:
        """Exact within a segment of the table; at an entry, that of the noisier side."""
        low, high, _ = self._segment(t)
        return -(self.sigma(t) ** 2) * self.alpha(t) * (high - low)

    def d_sigma(self, t: Tensor) -> Tensor:
        """Exact within a segment of the table; at an entry, that of the noisier side."""
        low, high, _ = self._segment(t)
        return self.alpha(t) ** 2 * self.sigma(t) * (high - low)

    def time_at(self, ratio: Tensor) -> Tensor:
        """Clamped to the table: ratios beyond its ends give its ends."""
        table, target = self._log_ratio_table(ratio), ratio.log()
        upper = torch.searchsorted(table, target.contiguous()).clamp(1, len(table) - 1)
        low, high = table[upper - 1], table[upper]
        return (upper - 1 + (target - low) / (high - low)).clamp(0, self.t_max).to(ratio.dtype)

    def at(self, fraction: Tensor) -> Tensor:
        """The index N·fraction, at most N−1: 0.02 and 0.98 of 1000 are 20 and 980."""
        return (fraction * len(self.alphas_cumprod)).clamp(0, self.t_max)

    def step_list(self, n: int) -> tuple[float, ...]:
        """Trailing spacing, the only one of diffusers' that starts from pure noise: N=1000, n=4: 999, 749, 499, 249."""
        count = len(self.alphas_cumprod)
        check_steps(n, count)
        return tuple(float(round(count * (n - i) / n) - 1) for i in range(n))


@dataclass(frozen=True)
class EDM(Process):
    """Variance exploding in EDM's form, x_σ = x_0 + σ·ε; time is σ itself (Karras et al. 2022)."""

    t_min: float = 0.002
    t_max: float = 80.0
    rho: float = 7.0

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """The time itself."""
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def time_at(self, ratio: Tensor) -> Tensor:
        """The ratio itself; pure noise of another process (ratio ∞) becomes this one's noise end."""
        return torch.where(torch.isinf(ratio), torch.full_like(ratio, self.t_max), ratio)

    def prior(self, noise: Tensor, t: float | None = None) -> Tensor:
        """t·noise."""
        return noise * (self.t_max if t is None else t)

    def at(self, fraction: Tensor) -> Tensor:
        """The Karras scale (EDM, eq. 5): σ^(1/ρ) is linear in the fraction."""
        high, low = self.t_max ** (1 / self.rho), self.t_min ** (1 / self.rho)
        return (low + fraction * (high - low)) ** self.rho

    def step_list(self, n: int) -> tuple[float, ...]:
        """Karras grid of n+1 points without its clean end, which the last step reaches: n=2: 80, 2.52."""
        check_steps(n)
        fractions = torch.arange(n, 0, -1, dtype=torch.float64) / n
        return tuple(self.at(fractions).tolist())


@dataclass(frozen=True)
class Flow(Process):
    """Flow matching, x_t = (1−t)·x_0 + t·ε; velocity ε − x_0 (Lipman et al. 2023; Liu et al. 2023).

    Attributes:
        shift: bends the step list towards noise, t' = shift·t/(1 + (shift−1)·t) (Esser et al. 2024, eq. 23).
        timesteps: what a diffusers scheduler calls t = 1.
        dynamic: the shift as a function of the sample's size and the number of steps; `sized` tells it the size.
    """

    shift: float = 1.0
    t_min: float = 0.0
    t_max: float = 1.0
    timesteps: float = 1000.0
    dynamic: DynamicShift | None = None

    def sized(self, tokens: int) -> Flow:
        """The same process for samples of that many tokens; itself where the shift is not dynamic."""
        if self.dynamic is None:
            return self
        dynamic = replace(self.dynamic, tokens=tokens)
        return replace(self, shift=dynamic.shift(USUAL_STEPS), dynamic=dynamic)

    def alpha(self, t: Tensor) -> Tensor:
        """1 − t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """The time itself."""
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        """−1."""
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def time_at(self, ratio: Tensor) -> Tensor:
        """Ratio/(1 + ratio), and 1 for ∞."""
        return torch.where(torch.isinf(ratio), torch.ones_like(ratio), ratio / (1 + ratio))

    def at(self, fraction: Tensor) -> Tensor:
        """The fraction itself."""
        return fraction

    def step_list(self, n: int) -> tuple[float, ...]:
        """1, (n−1)/n, ..., 1/n, bent by `shift`: n=4, shift 3: 1, 0.9, 0.75, 0.5."""
        check_steps(n)
        shift = self.shift if self.dynamic is None else self.dynamic.shift(n)
        plain = [(n - i) / n for i in range(n)]
        return tuple(shift * t / (1 + (shift - 1) * t) for t in plain)


@dataclass(frozen=True)
class TrigFlow(Process):
    """x_t = cos(t)·x_0 + σ_d·sin(t)·ε for t in [0, π/2] (Lu & Song 2025, "sCM")."""

    sigma_data: float = 1.0
    t_min: float = 0.0
    t_max: float = math.pi / 2

    def alpha(self, t: Tensor) -> Tensor:
        """The cosine of t."""
        return torch.cos(t)

    def sigma(self, t: Tensor) -> Tensor:
        """σ_d·sin t."""
        return self.sigma_data * torch.sin(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        """−sin t."""
        return -torch.sin(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """σ_d·cos t."""
        return self.sigma_data * torch.cos(t)

    def ratio(self, t: Tensor) -> Tensor:
        """σ_d·tan t, and ∞ at the noise end."""
        noise_end = torch.full_like(t, math.inf)  # where cos(π/2) is 6e-17, or in float32 −4e-8
        return torch.where(t < self.t_max, self.sigma(t) / self.alpha(t), noise_end)

    def time_at(self, ratio: Tensor) -> Tensor:
        """atan(ratio/σ_d)."""
        return torch.atan(ratio / self.sigma_data)

    def prior(self, noise: Tensor, t: float | None = None) -> Tensor:
        """σ_d·noise."""
        return noise * self.sigma_data

    def at(self, fraction: Tensor) -> Tensor:
        """The angle fraction·π/2."""
        return fraction * self.t_max

    def step_list(self, n: int) -> tuple[float, ...]:
        """The flow grid i/n through atan(t/(1−t)): equal SNR for data of standard deviation σ_d."""
        return tuple(math.atan2(t, 1 - t) for t in Flow().step_list(n))


def transfer(x: Tensor, t: Tensor, source: Process, target: Process) -> State:
    """The same noisy sample in another process: the time of equal SNR, x scaled by the ratio of the α.

    `x` `(B, *)` at times `t` `(B,)` of `source`. Towards the noise end, where α vanishes, the ratio of the σ
    scales x instead of that of the α: the same number wherever both exist.
    """
    t_target = target.time_at(source.ratio(t))
    use_sigma = source.sigma(t) > source.alpha(t)
    scale = torch.where(use_sigma, target.sigma(t_target) / source.sigma(t), target.alpha(t_target) / source.alpha(t))
    return State(x * expand(scale, x), t_target)


def same_process(one: Process, other: Process) -> bool:
    """Whether x_t means the same in both, so that their networks may see each other's samples."""
    match one, other:
        case VP(), VP():
            same_length = len(one.alphas_cumprod) == len(other.alphas_cumprod)
            return same_length and torch.allclose(one.alphas_cumprod, other.alphas_cumprod, rtol=1e-5, atol=0)
        case Flow(), Flow():  # the shift only bends step lists
            return True
    return one == other
