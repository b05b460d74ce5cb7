"""Denoising score matching: what the fake score is trained with, and any teacher before it.

Weights are meant for the error of x̂_0; `in_space` carries them to the error of another parametrisation, so that the
loss, sample by sample, does not depend on the space it is computed in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Kind, Prediction, at_least_float32
from fewstep.diffusion.process import Process, expand


def denoising(prediction: Prediction, x0: Tensor, noise: Tensor, target: Kind, weight: Tensor | None = None) -> Tensor:
    """Squared error in the space of `target`: mean over each sample, times its weight, mean over the batch.

    Gradients flow wherever the arguments carry them: detach a student's sample before noising it.

    Args:
        prediction: the network's, at x_t = α_t·x_0 + σ_t·ε.
        x0: `(B, *)` the clean samples.
        noise: `(B, *)` ε, the noise that made x_t.
        target: the space of the comparison, whatever the network itself predicts.
        weight: `(B,)`, for errors in that very space; None is 1.
    """
    error = prediction.as_kind(target) - regression_target(prediction.process, prediction.t, x0, noise, target)
    per_sample = error.square().flatten(1).mean(1)
    return (per_sample if weight is None else per_sample * weight).mean()


def regression_target(process: Process, t: Tensor, x0: Tensor, noise: Tensor, kind: Kind) -> Tensor:
    """What a network of the given `kind` should say, `(B, *)`, if x_t at times `t` `(B,)` was made of x0 and noise."""
    x0, noise = at_least_float32(x0), at_least_float32(noise)

    def scale(of_t: Tensor) -> Tensor:
        return expand(of_t, x0).to(x0.dtype)

    match kind:
        case Kind.X0:
            return x0
        case Kind.EPS:
            return noise
        case Kind.V:
            return scale(process.alpha(t)) * noise - scale(process.sigma(t)) * x0
        case Kind.VELOCITY:
            return scale(process.d_alpha(t)) * x0 + scale(process.d_sigma(t)) * noise
        case Kind.SCORE:
            return -noise / scale(process.sigma(t))


def uniform_weight(process: Process, t: Tensor) -> Tensor:
    """1 at times `t` `(B,)`."""
    return torch.ones_like(t)


def snr_weight(process: Process, t: Tensor) -> Tensor:
    """α²/σ² at times `t` `(B,)`: as a weight for x̂_0 it is the plain error of ε (DDPM's loss)."""
    return process.ratio(t) ** -2


def min_snr_weight(process: Process, t: Tensor, gamma: float = 5.0) -> Tensor:
    """min(α²/σ², γ) at times `t` `(B,)` (min-SNR, arXiv 2303.09556, section 3.4)."""
    return snr_weight(process, t).clamp_max(gamma)


def edm_weight(process: Process, t: Tensor, sigma_data: float = 0.5) -> Tensor:
    """(κ² + σ_d²)/(κ·σ_d)² with κ = σ/α, at times `t` `(B,)` (EDM, arXiv 2206.00364, table 1)."""
    ratio = process.ratio(t)
    return (ratio**2 + sigma_data**2) / (ratio * sigma_data) ** 2


def in_space(weight: Tensor, process: Process, t: Tensor, kind: Kind) -> Tensor:
    """The weight `(B,)` which makes errors in the space of `kind` count as `weight` makes errors of x̂_0 count.

    Of the same x_t, Δε = −(α/σ)·Δx_0, Δv = −((α² + σ²)/σ)·Δx_0, Δu = −((α·σ' − α'·σ)/σ)·Δx_0 for the velocity u, and
    Δs = (α/σ²)·Δx_0 for the score s.
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    match kind:
        case Kind.X0:
            return weight
        case Kind.EPS:
            factor = alpha / sigma
        case Kind.V:
            factor = (alpha * alpha + sigma * sigma) / sigma
        case Kind.VELOCITY:
            factor = (alpha * process.d_sigma(t) - process.d_alpha(t) * sigma) / sigma
        case Kind.SCORE:
            factor = alpha / sigma**2
    return weight / factor**2
