"""f-divergences as weights of the score difference, and the density ratio that they need from a discriminator.

D_f(p ‖ q) = E_q[f(r)] with r = p/q, p the teacher's density and q the student's. Its gradient is the reverse KL's with
every sample weighted by h(r) = f″(r)·r² (Xu et al. 2025, arXiv 2502.15681, theorem 1).
"""

from __future__ import annotations

import math
from enum import StrEnum

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.diffusion.prediction import at_least_float32
from fewstep.errors import UserError


class Divergence(StrEnum):
    """Divergences by f and h, from the one that seeks modes most to the one that covers them most.

    Members:
        REVERSE_KL: f = −ln r, h = 1: DMD.
        SOFTENED_RKL: f = (r+1)·ln((r+1)/2r), h = 1/(1+r): the non-saturating GAN's.
        JS: f = r·ln r − (r+1)·ln((r+1)/2), h = r/(1+r): Jensen-Shannon.
        SQUARED_HELLINGER: f = (1−√r)², h = √r/2.
        FORWARD_KL: f = r·ln r, h = r.
        JEFFREYS: f = (r−1)·ln r, h = 1+r: both KLs together.
    """

    REVERSE_KL = "reverse_kl"
    SOFTENED_RKL = "softened_rkl"
    JS = "js"
    SQUARED_HELLINGER = "squared_hellinger"
    FORWARD_KL = "forward_kl"
    JEFFREYS = "jeffreys"


def divergence_weight(kind: Divergence, ratio: Tensor) -> Tensor:
    """The weight h(r) = f″(r)·r², like `ratio`, which is r = p/q and positive."""
    match kind:
        case Divergence.REVERSE_KL:
            return torch.ones_like(ratio)
        case Divergence.SOFTENED_RKL:
            return 1 / (1 + ratio)
        case Divergence.JS:
            return ratio / (1 + ratio)
        case Divergence.SQUARED_HELLINGER:
            return 0.5 * ratio.sqrt()
        case Divergence.FORWARD_KL:
            return ratio
        case Divergence.JEFFREYS:
            return 1 + ratio


@torch.no_grad()
def density_ratio(logits: Tensor, low: float = 0.1, high: float = 20.0) -> Tensor:
    """The ratio r = exp(mean over heads of the logits) cut to [low, high], `(B,)`, detached.

    The logit of a discriminator that minimises the log-likelihood loss is ln(p/q) of the sample it was given.

    Args:
        logits: `(B, K)`, real is positive.
        low: smallest ratio, positive.
        high: largest ratio.

    Raises:
        UserError: bounds that do not rise from above zero.
    """
    if not 0 < low < high:
        raise UserError(f"ratio bounds: ({low}, {high}) given, 0 < low < high needed")
    return at_least_float32(logits).mean(1).clamp(math.log(low), math.log(high)).exp()


@torch.no_grad()
def unit_mean(values: Tensor, bins: Tensor | None = None, count: int = 1) -> Tensor:
    """`values` `(B,)` divided by their mean over the global batch, detached.

    Args:
        values: positive.
        bins: `(B,)` int64, 0 to count − 1: each bin is divided by its own mean. E_q[p/q] = 1 at every noise level, so
            ratios of one level should average 1 over the student's samples, and estimated ones are made to.
        count: number of bins.
    """
    index = torch.zeros_like(values, dtype=torch.long) if bins is None else bins
    sums = values.new_zeros(2, count)
    sums[0].index_add_(0, index, values)
    sums[1].index_add_(0, index, torch.ones_like(values))
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)  # one process may hold no sample of a bin
    return values / (sums[0] / sums[1])[index]
