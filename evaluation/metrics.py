"""Distances between two sets of samples. Everything is computed in float64: float32 covariances lose digits that count.

The Fréchet distance is biased upwards by an amount that depends on the number of samples; the kernel distances and the
accuracy are not biased and come with a standard error.

clean-fid and torchmetrics have the Fréchet and the kernel distance too, and the tests hold ours to theirs. They are not
called, because clean-fid's root of a matrix calls SciPy in a way that its next release refuses and fails where there
are fewer samples than features, torchmetrics' state turns to float32 with the module around it, and both average the
kernel distance over random subsets drawn from a global stream, without a standard error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import UserError

_ROWS = 1024  # of a distance or kernel matrix that are in memory at once
_BANDWIDTH = 10.0  # of CMMD's kernel


@dataclass(frozen=True)
class Score:
    """A figure and, where it is known, its standard error."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a set of features.

    Attributes:
        mean: `(D,)` float64.
        covariance: `(D, D)` float64, divided by N - 1.
        count: N.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of `features` `(N, D)`.

        Raises:
            UserError: fewer than two rows.
        """
        _need(features, 2, "Fréchet distance")
        x = features.double()
        mean = x.mean(dim=0)
        centred = x - mean
        return cls(mean, centred.T @ centred / (len(x) - 1), len(x))


def frechet_distance(real: Moments, fake: Moments) -> float:
    """Squared Fréchet distance of two Gaussians, |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    (S1 S2)^(1/2) has the trace of (A S2 A)^(1/2) with A = S1^(1/2); both roots are of symmetric matrices, whose
    eigenvalues are real and stable even where fewer samples than features make the covariances singular.
    Dowson and Landau 1982; used on features by Heusel et al. 2017 (arXiv:1706.08500, section 2).
    """
    values, vectors = torch.linalg.eigh(real.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ fake.covariance @ root).clamp(min=0).sqrt().sum()
    trace = real.covariance.trace() + fake.covariance.trace()
    return float((real.mean - fake.mean).square().sum() + trace - 2 * cross)


Kernel = Callable[[Tensor, int], Tensor]
"""Values of a kernel from products x.y and the number of dimensions."""


@dataclass(frozen=True)
class _KernelSums:
    """Sums of a kernel matrix `(M, N)`: over each row `(M,)` and over each column `(N,)`."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, kernel: Kernel, x: Tensor, y: Tensor) -> _KernelSums:
        rows, columns = [], torch.zeros(len(y), dtype=x.dtype, device=x.device)
        for part in x.split(_ROWS):
            values = kernel(part @ y.T, x.shape[1])
            rows.append(values.sum(dim=1))
            columns += values.sum(dim=0)
        return cls(torch.cat(rows), columns)


def _cubic(product: Tensor, dim: int) -> Tensor:
    return (product / dim + 1) ** 3


def _gaussian(product: Tensor, dim: int) -> Tensor:
    """Of vectors of length 1, whose squared distance is 2 - 2 x.y."""
    return ((product - 1) / _BANDWIDTH**2).exp()


def kid(real: Tensor, fake: Tensor) -> Score:
    """Kernel distance: the unbiased squared MMD with the kernel (x.y / D + 1)^3.

    Binkowski et al. 2018 (arXiv:1801.01401, section 4). They average over random subsets to save time; this is the
    formula over the whole sets, which has the same expectation, less noise and no random numbers. It is zero on
    average for equal distributions, so small negative values are in order. The standard error is the delete-one
    jackknife over both sets; where the two distributions agree it is too large by up to the square root of 2.

    Args:
        real: `(M, D)` features, M at least 3.
        fake: `(N, D)` features, N at least 3.

    Raises:
        UserError: too few rows.
    """
    return _squared_mmd(_cubic, real.double(), fake.double())


