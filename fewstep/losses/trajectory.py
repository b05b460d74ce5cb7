"""Targets along a teacher's trajectory: what several of its steps come to, as one step of the student."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fewstep.diffusion.prediction import at_least_float32
from fewstep.diffusion.process import Process, expand
from fewstep.losses.denoising import snr_weight

DistillationWeight = Literal["truncated_snr", "snr_plus_one"]


def invert_jump(process: Process, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor, clean: Tensor) -> Tensor:
    """The x̂_0 `(B, *)` whose one DDIM step from x_t lands on x_s (Salimans & Ho 2022, algorithm 2).

    x̂_0 = (x_s − (σ_s/σ_t)·x_t) / (α_s − (σ_s/σ_t)·α_t), which is x_s itself where the step ends at clean data.

    Args:
        process: of the times.
        x_t: `(B, *)` where the step starts.
        t: `(B,)` its time, of noise (σ_t > 0).
        x_s: `(B, *)` where it is to land.
        s: `(B,)` cleaner times; those of clean steps are not read.
        clean: `(B,)` whether a step ends at clean data instead.
    """
    x, landing = at_least_float32(x_t), at_least_float32(x_s)
    kept = process.sigma(s) / process.sigma(t)
    gain = process.alpha(s) - kept * process.alpha(t)
    kept, gain = torch.where(clean, 0.0, kept), torch.where(clean, 1.0, gain)
    return (landing - expand(kept, x).to(x) * x) / expand(gain, x).to(x)


def distillation_weight(process: Process, t: Tensor, weight: DistillationWeight) -> Tensor:
    """Weight `(B,)` of errors of x̂_0 at times `t`: max(SNR, 1), or SNR + 1 (Salimans & Ho 2022, section 4)."""
    snr = snr_weight(process, t)
    return snr.clamp_min(1.0) if weight == "truncated_snr" else snr + 1


def mean_velocity(first: Tensor, second: Tensor, first_gap: Tensor, second_gap: Tensor) -> Tensor:
    """(d₁·v₁ + d₂·v₂)/(d₁ + d₂) `(B, *)`: one step as long as two (Frans et al. 2024, eq. 4; SCFM's target).

    Args:
        first: `(B, *)` the velocity of the first step.
        second: `(B, *)` that of the second.
        first_gap: `(B,)` d₁, its length in time.
        second_gap: `(B,)` d₂.
    """
    share = expand(first_gap / (first_gap + second_gap), first).to(first)
    return share * first + (1 - share) * second
