"""Distances between sets: against other people's code on the same features, and against closed forms."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance as cleanfid_frechet_distance
from cleanfid.fid import kernel_distance as cleanfid_kernel_distance
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from fewstep.errors import UserError
from fewstep.evaluation.metrics import Moments, accuracy, energy_distance, frechet_distance, kid, mmd


class Given(nn.Module):
    """Hands features through where an image network is expected."""

    num_features = 24

    def forward(self, features: Tensor) -> Tensor:
        return features


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def features() -> tuple[Tensor, Tensor]:
    """Correlated features of two different laws, 300 and 300 samples, means far from zero as of real networks."""
    real = randn(300, 24) @ randn(24, 24, seed=1) * 0.3 + 2
    fake = randn(300, 24, seed=2) @ randn(24, 24, seed=3) * 0.3 + 2.2
    return real, fake


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")  # theirs, harmless below SciPy 1.18
def test_frechet_distance_equals_clean_fid(features):
    real, fake = (one.numpy() for one in features)
    theirs = cleanfid_frechet_distance(
        real.mean(0), np.cov(real, rowvar=False), fake.mean(0), np.cov(fake, rowvar=False)
    )
    ours = frechet_distance(Moments.of(features[0]), Moments.of(features[1]))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_frechet_distance_equals_torchmetrics(features):
    metric = FrechetInceptionDistance(feature=Given())
    metric.update(features[0], real=True)
    metric.update(features[1], real=False)
    ours = frechet_distance(Moments.of(features[0]), Moments.of(features[1]))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-6)


def test_frechet_distance_of_gaussians_with_a_common_basis():
    basis = torch.linalg.qr(randn(5, 5)).Q
    first, second = torch.tensor([1.0, 2, 3, 0, 4]).double(), torch.tensor([2.0, 2, 0, 1, 9]).double()
    shift = torch.tensor([1.0, 0, 0, 2, 0]).double()
    real = Moments(torch.zeros(5).double(), basis * first.square() @ basis.T, 9)
    fake = Moments(shift, basis * second.square() @ basis.T, 9)
    # |m|² + sum (s1 - s2)², with singular covariances on both sides
    assert frechet_distance(real, fake) == pytest.approx(5 + 1 + 0 + 9 + 1 + 25, rel=1e-6)


def test_frechet_distance_of_fewer_samples_than_features():
    real, fake = randn(20, 64), randn(30, 64, seed=1) + 1
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (real, fake))
    cross = torch.linalg.svdvals(a @ b.T).sum()  # the trace of the root is the nuclear norm of the centred product
    expected = (real.mean(0) - fake.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    assert frechet_distance(Moments.of(real), Moments.of(fake)) == pytest.approx(expected.item(), rel=1e-6)


def test_moments_of_float32_features_far_from_zero_keep_their_digits():
    x = (randn(500, 3) * 1e-2 + 1000).float()
    assert torch.allclose(Moments.of(x).covariance, torch.from_numpy(np.cov(x.double().numpy(), rowvar=False)))
    assert Moments.of(x).mean.dtype == torch.float64


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")
def test_kid_equals_torchmetrics_over_the_whole_set(features):
    metric = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=300)
    metric.update(features[0], real=True)
    metric.update(features[1], real=False)
    assert kid(*features).value == pytest.approx(metric.compute()[0].item(), rel=1e-6)


def test_kid_equals_clean_fid_over_the_whole_set(features):
    theirs = cleanfid_kernel_distance(*(one.numpy() for one in features), num_subsets=1, max_subset_size=300)
    assert kid(*features).value == pytest.approx(theirs, rel=1e-6)


def test_mmd_equals_all_pairs():
    real, fake = randn(9, 5) + 1, randn(7, 5, seed=1)

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((-(a / a.norm() - b / b.norm()).square().sum() / (2 * 10**2)).exp())

    def mean(x: Tensor, y: Tensor, same: bool) -> float:
        values = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(y) if not (same and i == j)]
        return sum(values) / len(values)

    wanted = 1000 * (mean(real, real, True) + mean(fake, fake, True) - 2 * mean(real, fake, False))
    score = mmd(real, fake)
    assert score.value == pytest.approx(wanted, rel=1e-6)
    assert score.stderr is not None
    # The published code pairs each sample with itself as well; the difference is what the docstring says.
    theirs = 1000 * (mean(real, real, False) + mean(fake, fake, False) - 2 * mean(real, fake, False))
    own = 1000 * ((1 - mean(real, real, True)) / 9 + (1 - mean(fake, fake, True)) / 7)
    assert theirs - score.value == pytest.approx(own, rel=1e-6)


def test_mmd_of_equal_laws_is_zero_within_its_error():
    scores = [mmd(randn(60, 8, seed=2 * s), randn(60, 8, seed=2 * s + 1)) for s in range(50)]
    values = torch.tensor([score.value for score in scores])
    assert values.mean().abs() < 3 * values.std() / 50**0.5
    assert 1.0 < torch.tensor([score.stderr for score in scores]).mean() / values.std() < 1.8


def test_kid_of_different_counts_with_its_jackknife_error():
    real, fake = randn(7, 3), randn(5, 3, seed=1) + 0.5
    value, variance = brute_kid(real, fake), 0.0
    for changed, others in ((0, 7), (1, 5)):
        left_out = []
        for i in range(others):
            sets = [real, fake]
            sets[changed] = torch.cat([sets[changed][:i], sets[changed][i + 1 :]])
            left_out.append(brute_kid(*sets))
        variance += (others - 1) * float(np.var(left_out))
    score = kid(real, fake)
    assert score.value == pytest.approx(value, abs=1e-12)
    assert score.stderr == pytest.approx(variance**0.5, rel=1e-9)


def brute_kid(real: Tensor, fake: Tensor) -> float:
    def mean(x: Tensor, y: Tensor, same: bool) -> float:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not (same and i == j)]
        return sum((float(x[i] @ y[j]) / x.shape[1] + 1) ** 3 for i, j in pairs) / len(pairs)

    return mean(real, real, True) + mean(fake, fake, True) - 2 * mean(real, fake, False)


@pytest.mark.parametrize(("shift", "low", "high"), [(0.0, 1.0, 1.8), (1.0, 0.75, 1.3)])
def test_kid_has_the_error_that_it_states(shift, low, high):
    scores = [kid(randn(60, 8, seed=2 * s), randn(60, 8, seed=2 * s + 1) + shift) for s in range(100)]
    values = torch.tensor([score.value for score in scores])
    errors = torch.tensor([score.stderr for score in scores])
    # Where the laws agree, the jackknife is too large by the square root of 2.
    assert low < errors.mean() / values.std() < high
    if not shift:
        assert values.mean().abs() < 3 * values.std() / 10


def test_kid_in_chunks_equals_kid_at_once(monkeypatch, features):
    at_once = kid(*features)
    monkeypatch.setattr("fewstep.evaluation.metrics._ROWS", 7)
    assert kid(*features).value == pytest.approx(at_once.value, rel=1e-10)
    assert kid(*features).stderr == pytest.approx(at_once.stderr, rel=1e-8)


def test_accuracy_with_its_error():
    score = accuracy(torch.eye(4).repeat(5, 1), torch.tensor([0, 1, 2, 0] * 5))
    assert score.value == 0.75
    assert score.stderr == pytest.approx((0.75 * 0.25 / 20) ** 0.5)


def test_energy_distance_equals_all_pairs(monkeypatch):
    monkeypatch.setattr("fewstep.evaluation.metrics._ROWS", 4)
    x, y = randn(9, 3), randn(6, 3, seed=1) + 1

    def mean(a: Tensor, b: Tensor) -> float:
        return sum(float((p - q).norm()) for p in a for q in b) / (len(a) * len(b))

    assert energy_distance(x, y) == pytest.approx(2 * mean(x, y) - mean(x, x) - mean(y, y), abs=1e-12)


def test_energy_distance_of_equal_sets_is_zero():
    x = randn(1500, 5) * 100
    assert energy_distance(x, x.clone()) == 0
    assert abs(energy_distance(x, x.flip(0))) < 1e-10


def test_energy_distance_of_two_points():
    assert energy_distance(torch.zeros(1, 4), torch.full((1, 4), 1.5)) == 6.0


def test_energy_distance_of_shifted_normals():
    # E|X - Y| of N(0, 1) and N(2, 1) from the folded normal; E|X - X'| = 2 / sqrt(pi)
    phi, erf = torch.distributions.Normal(0.0, 1.0), torch.erf(torch.tensor(1.0)).item()
    mean = 2**0.5 * (2 * phi.log_prob(torch.tensor(2**0.5)).exp().item()) + 2 * erf
    expected = 2 * mean - 4 / torch.pi**0.5
    assert energy_distance(randn(2000, 1), randn(2000, 1, seed=1) + 2) == pytest.approx(expected, rel=0.05)


@pytest.mark.slow  # not for its length: a crowded machine would fail it
def test_energy_distance_of_two_times_4096_samples_is_quick():
    x, y = randn(4096, 16), randn(4096, 16, seed=1)
    start = time.process_time()
    energy_distance(x, y)
    assert time.process_time() - start < 1  # half a second on an idle core


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Moments.of(torch.zeros(1, 3)), "Fréchet distance: found samples of shape (1, 3), at least 2 rows"),
        (lambda: kid(torch.zeros(9, 3), torch.zeros(2, 3)), "kernel distance: found samples of shape (2, 3)"),
        (lambda: energy_distance(torch.zeros(0, 3), torch.zeros(2, 3)), "at least 1 rows are needed"),
        (lambda: energy_distance(torch.zeros(2, 3), torch.zeros(2, 4)), "found 3 and 4 dimensions"),
        (lambda: accuracy(torch.zeros(3, 4), torch.zeros(2).long()), "found 2 labels for 3 images"),
        (lambda: accuracy(torch.zeros(2, 4), torch.tensor([0, 4])), "found labels 0 to 4, allowed are 0 to 3"),
    ],
)
def test_unfit_samples_are_refused(call, said):
    with pytest.raises(UserError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
