"""Predictions: every parametrisation from every other one."""

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.prediction import Kind, Prediction
from fewstep.diffusion.process import EDM, Flow, Process, expand


def truth(process: Process, t: Tensor) -> dict[Kind, Tensor]:
    """All five values of one known (x_0, ε), written out from their definitions; and x_t under no name."""
    x0, eps = torch.randn(2, len(t), 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    alpha, sigma = expand(process.alpha(t), x0), expand(process.sigma(t), x0)
    return {
        Kind.X0: x0,
        Kind.EPS: eps,
        Kind.V: alpha * eps - sigma * x0,
        Kind.VELOCITY: expand(process.d_alpha(t), x0) * x0 + expand(process.d_sigma(t), x0) * eps,
        Kind.SCORE: -eps / sigma,
    }


@pytest.mark.parametrize("given", list(Kind))
def test_conversions_in_float64(process: Process, inner_times: Tensor, given: Kind) -> None:
    values = truth(process, inner_times)
    x_t = process.add_noise(values[Kind.X0], values[Kind.EPS], inner_times)
    prediction = Prediction(process, x_t, inner_times, values[given], given)
    for wanted in Kind:
        error = (prediction.as_kind(wanted) - values[wanted]).abs() / slack(process, inner_times, values[wanted])
        assert error.max() < 1e-14


@pytest.mark.parametrize("given", list(Kind))
def test_conversions_in_float32(process: Process, inner_times: Tensor, given: Kind) -> None:
    values = {kind: value.float() for kind, value in truth(process, inner_times).items()}
    t = inner_times.float()
    x_t = process.add_noise(values[Kind.X0], values[Kind.EPS], t)
    prediction = Prediction(process, x_t, t, values[given], given)
    for wanted in Kind:
        error = (prediction.as_kind(wanted) - values[wanted]).abs() / slack(process, inner_times, values[wanted])
        assert error.max() < 4e-6


def slack(process: Process, t: Tensor, like: Tensor) -> Tensor:
    """What rounding may cost: x̂_0 from noise loses σ/α, ε̂ from data α/σ, the score is ε̂/σ, and v holds σ·x̂_0."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return expand((1 + sigma / alpha + alpha / sigma) * torch.maximum(sigma, 1 / sigma).clamp_min(1), like)


def test_v_converts_without_loss_at_every_noise_level(process: Process) -> None:
    t = process.at(torch.linspace(0.001, 0.999, 50))
    x0, eps = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0))
    value = expand(process.alpha(t), x0) * eps - expand(process.sigma(t), x0) * x0
    found = Prediction(process, process.add_noise(x0, eps, t), t, value, Kind.V)
    torch.testing.assert_close(found.x0, x0, rtol=0, atol=4e-6)
    torch.testing.assert_close(found.eps, eps, rtol=0, atol=4e-6)


def test_fake_minus_real_in_every_space(process: Process, inner_times: Tensor) -> None:
    alpha, sigma = process.alpha(inner_times), process.sigma(inner_times)
    rate = alpha * process.d_sigma(inner_times) - process.d_alpha(inner_times) * sigma
    x_t, fake_out, real_out = torch.randn(3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    fake = Prediction(process, x_t, inner_times, fake_out, Kind.V)
    real = Prediction(process, x_t, inner_times, real_out, Kind.V)
    factors = {
        Kind.X0: torch.ones_like(alpha),
        Kind.EPS: -sigma / alpha,
        Kind.V: -sigma / (alpha.square() + sigma.square()),
        Kind.VELOCITY: -sigma / rate,
        Kind.SCORE: sigma.square() / alpha,
    }
    for kind, factor in factors.items():
        gap = expand(factor, x_t) * (fake.as_kind(kind) - real.as_kind(kind))
        torch.testing.assert_close(gap, fake.x0 - real.x0, rtol=1e-11, atol=1e-11)


def test_edm_velocity_is_the_noise() -> None:
    x_t, x0, t = torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([4.0])
    prediction = Prediction.of_x0(EDM(), x_t, t, x0)
    assert prediction.velocity.item() == pytest.approx(0.5)
    assert prediction.eps.item() == pytest.approx(0.5)


def test_flow_at_pure_noise_needs_no_division_by_alpha() -> None:
    x_t, velocity = torch.tensor([[0.3]]), torch.tensor([[-0.2]])
    prediction = Prediction(Flow(), x_t, torch.ones(1), velocity, Kind.VELOCITY)
    assert prediction.x0.item() == pytest.approx(0.5)
    assert prediction.eps.item() == pytest.approx(0.3)


def test_low_precision_values_are_converted_in_float32() -> None:
    half = torch.full((1, 2), 0.7, dtype=torch.bfloat16)
    prediction = Prediction(Flow(), half, torch.tensor([0.301], dtype=torch.float64), half, Kind.VELOCITY)
    assert prediction.x0.dtype == torch.float32
    assert prediction.x0[0, 0].item() == pytest.approx(half[0, 0].item() * 0.699, rel=1e-6)


def test_detach_stops_the_gradient() -> None:
    value = torch.ones(1, 2, requires_grad=True)
    prediction = Prediction(Flow(), torch.zeros(1, 2), torch.tensor([0.5]), value, Kind.VELOCITY)
    assert prediction.x0.requires_grad
    assert not prediction.detach().x0.requires_grad
