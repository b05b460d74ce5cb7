"""Targets of the continuous-time methods: functions of a network's value, its derivative along the ODE, and its slope.

Nothing here carries a gradient but the `prediction` of the losses: a tangent is what the network is pulled towards.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import at_least_float32
from fewstep.diffusion.process import expand


@torch.no_grad()
def consistency_tangent(
    x: Tensor, t: Tensor, value: Tensor, slope: Tensor, derivative: Tensor, ramp: float = 1.0
) -> Tensor:
    """The tangent g = −cos²t·(σ_d·F − dx/dt) − r·cos t·sin t·(x + σ_d·dF/dt), `(B, *)` (sCM, arXiv 2410.11081).

    At r = 1 it is cos t·df/dt of f = cos t·x − sin t·σ_d·F, zero where f is constant along the ODE. The paper's prior
    weight 1/(σ_d·tan t) is in it: it is what has made ∂f/∂F = −σ_d·sin t a cosine.

    Args:
        x: `(B, *)` on TrigFlow, at times `t` `(B,)`.
        t: the angles.
        value: `(B, *)` σ_d·F, the network's velocity.
        slope: `(B, *)` dx/dt, the teacher's velocity, or that of the sample's own noise.
        derivative: `(B, *)` cos t·sin t·σ_d·dF/dt along the slope; the factor keeps it finite at both ends.
        ramp: r, which rises from 0 to 1 in the tangent's warm-up. At 0 the network learns the slope.
    """
    cos, sin = (expand(of(t), x).to(x) for of in (torch.cos, torch.sin))
    return -(cos.square()) * (value - slope) - ramp * (cos * sin * x + derivative)


@torch.no_grad()
def bounded(tangent: Tensor, c: float) -> Tensor:
    """g/(rms(g) + c) `(B, *)`, the root mean square over each sample: at most 1 (arXiv 2410.11081, section 4.1).

    The paper divides by ‖g‖ + c of the whole sample of D elements; times √D, and with c = c_paper/√D, that is this.
    """
    return tangent / (expand(tangent.flatten(1).square().mean(1).sqrt(), tangent) + c)


@torch.no_grad()
def average_velocity(slope: Tensor, derivative: Tensor, span: Tensor) -> Tensor:
    """The target v − (t − r)·du/dt `(B, *)`, what an average velocity must be (MeanFlow, arXiv 2505.13447, eq. 6).

    Args:
        slope: `(B, *)` v, the ODE's velocity at (x, t).
        derivative: `(B, *)` of u(x, t, r) along (v, 1, 0), with the end r held.
        span: `(B,)` t − r.
    """
    return slope - expand(span, slope).to(slope) * derivative


def weighted_by_level(prediction: Tensor, target: Tensor, log_weight: Tensor) -> Tensor:
    """exp(w)·mean|prediction − sg(target)|² − w `(B,)`: w learns −log of the error (arXiv 2410.11081, algorithm 1).

    Args:
        prediction: `(B, *)`, with gradient.
        target: `(B, *)`.
        log_weight: `(B,)` w, a learned function of the noise level; zero leaves the plain error.
    """
    return log_weight.exp() * _squared(prediction, target).mean(1) - log_weight


class LevelWeight(nn.Module):
    """w(t) `(B,)` of angles t in [0, π/2] as a cosine series, zero at first: the weight of `weighted_by_level`."""

    waves: Tensor

    def __init__(self, terms: int = 16) -> None:
        super().__init__()
        self.waves = nn.Buffer(2.0 * torch.arange(terms), persistent=False)
        self.series = nn.Parameter(torch.zeros(terms))

    def forward(self, t: Tensor) -> Tensor:
        return (t[:, None] * self.waves).cos() @ self.series


def adaptive(prediction: Tensor, target: Tensor, power: float, c: float) -> Tensor:
    """e·sg(e + c)^−p `(B,)` of the error e = mean|prediction − sg(target)|² (MeanFlow, arXiv 2505.13447, eq. 22).

    p = 0 is the squared error; p = ½ and p = 1 near a distance and a logarithm, which aim at a median and a mode.
    The paper's e is the sum over D elements: c there is D·c here.

    Args:
        prediction: `(B, *)`, with gradient.
        target: `(B, *)`.
        power: p.
        c: where the weight stops growing, in units of e.
    """
    error = _squared(prediction, target).mean(1)
    return error * (error.detach() + c) ** -power


def _squared(prediction: Tensor, target: Tensor) -> Tensor:
    return (at_least_float32(prediction) - at_least_float32(target).detach()).square().flatten(1)
