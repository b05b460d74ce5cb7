"""Adversarial losses and the penalties that keep a discriminator smooth.

Logits are `(B, K)`, one column for each head, real is positive, and every loss is a mean over both axes. Logits must
be unbounded: behind a sigmoid the softplus losses have a floor above zero and little gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fewstep.diffusion.prediction import at_least_float32
from fewstep.errors import UserError


class Adversarial(StrEnum):
    """Pairs of losses, with what the discriminator and the generator pay when real and fake cannot be told apart.

    Members:
        NON_SATURATING: log-likelihoods, 2·ln 2 and ln 2 (Goodfellow et al. 2014; DMD2).
        HINGE: hinge for the discriminator, −D for the generator; 2 and 0 (Lim & Ye 2017; ADD).
        HINGE_RELU: hinge for both; 2 and 1 (PCM).
        LSGAN: ½(D_r − 1)² + ½D_f² and ½(D_f − 1)², 1/4 and 1/8 at D = ½ (Mao et al. 2017).
        WGAN_CLAMPED: the Wasserstein critic with each term floored at −1; 0 and 0.
        RELATIVISTIC: pairs of one real and one fake; ln 2 and ln 2 (RpGAN; Jolicoeur-Martineau 2019; R3GAN).
    """

    NON_SATURATING = "non_saturating"
    HINGE = "hinge"
    HINGE_RELU = "hinge_relu"
    LSGAN = "lsgan"
    WGAN_CLAMPED = "wgan_clamped"
    RELATIVISTIC = "relativistic"


def discriminator_loss(kind: Adversarial, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What the discriminator minimises, a scalar, for logits `(B, K)` of real and fake samples."""
    real, fake = at_least_float32(real_logits), at_least_float32(fake_logits)
    match kind:
        case Adversarial.NON_SATURATING:
            return softplus(-real).mean() + softplus(fake).mean()
        case Adversarial.HINGE | Adversarial.HINGE_RELU:
            return (1 - real).relu().mean() + (1 + fake).relu().mean()
        case Adversarial.LSGAN:
            return 0.5 * ((real - 1).square().mean() + fake.square().mean())
        case Adversarial.WGAN_CLAMPED:
            return (-real).clamp_min(-1).mean() + fake.clamp_min(-1).mean()
        case Adversarial.RELATIVISTIC:
            return softplus(fake - real).mean()


def generator_loss(kind: Adversarial, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """What the generator minimises, a scalar, for logits `(B, K)` of its samples.

    Only the relativistic loss needs `real_logits` `(B, K)`, one real sample for each fake one.
    """
    fake = at_least_float32(fake_logits)
    match kind:
        case Adversarial.NON_SATURATING:
            return softplus(-fake).mean()
        case Adversarial.HINGE | Adversarial.WGAN_CLAMPED:
            return -fake.mean()
        case Adversarial.HINGE_RELU:
            return (1 - fake).relu().mean()
        case Adversarial.LSGAN:
            return 0.5 * (fake - 1).square().mean()
        case Adversarial.RELATIVISTIC:
            assert real_logits is not None, "the relativistic loss compares each fake with a real sample"
            return softplus(at_least_float32(real_logits) - fake).mean()


def r1(logits: Tensor, inputs: Tensor) -> Tensor:
    """½·E‖∇D‖², averaged over heads, differentiable (R1; Mescheder et al. 2018, whose γ is the weight).

    One backward pass for each head. On fakes it is R2; with a head's features as `inputs` it is ADD's variant.

    Args:
        logits: `(B, K)` computed from `inputs`.
        inputs: `(B, *)` whatever the gradient is taken with respect to; `requires_grad` must be set.
    """
    # Samples do not see each other, so the gradient of the batch's sum is each sample's own.
    norms = [_squared_norm(column.sum(), inputs) for column in at_least_float32(logits).unbind(1)]
    return 0.5 * torch.stack(norms).mean()


def _squared_norm(total: Tensor, inputs: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(total, inputs, create_graph=True)
    return at_least_float32(gradient).square().flatten(1).sum(1)


def approximate_r1(
    discriminator: Callable[[Tensor], Tensor], x: Tensor, logits: Tensor, std: float, noise: Tensor
) -> Tensor:
    """The mean of (D(x) − D(x + std·n))²/std², expected E‖∇D‖²: twice `r1`, without a second derivative.

    Multiply by γ/2 where `r1` is multiplied by γ. The division by std² makes that weight independent of `std`; APT's
    own penalty (arXiv 2501.08316) has no division, so its weight 100 at std 0.01 is 0.01 here.
    Exact for a linear D; curvature H adds std²·(tr²H + 2‖H‖²)/4, so `std` should be small. Logits computed in bf16
    differ by rounding alone, which the division amplifies: compute them in float32.

    Args:
        discriminator: D, from `(B, *)` to logits `(B, K)`, at the noise level and condition of `logits`.
        x: `(B, *)` what the discriminator was given: the sample that was re-noised already, if it is. Perturbing the
            clean sample and leaving out its re-noising compares inputs of two noise levels, and leaves a penalty that
            does not go away as `std` goes to zero.
        logits: `(B, K)` D(x), so that it is computed only once.
        std: size of the perturbation.
        noise: `(B, *)` n, unit noise.

    Raises:
        UserError: `std` is not positive.
    """
    if not std > 0:
        raise UserError(f"std: {std} given, it must be positive")
    difference = at_least_float32(logits) - at_least_float32(discriminator(x + std * noise))
    return (difference / std).square().mean()
