"""The Fréchet distance that infinitely many generated images would have."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import UserError

from .metrics import Moments, Score, frechet_distance

_POINTS = 15
_IMAGES_PER_FEATURE = 2  # below, the distance is no straight line in 1/N


def fd_infinity(real: Moments, fake: Tensor, seed: int = 0) -> Score:
    """The intercept of a straight line through Fréchet distances against 1/N (Chong and Forsyth 2020, 1911.07023).

    15 sample counts with even spaces, each with samples drawn anew without replacement. They start at a tenth of the
    set, as theirs, but not below two samples a feature: with fewer, the covariances are nearly singular, and the
    distance falls slower than 1/N. What remains is the bias of the real set's count, which is the same for all models.
    No standard error: the subsets overlap.

    Args:
        real: of the real images.
        fake: `(N, D)` features.
        seed: of the subsets.

    Raises:
        UserError: fewer than four samples a feature.
    """
    count, width = fake.shape
    if count < least(width):
        raise UserError(
            f"--fd-infinity: found {count} images, at least {least(width)} are needed for {width} features (four each)"
        )
    generator = torch.Generator().manual_seed(seed)
    counts = torch.linspace(max(count // 10, _IMAGES_PER_FEATURE * width), count, _POINTS).long().tolist()
    values = [
        frechet_distance(real, Moments.of(fake[torch.randperm(count, generator=generator)[:part]])) for part in counts
    ]
    line = torch.stack([torch.ones(_POINTS).double(), 1 / torch.tensor(counts).double()], dim=1)
    return Score(float(torch.linalg.lstsq(line, torch.tensor(values, dtype=torch.float64)[:, None]).solution[0]))


def least(width: int) -> int:
    """Images needed with that many features."""
    return 2 * _IMAGES_PER_FEATURE * width
