"""Laws of times and of pairs of times, as pure maps of uniform numbers.

A law turns uniforms `u` `(B,)` in [0, 1) into times `(B,)` of the same dtype. The caller draws u, so that a run's
times do not depend on how its batch is spread over devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from fewstep.diffusion.process import Process
from fewstep.errors import UserError


class Law(Protocol):
    """A law of times: uniforms `(B,)` to times `(B,)`."""

    def __call__(self, u: Tensor) -> Tensor:
        """The times whose quantiles are `u`."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Uniform on a window of the process's own scale, optionally bent towards noise.

    Attributes:
        process: of the times.
        low: cleanest fraction of the scale (`Process.at`): 0.02 on VP is index 20, on flow matching t = 0.02.
        high: noisiest fraction.
        shift: f' = shift·f/(1 + (shift−1)·f) of a uniform f (Esser et al. 2024, eq. 23), cut to the window.

    Raises:
        UserError: fractions that do not rise within 0 to 1, a shift that is not positive.
    """

    process: Process
    low: float = 0.0
    high: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise UserError(f"time window: ({self.low}, {self.high}) given, 0 <= low < high <= 1 needed")
        if self.shift <= 0:
            raise UserError(f"time shift: {self.shift} given, a positive number needed")

    def __call__(self, u: Tensor) -> Tensor:
        """Times of the process."""
        low, high = _bend(self.low, 1 / self.shift), _bend(self.high, 1 / self.shift)
        plain = low + u * (high - low)
        return self.process.at(self.shift * plain / (1 + (self.shift - 1) * plain))


def _bend(fraction: float, shift: float) -> float:
    return shift * fraction / (1 + (shift - 1) * fraction)


def annealed(window: tuple[float, float], share: float, done: float) -> tuple[float, float]:
    """A window whose clean edge begins 70 % of the way to its noisy one and falls to its place, linearly.

    At high noise all modes are one, so a sample still finds its way to a mode that none has reached.

    Args:
        window: fractions of the process's scale, as `Uniform` takes them.
        share: of the run, over which the edge falls; 0 leaves the window as it is.
        done: share of the run that is over.
    """
    low, high = window
    left = max(0.0, 1 - done / share) if share else 0.0
    return low + 0.7 * left * (high - low), high


@dataclass(frozen=True)
class LogitNormal:
    """Fractions of the process's scale with logit ~ N(mean, std²) (Esser et al. 2024, eq. 19)."""

    process: Process
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, u: Tensor) -> Tensor:
        """Times of the process."""
        return self.process.at(torch.sigmoid(self.mean + self.std * _normal(u)))


@dataclass(frozen=True)
class Beta:
    """Fractions of the process's scale ~ Beta(a, b), a and b positive.

    The quantiles are read from a table over y = logit(f), where the density f^a·(1−f)^b is smooth for every a and b;
    they are met to 1e-5.
    """

    process: Process
    a: float
    b: float

    def __post_init__(self) -> None:
        if not (self.a > 0 and self.b > 0):
            raise UserError(f"beta law: a={self.a}, b={self.b} given, positive numbers needed")

    def __call__(self, u: Tensor) -> Tensor:
        """Times of the process."""
        table = _beta_table(self.a, self.b, u.device)
        upper = torch.searchsorted(table.cumulative, u.double()).clamp(1, len(table.logits) - 1)
        low, high = table.cumulative[upper - 1], table.cumulative[upper]
        weight = ((u - low) / (high - low)).clamp(0, 1)
        logit = table.logits[upper - 1] + weight * (table.logits[upper] - table.logits[upper - 1])
        return self.process.at(torch.sigmoid(logit).to(u.dtype))


@dataclass(frozen=True)
class _BetaTable:
    logits: Tensor
    cumulative: Tensor


@cache
def _beta_table(a: float, b: float, device: torch.device, points: int = 8192) -> _BetaTable:
    """Cumulated trapezoids; the ends lie where the tails e^(ay) and e^(−by) have fallen to e^−30."""
    logits = torch.linspace(-30 / a - 5, 30 / b + 5, points, dtype=torch.float64, device=device)
    log_density = a * torch.nn.functional.logsigmoid(logits) + b * torch.nn.functional.logsigmoid(-logits)
    density = (log_density - log_density.max()).exp()
    cumulative = torch.cat([density.new_zeros(1), (density[1:] + density[:-1]).cumsum(0)])
    return _BetaTable(logits, cumulative / cumulative[-1])


@dataclass(frozen=True)
class LogNormal:
    """Noise-to-signal ratios σ/α with logarithm ~ N(mean, std²) (Karras et al. 2022, table 1)."""

    process: Process
    mean: float = -1.2
    std: float = 1.2

    def __call__(self, u: Tensor) -> Tensor:
        """Times of the process."""
        return self.process.time_at((self.mean + self.std * _normal(u)).exp())


