"""Score distillation: the direction from the teacher's distribution to the student's, and its surrogate losses.

The sign lives here and nowhere else: fake minus real, of clean-sample estimates. In ε, v and velocity space the same
direction is real minus fake, so no other file subtracts one prediction from the other.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Prediction, at_least_float32
from fewstep.diffusion.process import Process, expand
from fewstep.errors import UserError, did_you_mean

Weight = Literal["dmd", "none"]


@torch.no_grad()
def score_direction(fake: Prediction, real: Prediction) -> Tensor:
    """x̂_0^fake − x̂_0^real `(B, *)`, detached: gradient descent moves the student's samples against it.

    Equal to (σ²/α)·(s_fake − s_real), hence α²/σ² times it is the gradient of KL(student ‖ teacher) at that noise level
    with respect to the clean sample (DMD, arXiv 2311.18828).
    """
    return fake.x0 - real.x0


@torch.no_grad()
def dmd_weight(x_hat: Tensor, real: Tensor, eps: float = 1e-6) -> Tensor:
    """1/mean|x̂ − x̂_0^real| of each sample, `(B, 1, ...)`, detached (DMD, arXiv 2311.18828, eq. 8).

    Args:
        x_hat: `(B, *)` the student's samples.
        real: `(B, *)` the teacher's clean-sample estimates.
        eps: floor of the mean, so that a student that has arrived stays finite.
    """
    gap = (at_least_float32(x_hat) - at_least_float32(real)).abs()
    return 1 / expand(gap.flatten(1).mean(1).clamp_min(eps), gap)


def vsd_weight(process: Process, t: Tensor) -> Tensor:
    """α_t·σ_t of each sample, `(B,)`: it turns the direction into VSD's σ_t²·(ε̂^real − ε̂^fake).

    That is variational score distillation with ω(t) = σ_t² (SwiftBrush, arXiv 2312.05239; code `train_swiftbrush.py`).
    """
    return process.alpha(t) * process.sigma(t)


def uniform(x_hat: Tensor, real: Tensor) -> Tensor:
    """1 for each sample, `(B, 1, ...)`."""
    like = at_least_float32(x_hat.detach())
    return like.new_ones(like.shape[:1] + (1,) * (like.ndim - 1))


def surrogate(x_hat: Tensor, direction: Tensor) -> Tensor:
    """mean(x̂·sg(g)) over everything: the scalar whose gradient with respect to x̂ is g/numel.

    It has the gradient of 0.5·mse(x̂, sg(x̂ − g)) without the pseudo-target x̂ − g, which in bf16 rounds a small g
    away. Its value means nothing; watch 0.5·mean(g²) instead.

    Args:
        x_hat: `(B, *)` the student's samples, with gradient.
        direction: `(B, *)` g.
    """
    return (at_least_float32(x_hat) * direction.detach()).mean()


def distribution_matching(
    x_hat: Tensor, fake: Prediction, real: Prediction, weight: Weight = "dmd", ratio: Tensor | None = None
) -> Tensor:
    """The distribution-matching loss: the surrogate of ω·h·(x̂_0^fake − x̂_0^real) (arXiv 2311.18828, 2405.14867).

    Args:
        x_hat: `(B, *)` the student's samples, with gradient.
        fake: prediction of the student's own score at a re-noised x̂.
        real: the teacher's at the same place.
        weight: ω; "dmd" is `dmd_weight`, "none" is 1.
        ratio: `(B,)` h, one factor per sample: a density ratio (f-distill, arXiv 2502.15681), or a weight of its noise
            level (`vsd_weight`); None is 1, the reverse KL.

    Raises:
        UserError: an unknown `weight`.
    """
    direction = _weight(weight, x_hat, real.x0, 1e-6) * score_direction(fake, real)
    if ratio is not None:
        direction = direction * expand(ratio.detach(), direction)
    return surrogate(x_hat, direction)


def sid(x_hat: Tensor, fake_x0: Tensor, real_x0: Tensor, alpha: float, weight: Weight = "dmd") -> Tensor:
    """Score identity distillation, with gradient through both scores (SiD, arXiv 2404.04057).

    Σ_pixels (y_r − y_f)·[(y_r − x̂) − a·(y_r − y_f)] / ω, mean over the batch, ω = sg(mean|x̂ − y_r|) of each sample,
    at least 1e-5. With an exact fake score its expected value is (1 − a)·E‖y_r − y_f‖² (ω aside): at a = 1 it is zero
    however bad the student, so its value is no measure of progress.

    Args:
        x_hat: `(B, *)` the student's samples x̂, with gradient.
        fake_x0: `(B, *)` y_f, the fake score's clean estimate at a re-noised x̂, with gradient through its x_t.
        real_x0: `(B, *)` y_r, the teacher's, likewise.
        alpha: a, 0.5 to 1.2 in the papers. Above 1 a far-too-broad student is pushed to be broader yet.
        weight: "dmd" divides by ω, "none" by 1.

    Raises:
        UserError: an unknown `weight`.
    """
    x, fake, real = at_least_float32(x_hat), at_least_float32(fake_x0), at_least_float32(real_x0)
    gap = real - fake
    product = gap * ((real - x) - alpha * gap)
    return (product * _weight(weight, x, real, 1e-5)).flatten(1).sum(1).mean()


def _weight(name: str, x_hat: Tensor, real: Tensor, eps: float) -> Tensor:
    match name:
        case "dmd":
            return dmd_weight(x_hat, real, eps)
        case "none":
            return uniform(x_hat, real)
    allowed = get_args(Weight)
    raise UserError(f"weight: {name!r} given, allowed are {', '.join(allowed)}{did_you_mean(name, allowed)}")
