"""Precision, recall, density and coverage: whose samples lie in whose neighbourhoods.

Own code: torchmetrics and clean-fid have none of the four; the packages that have hold the whole matrix, or print.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import UserError

from .metrics import Score

NEAREST = 5
"""k. The neighbourhood of a sample reaches to its k-th nearest neighbour of the same set, itself not counted."""

_ROWS = 1024  # of a distance matrix that are in memory at once


@dataclass(frozen=True)
class Neighbourhoods:
    """Four shares: how good samples are, and how much of the real set they reach.

    Attributes:
        precision: generated samples in the neighbourhood of a real one (Kynkäänniemi et al. 2019, arXiv:1904.06991).
        recall: real samples in the neighbourhood of a generated one.
        density: real neighbourhoods a generated sample lies in, on average, over k; may pass 1 (Naeem et al. 2020,
            arXiv:2002.09797).
        coverage: real samples whose neighbourhood holds a generated one.
    """

    precision: Score
    recall: Score
    density: Score
    coverage: Score


def neighbourhoods(real: Tensor, fake: Tensor, nearest: int = NEAREST) -> Neighbourhoods:
    """The four shares, with standard errors of means over samples, as though the neighbourhoods were given.

    Args:
        real: `(M, D)` features.
        fake: `(N, D)` features.
        nearest: k.

    Raises:
        UserError: a set has not more than k samples.
    """
    for samples in (real, fake):
        if len(samples) <= nearest:
            raise UserError(f"pr: found {len(samples)} images, at least {nearest + 1} are needed")
    x, y = real.double(), fake.double()
    real_radius, fake_radius = _radii(x, nearest), _radii(y, nearest)
    within = torch.zeros(len(y), dtype=torch.float64)  # real neighbourhoods around each generated sample
    reached, covered = [], []
    for part, radius in zip(x.split(_ROWS), real_radius.split(_ROWS), strict=True):
        distances = torch.cdist(part, y)
        inside = distances < radius[:, None]
        within += inside.sum(dim=0)
        covered.append(inside.any(dim=1))
        reached.append((distances < fake_radius).any(dim=1))
    return Neighbourhoods(
        _mean(within > 0), _mean(torch.cat(reached)), _mean(within / nearest), _mean(torch.cat(covered))
    )


def _radii(x: Tensor, nearest: int) -> Tensor:
    """`(N,)` distances to the k-th nearest other sample; the nearest of all is the sample itself."""
    return torch.cat([torch.cdist(part, x).kthvalue(nearest + 1, dim=1).values for part in x.split(_ROWS)])


def _mean(values: Tensor) -> Score:
    x = values.double()
    return Score(float(x.mean()), float(x.std(correction=0) / len(x) ** 0.5))
