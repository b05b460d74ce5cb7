"""Noised Gaussian mixtures at given times, one for each sample of a batch, and the quantile map between two."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BISECTIONS = 64  # halves the bracket until float64 has no finer number


@dataclass(frozen=True)
class Marginal:
    """The components of p_t for each sample: N(means, stds²·I).

    Attributes:
        means: `(B, K, D)` float64, α_t·m_k.
        stds: `(B, K)` float64, √(α_t²·s_k² + σ_t²).
    """

    means: Tensor
    stds: Tensor

    def joint(self, x: Tensor, log_weights: Tensor) -> Tensor:
        """Joint log densities log(w_k·N(x; means_k, stds_k²)), `(B, K)`, for `x` `(B, D)` and log weights `(B, K)`."""
        distance = (x.double()[:, None] - self.means).square().sum(-1) / self.stds.square()
        normaliser = self.means.shape[-1] * (self.stds.log() + 0.5 * math.log(2 * math.pi))
        return log_weights.log_softmax(1) - 0.5 * distance - normaliser


def match_quantiles(x: Tensor, source: Marginal, target: Marginal, log_weights: Tensor) -> Tensor:
    """F_target⁻¹(F_source(x)) for `x` `(B, 1)` float64 and log weights `(K,)`, by bisection.

    The logit of F, not F, is matched: it keeps its digits in both tails. F_source(x) lies between Φ of the least and
    Φ of the greatest standardised x of all components, which brackets the answer.
    """
    z = (x - source.means[..., 0]) / source.stds
    wanted = _logit(z, log_weights)
    centres, least, greatest = target.means[..., 0], z.amin(1, keepdim=True), z.amax(1, keepdim=True)
    low = (centres + target.stds * least).amin(1, keepdim=True)
    high = (centres + target.stds * greatest).amax(1, keepdim=True)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = _logit((middle - centres) / target.stds, log_weights) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def _logit(z: Tensor, log_weights: Tensor) -> Tensor:
    """The logit of F, log F − log(1 − F), `(B, 1)`, from the components' standardised `z` `(B, K)`."""
    below = (log_weights + torch.special.log_ndtr(z)).logsumexp(1, keepdim=True)
    above = (log_weights + torch.special.log_ndtr(-z)).logsumexp(1, keepdim=True)
    return below - above
