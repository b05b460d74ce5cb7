"""Tangents and average velocities against closed forms: zero on exact maps, and what each sign and factor is for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.derivative import along
from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.process import Flow, TrigFlow, expand
from fewstep.diffusion.view import viewed
from fewstep.losses.tangent import LevelWeight, adaptive, average_velocity, bounded, consistency_tangent
from fewstep.losses.tangent import weighted_by_level as weighted
from fewstep.models.conditioning import Condition
from tests.training.runs import vector_denoiser

MEAN, STD = 1.5, 0.4
DATA = GaussianMixture.gaussian(torch.tensor([MEAN, MEAN]), STD)
NONE, LABELS = Condition.none(), Condition.of_labels(torch.arange(64) % 5)


def points(process: TrigFlow | Flow) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    t = process.t_max * (0.05 + 0.9 * torch.rand(64, generator=generator, dtype=torch.float64))
    return torch.randn(64, 2, generator=generator, dtype=torch.float64), t


def exact_map(process: TrigFlow | Flow, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """X_{t→r}(x) of N(1.5, .4²), whose marginals are normal."""

    def std(t: Tensor) -> Tensor:
        return expand((process.alpha(t).square() * STD**2 + process.sigma(t).square()).sqrt(), x)

    def mean(t: Tensor) -> Tensor:
        return expand(process.alpha(t), x) * MEAN

    return mean(r) + std(r) / std(t) * (x - mean(t))


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_the_tangent_of_the_exact_map_is_zero(sigma_data):
    trig = TrigFlow(sigma_data)
    x, t = points(trig)
    slope, unit = DATA.denoiser(trig)(x, t, NONE).velocity, torch.cos(t) * torch.sin(t)

    def value(x: Tensor, t: Tensor) -> Tensor:
        """σ_d·F of f = cos t·x − sin t·σ_d·F."""
        return (expand(t.cos(), x) * x - exact_map(trig, x, t, torch.zeros_like(t))) / expand(t.sin(), x)

    here = along(value, (x, t), (unit[:, None] * slope, unit))
    assert float(consistency_tangent(x, t, here.value, slope, here.slope).abs().max()) < 1e-12
    assert float(consistency_tangent(x, t, here.value, -slope, here.slope).abs().max()) > 0.5, "the teacher's sign"
    assert float(consistency_tangent(x, t, here.value, slope, -here.slope).abs().max()) > 0.1, "the derivative's sign"


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_the_tangent_is_the_cosine_times_the_derivative_of_f(sigma_data):
    trig = TrigFlow(sigma_data)
    student = vector_denoiser()
    student.network.double()
    seen = viewed(student, trig)
    x, t = points(trig)
    slope, unit = torch.randn(64, 2, dtype=torch.float64), torch.cos(t) * torch.sin(t)
    f = along(lambda x, t: seen(x, t, LABELS).x0, (x, t), (slope, torch.ones_like(t)))
    here = along(lambda x, t: seen(x, t, LABELS).velocity, (x, t), (unit[:, None] * slope, unit))
    tangent = consistency_tangent(x, t, here.value, slope, here.slope)
    torch.testing.assert_close(tangent, expand(t.cos(), x) * f.slope, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(here.value, (expand(t.cos(), x) * x - f.value) / expand(t.sin(), x))
    cold = consistency_tangent(x, t, here.value, slope, here.slope, ramp=0.0)
    torch.testing.assert_close(cold, expand(t.cos().square(), x) * (slope - here.value))


def test_discrete_consistency_tends_to_the_tangent():
    """∇½|f_t − sg f_(t−h)|²/(h·tan t) has the gradient of −⟨F, g⟩, up to an error of order h."""
    trig, student = TrigFlow(0.5), vector_denoiser()
    network = student.network.double().requires_grad_(True)
    seen = viewed(student, trig)
    x, t = points(trig)
    unit, teacher = torch.cos(t) * torch.sin(t), DATA.denoiser(trig)(x, t, NONE).velocity
    here = along(lambda x, t: seen(x, t, LABELS).velocity, (x, t), (unit[:, None] * teacher, unit))
    tangent = consistency_tangent(x, t, here.value, teacher, here.slope)

    def gradient(loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True)
        return torch.cat([part.flatten() for part in parts if part is not None])

    wanted = gradient(0.5 * (seen(x, t, LABELS).velocity - here.value - tangent).square().sum())
    gaps = []
    for h in (1e-2, 1e-3, 1e-4):
        with torch.no_grad():
            target = seen(x - h * teacher, t - h, LABELS).x0
        squared = (seen(x, t, LABELS).x0 - target).square() / (2 * h * expand(t.tan(), x))
        gaps.append(float((gradient(squared.sum()) - wanted).norm() / wanted.norm()))
    assert gaps[0] < 0.1
    assert [gaps[1] / gaps[0], gaps[2] / gaps[1]] == pytest.approx([0.1, 0.1], rel=0.1)


def test_bounded_keeps_directions_and_small_tangents():
    g = torch.tensor([[3.0, 4.0], [3e-4, 4e-4]])
    rms = torch.tensor([[12.5**0.5], [12.5**0.5 * 1e-4]])
    torch.testing.assert_close(bounded(g, 0.1), g / (rms + 0.1))
    assert float(bounded(1e6 * g, 0.1).square().mean(1).max()) == pytest.approx(1.0)


def test_a_learned_weight_levels_the_errors():
    """w = −ln error is where its gradient vanishes, at every level by itself."""
    prediction, target = torch.zeros(2, 4), torch.tensor([[0.1] * 4, [2.0] * 4])
    w = torch.tensor([-2 * math.log(0.1), -2 * math.log(2.0)], requires_grad=True)
    loss = weighted(prediction, target, w)
    (slope,) = torch.autograd.grad(loss.sum(), w)
    assert slope.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert loss.tolist() == pytest.approx([1 + 2 * math.log(0.1), 1 + 2 * math.log(2.0)])
    assert weighted(prediction, target, torch.zeros(2)).tolist() == pytest.approx([0.01, 4.0])


def test_the_level_weight_can_be_any_smooth_function_of_the_angle():
    weight, t = LevelWeight(), torch.linspace(0, torch.pi / 2, 200)
    assert float(weight(t).detach().abs().max()) == 0.0
    waves = (t[:, None] * weight.waves).cos()
    wanted = (3 * t).sin()
    fitted = waves @ torch.linalg.lstsq(waves, wanted[:, None]).solution
    assert float((fitted[:, 0] - wanted).square().mean().sqrt()) < 0.02


def test_the_exact_average_velocity_is_its_own_target():
    x, t = points(Flow())
    r = t * torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    v = DATA.denoiser(Flow())(x, t, NONE).velocity

    def u(x: Tensor, t: Tensor) -> Tensor:
        return (x - exact_map(Flow(), x, t, r)) / expand(t - r, x)

    here = along(u, (x, t), (v, torch.ones_like(t)))
    assert float((average_velocity(v, here.slope, t - r) - here.value).abs().max()) < 1e-12
    assert float((average_velocity(v, here.slope, r - t) - here.value).abs().max()) > 1.0, "the span's sign"


def test_to_the_clean_end_the_average_velocity_is_continuous_consistency():
    """On flow matching f = x − t·u(x, t, 0): the gradient of ⟨f, df/dt⟩ is that of ½|u − target|² times t."""
    student = vector_denoiser()
    network = student.network.double().requires_grad_(True)
    x, t = points(Flow())
    v = DATA.denoiser(Flow())(x, t, NONE).velocity
    f = along(lambda x, t: student(x, t, LABELS).x0, (x, t), (v, torch.ones_like(t)))
    u = along(lambda x, t: student(x, t, LABELS).velocity, (x, t), (v, torch.ones_like(t)))
    target = average_velocity(v, u.slope, t)

    def gradient(loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True)
        return torch.cat([part.flatten() for part in parts if part is not None])

    one = gradient((student(x, t, LABELS).x0 * f.slope).sum())
    squared = 0.5 * (student(x, t, LABELS).velocity - target).square()
    other, unweighted = gradient((expand(t, x) * squared).sum()), gradient(squared.sum())
    assert float((one - other).norm() / one.norm()) < 1e-12
    assert float((one - unweighted).norm() / one.norm()) > 0.1


@pytest.mark.parametrize(("power", "expected"), [(0.0, 1.0), (0.5, 0.04), (1.0, 0.04**2)])
def test_the_adaptive_weight_divides_by_a_power_of_the_error(power, expected):
    """Errors e of 0.04 and 25: the gradient of e·sg(e + c)^−p grows as e^(½ − p)."""
    prediction = torch.tensor([[0.2], [5.0]], requires_grad=True)
    loss = adaptive(prediction, torch.zeros(2, 1), power, c=0.0)
    (slope,) = torch.autograd.grad(loss.sum(), prediction)
    assert float(slope[1] / slope[0]) == pytest.approx(25 * expected)
    assert adaptive(prediction, torch.zeros(2, 1), 1.0, c=0.01).tolist() == pytest.approx([0.8, 25 / 25.01])
