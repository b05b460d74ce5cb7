"""Precision, recall, density and coverage against their definitions, pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluation.neighbours import Neighbourhoods, neighbourhoods
from tests.evaluation.test_metrics import randn


def by_hand(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    """Every distance by itself, every neighbourhood as a list."""

    def distance(a, b):
        return float(np.sqrt(((a - b) ** 2).sum()))

    def radius(points, i):
        return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    real_radius = [radius(real, i) for i in range(len(real))]
    fake_radius = [radius(fake, i) for i in range(len(fake))]
    holds = [[distance(r, f) < real_radius[i] for f in fake] for i, r in enumerate(real)]
    found = {
        "precision": np.mean([any(row[j] for row in holds) for j in range(len(fake))]),
        "recall": np.mean([any(distance(r, f) < fake_radius[j] for j, f in enumerate(fake)) for r in real]),
        "density": sum(map(sum, holds)) / (k * len(fake)),
        "coverage": np.mean([any(row) for row in holds]),
    }
    return {name: float(value) for name, value in found.items()}


def values(shares: Neighbourhoods) -> dict[str, float]:
    return {name: getattr(shares, name).value for name in ("precision", "recall", "density", "coverage")}


@pytest.mark.parametrize(("m", "n", "k", "shift"), [(40, 40, 5, 0.0), (31, 50, 3, 0.7), (25, 12, 5, 1.5)])
def test_the_four_shares_equal_their_definitions(monkeypatch, m, n, k, shift):
    monkeypatch.setattr("fewstep.evaluation.neighbours._ROWS", 7)
    real, fake = randn(m, 4), 0.8 * randn(n, 4, seed=1) + shift
    expected = by_hand(real.numpy(), fake.numpy(), k)
    assert values(neighbourhoods(real, fake, k)) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected["precision"] < 1 or shift == 0.0, "an empty comparison"


def test_sets_far_apart_share_nothing_and_equal_laws_nearly_all():
    real = randn(200, 3)
    assert values(neighbourhoods(real, real + 1000)) == dict.fromkeys(("precision", "recall", "density", "coverage"), 0)
    close = values(neighbourhoods(real, randn(200, 3, seed=1)))
    assert min(close["precision"], close["recall"], close["coverage"]) > 0.9
    assert close["density"] == pytest.approx(1, abs=0.15)


def test_copies_of_few_images_keep_precision_and_lose_recall():
    real = randn(300, 3)
    few = randn(10, 3, seed=1).repeat(30, 1) + 1e-3 * randn(300, 3, seed=2)
    shares = values(neighbourhoods(real, few))
    assert shares["precision"] > 0.8
    assert shares["recall"] < 0.1
    assert shares["coverage"] < 0.3


def test_errors_are_those_of_means():
    shares = neighbourhoods(randn(50, 2), randn(80, 2, seed=1) + 1)
    p = shares.precision.value
    assert shares.precision.stderr == pytest.approx((p * (1 - p) / 80) ** 0.5)
    p = shares.coverage.value
    assert shares.coverage.stderr == pytest.approx((p * (1 - p) / 50) ** 0.5)


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="pr: found 5 images, at least 6 are needed"):
        neighbourhoods(torch.zeros(9, 2), torch.zeros(5, 2))
