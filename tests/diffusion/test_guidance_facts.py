"""What guidance does to Gaussians, in closed form: processes, predictions and solvers together."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.prediction import Kind, Prediction
from fewstep.diffusion.process import EDM, VP, Flow, Process, TrigFlow
from fewstep.diffusion.solvers import Denoiser, Sampler, SamplerKind, jump, sample
from fewstep.models.conditioning import Condition

NONE = Condition.none()
CONDITIONAL, NULL, STD = 1.0, -0.5, 0.7
MODE = 1.5  # of the symmetric pair that a student can lose one of
ENDS = torch.tensor([[0.0], [1.0]], dtype=torch.float64)  # an affine map's image of 0 and 1 says its mean and slope


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def times(value: float) -> Tensor:
    return torch.full((2,), value, dtype=torch.float64)


@dataclass(frozen=True)
class Guided:
    """Linear guidance between two Gaussians, in the space `kind`, where low < σ/α <= high."""

    process: Process
    scale: float
    conditional_std: float = STD
    null_std: float = STD
    kind: Kind = Kind.X0
    low: float = 0.0
    high: float = math.inf

    def pair(self, x_t: Tensor, t: Tensor) -> tuple[Prediction, Prediction]:
        conditional = GaussianMixture.gaussian(CONDITIONAL, self.conditional_std)
        null = GaussianMixture.gaussian(NULL, self.null_std)
        return conditional.denoiser(self.process)(x_t, t, NONE), null.denoiser(self.process)(x_t, t, NONE)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        conditional, null = self.pair(x_t, t)
        ratio = self.process.ratio(t)
        scale = torch.where((self.low < ratio) & (ratio <= self.high), self.scale, 1.0)[:, None]
        base = null.as_kind(self.kind)
        return Prediction(self.process, x_t, t, base + scale * (conditional.as_kind(self.kind) - base), self.kind)


def mean_and_std(teacher: Denoiser, times: tuple[float, ...], kind: SamplerKind) -> tuple[float, float]:
    found = sample(teacher, Sampler(times, kind), ENDS, NONE).flatten()
    return float(found[0]), float(found[1] - found[0])


def test_guidance_is_the_same_in_every_parametrisation(process: Process, inner_times: Tensor) -> None:
    x = torch.randn(7, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = Guided(process, 7.5, 0.5, 0.9)(x, inner_times, NONE)
    for kind in Kind:
        found = Guided(process, 7.5, 0.5, 0.9, kind)(x, inner_times, NONE)
        torch.testing.assert_close(found.x0, wanted.x0, rtol=1e-9, atol=1e-9)


def test_guided_gaussians_of_equal_width_are_a_gaussian(process: Process, inner_times: Tensor) -> None:
    x = torch.randn(7, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shifted = GaussianMixture.gaussian(NULL + 7.5 * (CONDITIONAL - NULL), STD)
    found = Guided(process, 7.5)(x, inner_times, NONE).x0
    torch.testing.assert_close(found, shifted.denoiser(process)(x, inner_times, NONE).x0, rtol=1e-12, atol=1e-12)


def test_k1_many_guided_steps() -> None:
    mean, std = mean_and_std(Guided(Flow(), 7.5), Flow().step_list(400), "ddim")
    assert mean == pytest.approx(10.75, abs=1e-9)
    assert std == pytest.approx(0.697, abs=1e-3)


def test_k2_few_guided_steps_keep_the_mean() -> None:
    for steps, wanted in ((1, 0), (2, 0.329), (4, 0.497), (8, 0.592)):
        mean, std = mean_and_std(Guided(Flow(), 7.5), Flow().step_list(steps), "ddim")
        assert mean == pytest.approx(10.75, abs=1e-12)
        assert std == pytest.approx(wanted, abs=5e-4)


def test_k3_guided_gaussians_of_unequal_width() -> None:
    scale, narrow, wide = 2.0, 0.5, 0.9
    grid = EDM(t_max=2000.0, t_min=1e-3).step_list(240)
    mean, slope = mean_and_std(Guided(EDM(), scale, narrow, wide), grid, "heun")
    assert slope == pytest.approx(narrow**scale * wide ** (1 - scale), rel=2e-3)
    assert mean == pytest.approx(quadrature_mean(scale, narrow, wide), abs=2e-3)
    assert mean == pytest.approx(1.664, abs=2e-3)
    product = (scale * CONDITIONAL / narrow**2 + (1 - scale) * NULL / wide**2) / (
        scale / narrow**2 + (1 - scale) / wide**2
    )
    assert product == pytest.approx(1.274, abs=1e-3)  # where the tempered product of the densities would lie


def quadrature_mean(scale: float, narrow: float, wide: float) -> float:
    """Φ(0)·∫ κ·Σ w_i·m_i/(s_i² + κ²)/Φ dκ with Φ = Π (s_i² + κ²)^(w_i/2) and weights (s, 1−s)."""
    kappa = torch.linspace(-12, 10, 200_001, dtype=torch.float64).exp()
    weights, widths, means = tensor(scale, 1 - scale), tensor(narrow, wide).square(), tensor(CONDITIONAL, NULL)
    spread = widths + kappa.square()[:, None]
    phi = (weights / 2 * spread.log()).sum(1).exp()
    integrand = kappa * (weights * means / spread).sum(1) / phi
    phi_at_zero = float((weights / 2 * widths.log()).sum().exp())
    return phi_at_zero * float(torch.trapezoid(integrand, kappa))


def test_k4_guidance_in_an_interval() -> None:
    low, high, scale = 0.19, 1.61, 3.0
    fraction = STD * ((STD**2 + low**2) ** -0.5 - (STD**2 + high**2) ** -0.5)
    assert fraction == pytest.approx(0.56636, abs=5e-6)
    # the edges are grid points: a step that starts on the upper one is guided, one that starts on the lower is not
    parts = ((800.0, high, 40), (high, low, 300), (low, 1e-3, 40))
    grid = tuple(a * (b / a) ** (i / n) for a, b, n in parts for i in range(n))
    guided, _ = mean_and_std(Guided(EDM(), scale, low=low, high=high), grid, "ddim")
    plain, _ = mean_and_std(Guided(EDM(), 1.0), grid, "ddim")
    assert guided - plain == pytest.approx((scale - 1) * (CONDITIONAL - NULL) * fraction, abs=4e-3)


def test_k5_guiding_the_clean_part_only_is_a_step_dependent_scale(process: Process, inner_times: Tensor) -> None:
    """CFG++ (Chung et al. 2024): x̂_0 guided by λ, ε̂ unguided, equals guidance λ·κ_t/(κ_t − κ_s)."""
    strength, t, s = 0.6, inner_times[1:], inner_times[:-1]
    x = torch.randn(6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    conditional, null = Guided(process, 1.0).pair(x, t)
    clean = null.x0 + strength * (conditional.x0 - null.x0)
    plus_plus = process.alpha(s)[:, None] * clean + process.sigma(s)[:, None] * null.eps
    kappa_t, kappa_s = process.ratio(t), process.ratio(s)
    scale = (strength * kappa_t / (kappa_t - kappa_s))[:, None]
    guided = Prediction.of_x0(process, x, t, null.x0 + scale * (conditional.x0 - null.x0))
    torch.testing.assert_close(jump(guided, s), plus_plus, rtol=1e-11, atol=1e-11)


def test_k5_in_flow_time() -> None:
    t, s = 0.8, 0.3
    kappa_t, kappa_s = t / (1 - t), s / (1 - s)
    assert kappa_t / (kappa_t - kappa_s) == pytest.approx(t * (1 - s) / (t - s))


def test_k6_guiding_the_clean_part_only_grows_with_the_number_of_steps() -> None:
    process, means = TrigFlow(1.0), []
    for steps in (5, 20, 100):
        grid = [i / steps * math.pi / 2 for i in range(steps, 0, -1)]
        x = torch.zeros(2, 1, dtype=torch.float64)
        for t, s in zip(grid, [*grid[1:], 0.0], strict=True):
            conditional, null = Guided(process, 1.0).pair(x, times(t))
            clean = null.x0 + 0.6 * (conditional.x0 - null.x0)
            x = math.cos(s) * clean + math.sin(s) * null.eps
        means.append(float(x[0, 0]))
    assert means == pytest.approx([0.95, 3.94, 19.9], rel=0.02)


def test_k7_the_best_discriminator_of_noised_gaussians_is_linear() -> None:
    """Its logit, log p_real − log p_fake at t, has slope α(m_r − m_f)/τ² and bias −α²(m_r² − m_f²)/(2τ²)."""
    x, t = tensor(-1.0, 2.0)[:, None].requires_grad_(), times(0.5)
    real, fake = (GaussianMixture.gaussian(m, STD).log_density(x, t, Flow()) for m in (CONDITIONAL, NULL))
    (slope,) = torch.autograd.grad((real - fake).sum(), x)
    variance = 0.25 * STD**2 + 0.25
    assert slope.flatten().tolist() == pytest.approx([2.0134, 2.0134], abs=5e-5)
    assert float((real - fake).detach()[0]) == pytest.approx(-2.0134228 - 0.25 * 0.75 / (2 * variance), abs=1e-6)


def test_k7_logistic_regression_finds_it() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    is_real = torch.arange(400_000) % 2 == 0
    x = 0.5 * (torch.where(is_real, CONDITIONAL, NULL) + STD * clean) + 0.5 * noise
    features = torch.stack([x, torch.ones_like(x)], 1)
    weights = torch.zeros(2, dtype=torch.float64)
    for _ in range(8):  # Newton's steps
        guess = torch.sigmoid(features @ weights)
        curvature = features.T @ (features * (guess * (1 - guess))[:, None])
        weights = weights + torch.linalg.solve(curvature, features.T @ (is_real.double() - guess))
    assert float(weights[0]) == pytest.approx(2.0134, rel=0.015)


def test_k8_end_to_end_and_greedy_gradients() -> None:
    data, t, x = GaussianMixture.gaussian(CONDITIONAL, STD), times(0.9), tensor(0.2, 1.3)[:, None].requires_grad_()
    (through,) = torch.autograd.grad(data.flow_map(x, t, times(0.0), Flow()).sum(), x)
    (greedy,) = torch.autograd.grad(data.denoiser(Flow())(x, t, NONE).x0.sum(), x)
    assert through.flatten().tolist() == pytest.approx([0.7754, 0.7754], abs=5e-5)
    assert greedy.flatten().tolist() == pytest.approx([0.0601, 0.0601], abs=5e-5)
    assert float(through[0] / greedy[0]) == pytest.approx(12.9, abs=0.05)
    steps = sample(data.denoiser(Flow()), Sampler(tuple(torch.linspace(0.9, 0.001, 300).tolist()), "ddim"), x, NONE)
    (numeric,) = torch.autograd.grad(steps.sum(), x)
    assert numeric.flatten().tolist() == pytest.approx([0.775, 0.775], abs=3e-3)


def test_k1_on_vp_lacks_what_its_first_index_keeps_of_the_mean(vp: VP) -> None:
    mean, std = mean_and_std(Guided(vp, 7.5), vp.step_list(200), "dpmpp")
    first = float(vp.alpha(torch.tensor(999.0)))
    spread = math.sqrt((first * STD) ** 2 + 1 - first**2)
    assert mean == pytest.approx(10.75 * (1 - STD * first / spread), abs=5e-3)
    assert std == pytest.approx(STD / spread, abs=5e-3)


@dataclass(frozen=True)
class OneSided:
    """A student that maps pure noise to the mode +M alone and is exact from `handover` on."""

    data: GaussianMixture
    process: Process
    exact_first: bool

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        lost = float(t[0]) == 1.0 and not self.exact_first
        x0 = torch.full_like(x_t, MODE) if lost else self.data.flow_map(x_t, t, torch.zeros_like(t), self.process)
        return Prediction(self.process, x_t, t, x0, Kind.X0)


@pytest.mark.parametrize(("handover", "share"), [(0.9, 0.566), (0.75, 0.691), (0.5, 0.933)])
def test_a_mode_lost_in_the_first_step_comes_back_as_far_as_the_fresh_noise_reaches(
    handover: float, share: float
) -> None:
    """After re-noising, mode +m keeps the share Φ((1 − t)·m/t); with the teacher's first step instead it is a half."""
    data = GaussianMixture(tensor(0.5, 0.5), tensor(-MODE, MODE)[:, None], tensor(0.3, 0.3))
    count = 20_000
    noise = torch.randn(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = {}
    for exact_first in (False, True):
        student = OneSided(data, Flow(), exact_first)
        made = sample(student, Sampler((1.0, handover), "renoise"), noise, NONE, torch.Generator().manual_seed(1))
        found[exact_first] = float((made > 0).double().mean())
    exact = 0.5 * (1 + math.erf((1 - handover) * MODE / handover / math.sqrt(2)))
    assert exact == pytest.approx(share, abs=5e-4)
    assert found[False] == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / count))
    assert found[True] == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / count))