def mmd(real: Tensor, fake: Tensor) -> Score:
    """1000 times the unbiased squared MMD of unit-length features with a Gaussian kernel of bandwidth 10.

    CMMD, where the features are CLIP's (Jayasumana et al. 2024, arXiv:2401.09603, section 4). Their code takes the
    estimator that pairs each sample with itself too, which adds about 1000 (1 - k) (1/M + 1/N), k a typical value of
    the kernel; without these pairs the figure does not depend on the sample count and has a standard error, as `kid`.

    Args:
        real: `(M, D)` features, M at least 3, of any length.
        fake: `(N, D)` features, N at least 3.

    Raises:
        UserError: too few rows.
    """
    x, y = (torch.nn.functional.normalize(one.double(), dim=-1) for one in (real, fake))
    score = _squared_mmd(_gaussian, x, y)
    assert score.stderr is not None
    return Score(1000 * score.value, 1000 * score.stderr)


def _squared_mmd(kernel: Kernel, x: Tensor, y: Tensor) -> Score:
    _need(x, 3, "kernel distance")
    _need(y, 3, "kernel distance")
    within_x, within_y = _off_diagonal(kernel, x), _off_diagonal(kernel, y)
    between = _KernelSums.of(kernel, x, y)
    m, n = len(x), len(y)
    total = between.rows.sum()
    value = _pairs(within_x.sum(), m) + _pairs(within_y.sum(), n) - 2 * total / (m * n)
    # Without sample i, the sum over pairs loses its row and its column.
    without_x = _pairs(within_x.sum() - 2 * within_x, m - 1) - 2 * (total - between.rows) / ((m - 1) * n)
    without_y = _pairs(within_y.sum() - 2 * within_y, n - 1) - 2 * (total - between.columns) / (m * (n - 1))
    variance = without_x.var(correction=0) * (m - 1) + without_y.var(correction=0) * (n - 1)
    return Score(float(value), float(variance.sqrt()))


def _off_diagonal(kernel: Kernel, x: Tensor) -> Tensor:
    """`(N,)` row sums of the kernel matrix of `x` with itself, without the diagonal."""
    return _KernelSums.of(kernel, x, x).rows - kernel(x.square().sum(dim=1), x.shape[1])


def _pairs(total: Tensor, count: int) -> Tensor:
    return total / (count * (count - 1))


def accuracy(logits: Tensor, labels: Tensor) -> Score:
    """Share of samples whose largest logit is that of the wanted class, with its binomial standard error.

    Args:
        logits: `(N, K)`.
        labels: `(N,)` wanted classes, 0 to K - 1.

    Raises:
        UserError: counts differ, or a label is outside.
    """
    _need(logits, 1, "accuracy")
    if labels.shape != logits.shape[:1]:
        raise UserError(f"accuracy: found {len(labels)} labels for {len(logits)} images, one each is needed")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise UserError(f"accuracy: found labels {found}, allowed are 0 to {logits.shape[1] - 1}")
    share = (logits.argmax(dim=1) == labels.to(logits.device)).double().mean().item()
    return Score(share, (share * (1 - share) / len(logits)) ** 0.5)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| of two sets of vectors (Szekely and Rizzo 2013).

    The V-statistic: means run over all pairs, a sample with itself included, so it is never negative and is zero
    exactly where the two sets are equal.

    Args:
        x: `(M, D)`.
        y: `(N, D)`.

    Raises:
        UserError: an empty set, or different D.
    """
    _need(x, 1, "energy distance")
    _need(y, 1, "energy distance")
    if x.shape[1] != y.shape[1]:
        raise UserError(f"energy distance: found {x.shape[1]} and {y.shape[1]} dimensions, they must be equal")
    x, y = x.double(), y.double()
    return float(2 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y))


def _mean_distance(x: Tensor, y: Tensor) -> Tensor:
    # The faster form by matrix product leaves 1e-8 of rounding between a point and itself.
    exact = "donot_use_mm_for_euclid_dist"
    total = sum((torch.cdist(part, y, compute_mode=exact).sum() for part in x.split(_ROWS)), x.new_zeros(()))
    return total / (len(x) * len(y))


def _need(samples: Tensor, least: int, metric: str) -> None:
    if samples.ndim != 2 or len(samples) < least:
        raise UserError(f"{metric}: found samples of shape {tuple(samples.shape)}, at least {least} rows are needed")