@dataclass(frozen=True)
class Karras:
    """Noise-to-signal ratios σ/α whose (1/rho)-th power is uniform from `low` to `high` (Karras et al. 2022, eq. 5)."""

    process: Process
    low: float = 0.002
    high: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise UserError(f"karras law: ({self.low}, {self.high}) given, 0 < low < high needed")

    def __call__(self, u: Tensor) -> Tensor:
        """Times of the process."""
        low, high = self.low ** (1 / self.rho), self.high ** (1 / self.rho)
        return self.process.time_at((low + u * (high - low)) ** self.rho)


@dataclass(frozen=True)
class Choice:
    """One of `times`, each as likely: a sampler's step list, or a list of whole indices."""

    times: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.times:
            raise UserError("times to choose from: none given, at least one needed")

    def __call__(self, u: Tensor) -> Tensor:
        """Times of the list."""
        return _table(self.times, u.device, u.dtype)[below(len(self.times), u)]


def below(n: int, u: Tensor) -> Tensor:
    """Whole numbers 0 to n−1, each as likely, int64 like `u`: ⌊u·n⌋."""
    return (u * n).long().clamp_max(n - 1)  # u·n may round up to n


@cache
def _table(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype)


def _normal(u: Tensor) -> Tensor:
    """Standard normal numbers of the quantiles `u`, kept finite: at most 5.3 standard deviations."""
    edge = 2.0**-24
    return torch.special.ndtri(u.clamp(edge, 1 - edge))


@dataclass(frozen=True)
class TimePair:
    """Two times on one trajectory.

    Attributes:
        t: `(B,)` the noisier one.
        s: `(B,)` the cleaner one.
    """

    t: Tensor
    s: Tensor


class PairLaw(Protocol):
    """A law of pairs of times: uniforms `(B,)` to a TimePair."""

    def __call__(self, u: Tensor) -> TimePair:
        """The pairs that the uniforms `u` pick."""
        ...


@dataclass(frozen=True)
class GridPairs:
    """Neighbours on the process's own grid of `intervals` steps (`Process.step_list`) and its clean end `t_min`.

    On VP, 50 intervals give LCM's grid: t = 19, 39, ..., 999 and s = t − 20, but 0 for t = 19. On EDM, 39 give the
    neighbours on the Karras grid of 40 points of Song et al. 2023.

    Attributes:
        process: of the times.
        intervals: of the grid.
        skip: how many grid points s is cleaner than t, stopping at the clean end.

    Raises:
        UserError: fewer intervals or a smaller skip than 1.
    """

    process: Process
    intervals: int = 50
    skip: int = 1

    def __post_init__(self) -> None:
        if self.skip < 1 or self.skip > self.intervals:
            raise UserError(f"skip: {self.skip} given, 1 to {self.intervals} (the grid's intervals) allowed")
        self.process.step_list(self.intervals)

    def __call__(self, u: Tensor) -> TimePair:
        """Grid points t, each start of an interval as likely, with their s."""
        grid = _table((*self.process.step_list(self.intervals), self.process.t_min), u.device, u.dtype)
        start = below(self.intervals, u)
        return TimePair(grid[start], grid[(start + self.skip).clamp_max(self.intervals)])


@dataclass(frozen=True)
class RatioPairs:
    """Pairs whose noise levels approach each other stage by stage (Geng et al. 2024, "ECT", section 3).

    With κ = σ/α: κ_s = κ_t·(1 − (1 − ρ)·(1 + k·sigmoid(−b·κ_t))), at least 0, where ρ = 1 − q^−(stage+1), at most
    `limit`. In the first stages s is clean data for most t; in the last κ_s/κ_t nears the limit.

    Attributes:
        process: of the times.
        law: of t.
        stage: how often the gap has been divided by `q`, from 0.
        q: the divisor.
        k: how much wider the gap is at low noise.
        b: how fast that widening fades with κ.
        limit: greatest ratio κ_s/κ_t.
    """

    process: Process
    law: Law
    stage: int = 0
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    limit: float = 0.999

    def __call__(self, u: Tensor) -> TimePair:
        """Times t of the law with their s."""
        t = self.law(u)
        ratio = self.process.ratio(t)
        gap = 1 - min(1 - self.q ** -(self.stage + 1), self.limit)
        kept = (1 - gap * (1 + self.k * torch.sigmoid(-self.b * ratio))).clamp_min(0)
        return TimePair(t, self.process.time_at(ratio * kept))


def ordered(one: Tensor, other: Tensor) -> TimePair:
    """Two independent draws `(B,)` of a law as a pair, the noisier one first."""
    return TimePair(torch.maximum(one, other), torch.minimum(one, other))
