"""Consistency residuals: metrics between two points of a trajectory, and the boundary conditions that anchor them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.prediction import at_least_float32
from fewstep.diffusion.process import expand
from fewstep.errors import UserError


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of each sample, `(B,)`, of `prediction` and `target` `(B, *)`."""
    return _difference(prediction, target).square().mean(1)


def pseudo_huber_elements(prediction: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """The mean over elements of √(d² + c²) − c, `(B,)`: each element on its own (LCM, arXiv 2310.04378).

    Args:
        prediction: `(B, *)`.
        target: `(B, *)`.
        c: where the loss turns from quadratic to linear, in units of one element.

    Raises:
        UserError: `c` is not positive.
    """
    return _huber(_difference(prediction, target).square(), c).mean(1)


def pseudo_huber_norm(prediction: Tensor, target: Tensor, c: float | None = None) -> Tensor:
    """√(‖d‖² + c²) − c, `(B,)`: the whole sample at once (iCT, arXiv 2310.14189; ECT, arXiv 2406.14548).

    Args:
        prediction: `(B, *)`.
        target: `(B, *)`.
        c: where the loss turns from quadratic to linear, in units of the norm; None is iCT's 0.00054·√D for samples of
            D elements.

    Raises:
        UserError: `c` is not positive.
    """
    difference = _difference(prediction, target)
    scale = 0.00054 * difference.shape[1] ** 0.5 if c is None else c
    return _huber(difference.square().sum(1), scale)


def _difference(prediction: Tensor, target: Tensor) -> Tensor:
    return (at_least_float32(prediction) - at_least_float32(target)).flatten(1)


def _huber(squared: Tensor, c: float) -> Tensor:
    if not c > 0:
        raise UserError(f"c: {c} given, it must be positive")
    # √(d² + c²) − c without its cancellation: in float32 that difference is zero for every d below c/3000.
    return squared / ((squared + c * c).sqrt() + c)


class Boundary(ABC):
    """f = c_skip(t)·x_t + c_out(t)·x̂_0, the map to the trajectory's clean end, which must keep that end fixed."""

    @abstractmethod
    def c_skip(self, t: Tensor) -> Tensor:
        """Coefficient of x_t, like `t`."""

    @abstractmethod
    def c_out(self, t: Tensor) -> Tensor:
        """Coefficient of x̂_0, like `t`."""

    def apply(self, x_t: Tensor, x0_hat: Tensor, t: Tensor) -> Tensor:
        """The result f `(B, *)`, from x_t and x̂_0 `(B, *)` at times `t` `(B,)`."""
        x, x0 = at_least_float32(x_t), at_least_float32(x0_hat)
        dtype = torch.promote_types(x.dtype, x0.dtype)
        return expand(self.c_skip(t).to(dtype), x) * x + expand(self.c_out(t).to(dtype), x0) * x0


@dataclass(frozen=True)
class PlainBoundary(Boundary):
    """f = x̂_0: where σ(t) ends at zero, and x̂_0 is x_t there by itself (flow matching)."""

    def c_skip(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def c_out(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class EDMBoundary(Boundary):
    """Fixed at σ_min on the EDM process, t = σ (consistency models, arXiv 2303.01469, appendix C).

    The paper scales the raw network F: f = c'_skip·x + c'_out·F with c'_skip = σ_d²/((σ−σ_min)² + σ_d²) and
    c'_out = σ_d·(σ−σ_min)/√(σ² + σ_d²). The same f in terms of EDM's x̂_0 = σ_d²/(σ²+σ_d²)·x + σ·σ_d/√(σ²+σ_d²)·F has
    c_out = (σ−σ_min)/σ and c_skip = c'_skip − c_out·σ_d²/(σ²+σ_d²). So a student whose weights are the teacher's starts
    from the teacher's x̂_0, up to terms of σ_min/σ.

    Attributes:
        sigma_data: σ_d, of EDM's preconditioning.
        sigma_min: where f(x, σ_min) = x, exactly.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002

    def c_skip(self, t: Tensor) -> Tensor:
        variance = self.sigma_data**2
        shifted = variance / ((t - self.sigma_min) ** 2 + variance)
        return shifted - self.c_out(t) * variance / (t**2 + variance)

    def c_out(self, t: Tensor) -> Tensor:
        return (t - self.sigma_min) / t


@dataclass(frozen=True)
class LCMBoundary(Boundary):
    """Fixed at table index 0 of a VP process (LCM, arXiv 2310.04378, with diffusers' `LCMScheduler` scaling).

    c_skip = σ_d²/((scaling·t)² + σ_d²), c_out = scaling·t/√((scaling·t)² + σ_d²), with t the table index: away from the
    first few indices f is x̂_0.

    Attributes:
        sigma_data: σ_d.
        scaling: of the index.
    """

    sigma_data: float = 0.5
    scaling: float = 10.0

    def c_skip(self, t: Tensor) -> Tensor:
        return self.sigma_data**2 / ((self.scaling * t) ** 2 + self.sigma_data**2)

    def c_out(self, t: Tensor) -> Tensor:
        scaled = self.scaling * t
        return scaled / (scaled**2 + self.sigma_data**2).sqrt()
