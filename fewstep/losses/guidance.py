"""Guidance that a student learns to say in one evaluation: from a guided teacher, or from data and itself.

Scales are s of x̂_∅ + s·(x̂_c − x̂_∅), off at 1. Papers that write x̂_c + w·(x̂_c − x̂_∅) mean s = 1 + w; a temperature β
is s = 1/β; and a target that the student's own difference is added to w times ends at s = 1/(1 − w).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.process import expand
from fewstep.losses.denoising import regression_target

GuidanceWeight = Literal["output", "snr_plus_one", "truncated_snr"]


def guided_regression(student: Prediction, guided: Prediction, weight: GuidanceWeight = "output") -> Tensor:
    """Squared error to the guided prediction at the same x_t (Meng et al. 2023, arXiv 2210.03142, stage one).

    Args:
        student: with gradient.
        guided: the guided teacher's; no gradient flows into it.
        weight: "output" compares in the student's own parametrisation. The others are progressive distillation's
            (arXiv 2202.00512): "snr_plus_one" is 1 + α²/σ² for the error of x̂_0, which is the error of v on variance
            preserving processes; "truncated_snr" is max(α²/σ², 1). As Δε = −(α/σ)·Δx_0, they are the sum and the
            larger one of the errors of x̂_0 and ε̂, finite wherever these are.
    """
    target = guided.detach()
    match weight:
        case "output":
            return _per_sample(student.as_kind(student.kind), target.as_kind(student.kind)).mean()
        case "snr_plus_one":
            return (_per_sample(student.x0, target.x0) + _per_sample(student.eps, target.eps)).mean()
        case "truncated_snr":
            return _per_sample(student.x0, target.x0).maximum(_per_sample(student.eps, target.eps)).mean()


def guidance_free(prediction: Prediction, null: Prediction, x0: Tensor, noise: Tensor, scale: Tensor) -> Tensor:
    """‖β·f_θ(x_t, t, c, β) + (1 − β)·sg f_θ(x_t, t, ∅) − target‖² with β = 1/s (GFT, arXiv 2501.15420).

    The mixture is what predicts the data, so that its optimum is E[target | x_t, c], and the student's own is
    f_∅ + (f_c − f_∅)/β: the guided prediction at s = 1/β. At s = 1 it is plain denoising.

    Args:
        prediction: the student's at x_t = α_t·x_0 + σ_t·ε, with gradient.
        null: the student's without its condition; no gradient flows into it.
        x0: `(B, *)` the clean samples.
        noise: `(B, *)` ε.
        scale: `(B,)` s, at least 1.
    """
    said, base = prediction.as_kind(prediction.kind), null.as_kind(prediction.kind).detach()
    beta = 1 / expand(scale, said)
    target = regression_target(prediction.process, prediction.t, x0, noise, prediction.kind)
    return _per_sample(beta * said + (1 - beta) * base, target).mean()


def model_guidance(prediction: Prediction, difference: Tensor, x0: Tensor, noise: Tensor, scale: float) -> Tensor:
    """‖f_θ(x_t, t, c) − (target + w·sg[f_c − f_∅])‖² with w = 1 − 1/s (MG, arXiv 2502.12154).

    Where f_c − f_∅ is the student's own, its fixed point solves g = f_c + w·(g − f_∅) with f the data's predictions:
    g = f_∅ + (f_c − f_∅)/(1 − w), the guided prediction at s = 1/(1 − w). The error shrinks by w each time, so that a
    w of 1 and more has no fixed point; no scale asks for one.

    Args:
        prediction: the student's at x_t = α_t·x_0 + σ_t·ε, with gradient.
        difference: `(B, *)` f_c − f_∅ in the student's parametrisation, 0 for samples that have lost their condition;
            no gradient flows into it.
        x0: `(B, *)` the clean samples.
        noise: `(B, *)` ε.
        scale: s, at least 1.
    """
    target = regression_target(prediction.process, prediction.t, x0, noise, prediction.kind)
    return _per_sample(prediction.as_kind(prediction.kind), target + (1 - 1 / scale) * difference.detach()).mean()


def _per_sample(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference, `(B,)`."""
    return (one - other).square().flatten(1).mean(1)
