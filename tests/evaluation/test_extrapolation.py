"""FD∞: a straight line in 1/N, and the bias that it takes away."""

from __future__ import annotations

import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluation.extrapolation import fd_infinity, least
from fewstep.evaluation.metrics import Moments, frechet_distance
from tests.evaluation.test_metrics import randn

WIDTH = 6
TRUTH = Moments(torch.zeros(WIDTH).double(), torch.eye(WIDTH).double(), 10**9)


def test_the_bias_of_the_count_is_taken_away():
    sets = [randn(400, WIDTH, seed=seed) for seed in range(20)]  # of the very law: the true distance is 0
    plain = torch.tensor([frechet_distance(TRUTH, Moments.of(fake)) for fake in sets])
    extrapolated = torch.tensor([fd_infinity(TRUTH, fake).value for fake in sets])
    # The mean adds D / N, the covariance about D (D + 1) / (4 N).
    bias = WIDTH / 400 + WIDTH * (WIDTH + 1) / 1600
    assert float(plain.mean()) == pytest.approx(bias, rel=0.15)
    assert float(extrapolated.mean()) == pytest.approx(0, abs=0.15 * bias)


def test_an_exact_line_is_recovered(monkeypatch):
    seen: list[int] = []

    def line(real: Moments, fake: Moments) -> float:
        seen.append(fake.count)
        return 3.0 + 50.0 / fake.count

    monkeypatch.setattr("fewstep.evaluation.extrapolation.frechet_distance", line)
    assert fd_infinity(TRUTH, randn(1000, WIDTH)).value == pytest.approx(3.0, rel=1e-9)
    assert (seen[0], seen[-1], len(seen)) == (100, 1000, 15)


def test_it_is_a_function_of_the_features():
    fake = randn(100, WIDTH)
    torch.manual_seed(1)
    first = fd_infinity(TRUTH, fake)
    torch.manual_seed(2)
    assert fd_infinity(TRUTH, fake) == first


def test_too_few_images_are_refused():
    assert least(WIDTH) == 24
    with pytest.raises(UserError, match=r"--fd-infinity: found 23 images, at least 24 are needed for 6 features"):
        fd_infinity(TRUTH, randn(23, WIDTH))
