"""What a network predicts, in every parametrisation: one value, converted on demand."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor

from fewstep.diffusion.process import Process, expand


class Kind(StrEnum):
    """Parametrisations of one and the same prediction, by their diffusers names where diffusers has one."""

    EPS = "epsilon"
    X0 = "sample"
    V = "v_prediction"
    VELOCITY = "velocity"
    SCORE = "score"


@dataclass(frozen=True, eq=False)
class Prediction:
    """A prediction at `x_t`, of the given `kind`, converted lazily and in at least float32.

    Attributes:
        process: what x_t means.
        x_t: `(B, *)` the noisy sample the network saw.
        t: `(B,)` its time.
        value: `(B, *)` the network's output.
        kind: its parametrisation.

    With Δ = α·σ' − α'·σ: x̂_0 = (σ'·x − σ·u)/Δ and ε̂ = (α·u − α'·x)/Δ for the velocity u = dx_t/dt;
    x̂_0 = (α·x − σ·v)/(α² + σ²) and ε̂ = (σ·x + α·v)/(α² + σ²) for v = α·ε − σ·x_0 (Salimans & Ho 2022).
    """

    process: Process
    x_t: Tensor
    t: Tensor
    value: Tensor
    kind: Kind

    @staticmethod
    def of_x0(process: Process, x_t: Tensor, t: Tensor, x0: Tensor) -> Prediction:
        """The prediction that the clean sample is `x0` `(B, *)`."""
        return Prediction(process, x_t, t, x0, Kind.X0)

    @cached_property
    def _x(self) -> Tensor:
        return at_least_float32(self.x_t)

    @cached_property
    def _value(self) -> Tensor:
        return at_least_float32(self.value)

    def _coefficient(self, of_t: Tensor) -> Tensor:
        """Computed at the precision of t, used at that of the samples: float64 times alone do not promote those."""
        return expand(of_t, self.x_t).to(torch.promote_types(self._x.dtype, self._value.dtype))

    @cached_property
    def _alpha(self) -> Tensor:
        return self._coefficient(self.process.alpha(self.t))

    @cached_property
    def _sigma(self) -> Tensor:
        return self._coefficient(self.process.sigma(self.t))

    @cached_property
    def _rates(self) -> _Rates:
        d_alpha, d_sigma = self.process.d_alpha(self.t), self.process.d_sigma(self.t)
        return _Rates(self._coefficient(d_alpha), self._coefficient(d_sigma))

    @cached_property
    def x0(self) -> Tensor:
        """x̂_0, the expected clean sample."""
        x, out, a, s = self._x, self._value, self._alpha, self._sigma
        match self.kind:
            case Kind.X0:
                return out
            case Kind.EPS:
                return (x - s * out) / a
            case Kind.V:
                return (a * x - s * out) / (a * a + s * s)
            case Kind.VELOCITY:
                rates = self._rates
                return (rates.sigma * x - s * out) / (a * rates.sigma - rates.alpha * s)
            case Kind.SCORE:
                return (x + s * s * out) / a

    @cached_property
    def eps(self) -> Tensor:
        """ε̂, the expected noise."""
        x, out, a, s = self._x, self._value, self._alpha, self._sigma
        match self.kind:
            case Kind.X0:
                return (x - a * out) / s
            case Kind.EPS:
                return out
            case Kind.V:
                return (s * x + a * out) / (a * a + s * s)
            case Kind.VELOCITY:
                rates = self._rates
                return (a * out - rates.alpha * x) / (a * rates.sigma - rates.alpha * s)
            case Kind.SCORE:
                return -s * out

    @cached_property
    def v(self) -> Tensor:
        """The v-prediction, α·ε̂ − σ·x̂_0 (Salimans & Ho 2022)."""
        return self._value if self.kind is Kind.V else self._alpha * self.eps - self._sigma * self.x0

    @cached_property
    def velocity(self) -> Tensor:
        """dx_t/dt = α'·x̂_0 + σ'·ε̂, the probability-flow ODE's right-hand side."""
        if self.kind is Kind.VELOCITY:
            return self._value
        return self._rates.alpha * self.x0 + self._rates.sigma * self.eps

    @cached_property
    def score(self) -> Tensor:
        """∇ log p_t(x_t) = −ε̂/σ."""
        return self._value if self.kind is Kind.SCORE else -self.eps / self._sigma

    def as_kind(self, kind: Kind) -> Tensor:
        """The prediction's value in the parametrisation `kind`."""
        match kind:
            case Kind.X0:
                return self.x0
            case Kind.EPS:
                return self.eps
            case Kind.V:
                return self.v
            case Kind.VELOCITY:
                return self.velocity
            case Kind.SCORE:
                return self.score

    def detach(self) -> Prediction:
        """The same prediction outside the autograd graph."""
        return Prediction(self.process, self.x_t.detach(), self.t, self.value.detach(), self.kind)


@dataclass(frozen=True)
class _Rates:
    alpha: Tensor
    sigma: Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()
