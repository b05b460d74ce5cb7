"""Closed-form teachers against quadrature, autograd and their own definitions."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.gaussian import GaussianMixture, five_modes
from fewstep.diffusion.process import EDM, Flow, Process, expand
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition

NONE = Condition.none()


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def two_modes(labels: Tensor | None = None) -> GaussianMixture:
    return GaussianMixture(tensor(0.3, 0.7), tensor(-1, 1)[:, None], tensor(0.2, 0.3), labels)


def three_in_space() -> GaussianMixture:
    means = torch.randn(3, 4, generator=seed(7), dtype=torch.float64)
    return GaussianMixture(tensor(1, 2, 3), means, tensor(0.5, 0.7, 0.9), torch.tensor([0, 1, 1]))


def test_gaussian_denoiser(process: Process, inner_times: Tensor) -> None:
    mu, s = tensor(1.5, -0.5), 0.4
    x = torch.randn(7, 2, generator=seed(), dtype=torch.float64) * expand(process.sigma(inner_times), torch.ones(7, 2))
    alpha, sigma = expand(process.alpha(inner_times), x), expand(process.sigma(inner_times), x)
    total = (alpha * s).square() + sigma.square()
    found = GaussianMixture.gaussian(mu, s).denoiser(process)(x, inner_times, NONE)
    for value, wanted in (
        (found.x0, mu + alpha * s**2 / total * (x - alpha * mu)),
        (found.eps, sigma * (x - alpha * mu) / total),
        (found.score, (alpha * mu - x) / total),
    ):
        torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-11)


def test_gaussian_velocity_of_flow_matching() -> None:
    mu, s, t, x = 1.5, 0.4, tensor(0.2, 0.6, 1.0), tensor(0.1, -1.0, 2.0)[:, None]
    found = GaussianMixture.gaussian(mu, s).denoiser(Flow())(x, t, NONE).velocity
    slope = ((t - (1 - t) * s**2) / ((1 - t).square() * s**2 + t.square()))[:, None]
    torch.testing.assert_close(found, -mu + slope * (x - (1 - t)[:, None] * mu), rtol=1e-13, atol=1e-13)


def test_mixture_denoiser_against_quadrature(process: Process, inner_times: Tensor) -> None:
    mixture, clean = two_modes(), torch.linspace(-4, 4, 40_001, dtype=torch.float64)
    density = mixture.log_density(clean[:, None], torch.zeros(40_001, dtype=torch.float64), Flow())
    t = inner_times[2:]
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    x = alpha * 0.4 + 1.3 * sigma
    posterior = (density - 0.5 * ((x - alpha * clean) / sigma).square()).softmax(1)
    found = mixture.denoiser(process)(x, t, NONE)
    torch.testing.assert_close(found.x0[:, 0], posterior @ clean, rtol=1e-10, atol=1e-10)


def test_mixture_score_is_the_gradient_of_the_log_density(process: Process, inner_times: Tensor) -> None:
    mixture = three_in_space()
    condition = Condition.of_labels(torch.tensor([0, 1, 2, 0, 1, 2, 2]))
    clean = mixture.sample(7, seed(1), dtype=torch.float64)
    noise = torch.randn(7, 4, generator=seed(2), dtype=torch.float64)
    x = process.add_noise(clean, noise, inner_times).requires_grad_()
    (wanted,) = torch.autograd.grad(mixture.log_density(x, inner_times, process, condition).sum(), x)
    found = mixture.denoiser(process)(x, inner_times, condition).score
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_log_density_integrates_to_one() -> None:
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    density = two_modes().log_density(grid[:, None], torch.full((20_001,), 0.3, dtype=torch.float64), EDM()).exp()
    assert float(density.sum()) * 16 / 20_000 == pytest.approx(1, abs=1e-10)


def test_labels_select_their_components(process: Process, inner_times: Tensor) -> None:
    mixture, x = three_in_space(), torch.randn(7, 4, generator=seed(), dtype=torch.float64)
    exact = mixture.denoiser(process)
    whole = exact(x, inner_times, NONE).x0
    null = exact.null
    assert null is not None
    torch.testing.assert_close(exact(x, inner_times, null.expand(7)).x0, whole, rtol=0, atol=0)
    for label in (0, 1):
        found = exact(x, inner_times, Condition.of_labels(torch.full((7,), label))).x0
        wanted = mixture.of_class(label).denoiser(process)(x, inner_times, NONE).x0
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        assert (found - whole).abs().max() > 0.1


def test_labels_of_a_mixture_without_classes_are_refused() -> None:
    exact = two_modes().denoiser(Flow())
    assert exact.null is None
    with pytest.raises(UserError, match="no classes"):
        exact(torch.zeros(1, 1), torch.ones(1), Condition.of_labels(torch.zeros(1, dtype=torch.int64)))


def test_float32_denoiser_is_as_good_as_float32_allows(process: Process) -> None:
    mixture, t = five_modes(labelled=False), process.at(torch.linspace(0.01, 1, 64, dtype=torch.float64))
    clean, noise = mixture.sample(64, seed(), dtype=torch.float64), torch.randn(64, 2, generator=seed(1)).double()
    exact, x = mixture.denoiser(process), process.add_noise(clean, noise, t)
    rough, fine = exact(x.float(), t.float(), NONE), exact(x, t, NONE)
    assert rough.x0.dtype == rough.eps.dtype == torch.float32
    torch.testing.assert_close(rough.x0.double(), fine.x0, rtol=0, atol=1e-4)
    torch.testing.assert_close(rough.eps.double(), fine.eps, rtol=0, atol=2e-4)


def test_denoiser_far_from_every_mode_stays_finite() -> None:
    x = torch.tensor([[1e4, -1e4]])
    found = five_modes(labelled=False).denoiser(EDM())(x, torch.tensor([0.002]), NONE)
    assert bool(found.x0.isfinite().all())
    assert bool(found.eps.isfinite().all())


def test_clean_time_needs_no_division_by_sigma() -> None:
    x = tensor(-0.9, 0.8)[:, None]
    found = two_modes().denoiser(Flow())(x, tensor(0, 0), NONE)
    torch.testing.assert_close(found.x0, x)
    assert bool(found.velocity.isfinite().all())


def test_samples_have_the_moments_of_the_mixture() -> None:
    mixture = three_in_space()
    x = mixture.sample(200_000, seed(), dtype=torch.float64)
    torch.testing.assert_close(x.mean(0), mixture.mean, rtol=0, atol=0.01)
    assert float((x - x.mean(0)).square().mean().sqrt()) == pytest.approx(mixture.std, abs=5e-3)


def test_samples_follow_their_labels_and_the_weights() -> None:
    mixture = three_in_space()
    labels = mixture.sample_labels(60_000, seed(3))
    assert float((labels == 0).double().mean()) == pytest.approx(1 / 6, abs=5e-3)
    x = mixture.sample(60_000, seed(), labels, torch.float64)
    torch.testing.assert_close(x[labels == 0].mean(0), mixture.means[0], rtol=0, atol=0.02)
    torch.testing.assert_close(x[labels == 1].mean(0), mixture.of_class(1).mean, rtol=0, atol=0.02)


def test_the_same_seed_gives_the_same_samples() -> None:
    mixture = five_modes(labelled=True)
    assert torch.equal(mixture.sample(8, seed(4)), mixture.sample(8, seed(4)))
    assert mixture.sample(8, seed(4)).dtype == torch.float32


def test_transform_covers_the_edges_of_the_unit_interval() -> None:
    mixture, noise = two_modes(torch.tensor([0, 1])), torch.zeros(4, 1)
    u = torch.tensor([0.0, 0.2999, 0.3001, 1 - 2.0**-24])
    assert mixture.transform(u, noise).flatten().tolist() == [-1, -1, 1, 1]
    assert mixture.transform(u, noise, torch.tensor([0, 1, 0, 2])).flatten().tolist() == [-1, 1, -1, 1]


def test_flow_map_of_two_modes_meets_the_known_table() -> None:
    z = tensor(-2, -1, -0.5244005127, 0, 1, 2)[:, None]
    found = two_modes().flow_map(z, torch.ones(6), torch.zeros(6), Flow())
    wanted = tensor(-1.2867332, -0.9855237, -0.2241715, 0.8302154, 1.2249771, 1.5535767)
    torch.testing.assert_close(found[:, 0], wanted, rtol=0, atol=6e-8)


def test_flow_map_agrees_with_runge_kutta(process: Process) -> None:
    exact, x = two_modes().denoiser(process), process.prior(tensor(-1.5, -0.4, 0.1, 1.2)[:, None])
    fractions = torch.linspace(0.97, 0.1, 201, dtype=torch.float64).tolist()
    times = [process.at(torch.full((4,), f, dtype=torch.float64)) for f in fractions]
    end = x
    for t, s in pairwise(times):
        end = runge_kutta(lambda x, t: exact(x, t, NONE).velocity, end, t, s)
    wanted = two_modes().flow_map(x, times[0], times[-1], process)
    # VP's velocity has a kink at each index of its table, which costs Runge-Kutta its order
    torch.testing.assert_close(end, wanted, rtol=0, atol=1e-4 if process.t_max == 999 else 1e-6)


def runge_kutta(velocity, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    h = (s - t)[:, None]
    k1 = velocity(x, t)
    k2 = velocity(x + h / 2 * k1, (t + s) / 2)
    k3 = velocity(x + h / 2 * k2, (t + s) / 2)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(x + h * k3, s))


def test_flow_map_of_a_gaussian_in_space(process: Process, inner_times: Tensor) -> None:
    mu, s = tensor(1.5, -0.5, 2.0), 0.4
    x, t, r = torch.randn(6, 3, generator=seed(), dtype=torch.float64), inner_times[1:], inner_times[:-1]
    gain = ((process.alpha(r) * s).square() + process.sigma(r).square()).sqrt()
    gain = gain / ((process.alpha(t) * s).square() + process.sigma(t).square()).sqrt()
    wanted = process.alpha(r)[:, None] * mu + gain[:, None] * (x - process.alpha(t)[:, None] * mu)
    found = GaussianMixture.gaussian(mu, s).flow_map(x, t, r, process)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_flow_map_of_one_component_equals_quantile_matching(process: Process, inner_times: Tensor) -> None:
    one = GaussianMixture.gaussian(1.5, 0.4)
    twice = GaussianMixture(tensor(1, 3), tensor(1.5, 1.5)[:, None], tensor(0.4, 0.4))
    x = torch.randn(6, 1, generator=seed(), dtype=torch.float64) * expand(
        process.sigma(inner_times[1:]), torch.ones(6, 1)
    )
    closed = one.flow_map(x, inner_times[1:], inner_times[:-1], process)
    matched = twice.flow_map(x, inner_times[1:], inner_times[:-1], process)
    torch.testing.assert_close(matched, closed, rtol=1e-12, atol=1e-12)


def test_flow_map_keeps_its_digits_in_both_tails() -> None:
    x = tensor(-30, 30)[:, None]
    there = two_modes().flow_map(x, tensor(1, 1), tensor(0, 0), Flow())
    back = two_modes().flow_map(there, tensor(0, 0), tensor(1, 1), Flow())
    torch.testing.assert_close(back, x, rtol=1e-12, atol=0)


def test_flow_map_composes_and_has_the_velocity_as_its_rate() -> None:
    mixture, x, process = two_modes(), tensor(-1.0, 0.3, 1.1)[:, None], Flow()
    t, r, s = tensor(0.9, 0.9, 0.9), tensor(0.5, 0.5, 0.5), tensor(0.1, 0.1, 0.1)
    direct = mixture.flow_map(x, t, s, process)
    torch.testing.assert_close(mixture.flow_map(mixture.flow_map(x, t, r, process), r, s, process), direct)
    h = 1e-5
    rate = (mixture.flow_map(x, t, t + h, process) - mixture.flow_map(x, t, t - h, process)) / (2 * h)
    torch.testing.assert_close(rate, mixture.denoiser(process)(x, t, NONE).velocity, rtol=1e-8, atol=1e-8)


def test_flow_map_of_several_modes_in_space_is_refused() -> None:
    with pytest.raises(UserError, match="flow map"):
        five_modes(labelled=False).flow_map(torch.zeros(1, 2), torch.ones(1), torch.zeros(1), Flow())


def test_five_modes() -> None:
    plain, classes = five_modes(labelled=False), five_modes(labelled=True)
    assert plain.n_classes is None
    assert classes.n_classes == 5
    assert plain.dim == 2
    torch.testing.assert_close(plain.mean, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-15)
    assert plain.std == pytest.approx(math.sqrt(0.5 + 0.15**2))
    torch.testing.assert_close(classes.of_class(2).mean, classes.means[2])


@pytest.mark.parametrize(
    ("weights", "means", "stds", "labels", "message"),
    [
        ([], [], [], None, "weights"),
        ([1, 0], [[0], [1]], [1, 1], None, "weights: .* positive"),
        ([1, math.nan], [[0], [1]], [1, 1], None, "weights"),
        ([1, 1], [[0]], [1, 1], None, r"means: shape \(1, 1\) given, \(2, D\)"),
        ([1], [[math.inf]], [1], None, "means"),
        ([1], [[0] * 17], [1], None, "17 dimensions given, 1 to 16 allowed"),
        ([1, 1], [[0], [1]], [1], None, r"stds: shape \(1,\) given, \(2,\)"),
        ([1, 1], [[0], [1]], [1, -1], None, "stds: .* positive"),
        ([1, 1], [[0], [1]], [1, 1], [0], "labels: .* 2 whole numbers"),
        ([1, 1], [[0], [1]], [1, 1], [0, 2], r"labels: classes \[0, 2\]"),
    ],
)
def test_what_is_no_mixture_is_refused(weights, means, stds, labels, message) -> None:
    made = (torch.tensor(weights), torch.tensor(means), torch.tensor(stds))
    with pytest.raises(UserError, match=message) as caught:
        GaussianMixture(*made, None if labels is None else torch.tensor(labels))
    assert "\n" not in str(caught.value)
