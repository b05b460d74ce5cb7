"""Residuals of flow maps: zero on an exact map, learning where they should, right through layer norms."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.losses.flow_map import Average, Velocity, eulerian, lagrangian, mean_square, progressive
from fewstep.models.conditioning import Condition
from fewstep.models.graft import GraftedEmbedding
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.models.two_time import TwoTime, two_time
from tests import tiny

KINDS = ["lsd", "esd", "psd"]
DATA = GaussianMixture.gaussian(1.5, 0.4)
T = torch.tensor([1.0, 0.9, 0.5, 0.3], dtype=torch.float64)
R = torch.tensor([0.0, 0.2, 0.49, 0.1], dtype=torch.float64)
SHARE = torch.tensor([0.5, 0.1, 0.7, 0.999], dtype=torch.float64)
X = torch.tensor([-2.0, 0.3, 1.0, 1.8], dtype=torch.float64)[:, None]


def exact_average(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return (x - DATA.flow_map(x, t, r, Flow())) / (t - r)[:, None]


def exact_velocity(x: Tensor, t: Tensor) -> Tensor:
    return DATA.denoiser(Flow())(x, t, Condition.none()).velocity


def residual(kind: str, average: Average, velocity: Velocity) -> Tensor:
    match kind:
        case "lsd":
            return lagrangian(average, velocity, X, T, R)
        case "esd":
            return eulerian(average, velocity, X, T, R)
    return progressive(average, X, T, R, SHARE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_map_has_no_residual(kind):
    assert float(residual(kind, exact_average, exact_velocity).abs().max()) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_others_have_one(kind):
    """The ODE's own velocity for every span; the exact one of the way back; times the other way round."""
    wrong: list[Average] = [
        lambda x, t, r: exact_velocity(x, t),
        lambda x, t, r: -exact_average(x, t, r),
        lambda x, t, r: exact_average(x, r, t),
    ]
    for average in wrong:
        assert float(residual(kind, average, exact_velocity).abs().max()) > 0.05


def test_the_long_jump_alone_learns_by_halves():
    """u = a·t·x: the target of h = ½ is the mean of both halves, as shortcut models have it, and gets no gradient."""
    a = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    half = torch.full_like(T, 0.5)
    found = progressive(lambda x, t, r: a * t[:, None] * x, X, T, R, half)
    q = (T + R) / 2
    first = 0.6 * T[:, None] * X
    second = 0.6 * q[:, None] * (X + (q - T)[:, None] * first)
    torch.testing.assert_close(found, 0.6 * T[:, None] * X - (first + second) / 2)
    (gradient,) = torch.autograd.grad(found.sum(), a)
    torch.testing.assert_close(gradient, (T[:, None] * X).sum())


def test_the_slope_at_the_end_alone_learns_of_the_lagrangian():
    """u = a·(t − r)·x: ∂_r X = −2a·(t − r)·(r − t)... by hand; v is asked at X, which gets no gradient."""
    a = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    gap = (T - R)[:, None]
    found = lagrangian(lambda x, t, r: a * (t - r)[:, None] * x, lambda x, t: x * t[:, None], X, T, R)
    end = X - 0.6 * gap**2 * X
    torch.testing.assert_close(found, 2 * 0.6 * gap * X - R[:, None] * end)
    (gradient,) = torch.autograd.grad(found.sum(), a)
    torch.testing.assert_close(gradient, (2 * gap * X).sum())


def test_the_slope_at_the_start_alone_learns_of_the_eulerian():
    """u = a·(t − r)·x: ∂_t X = −2a·(t − r)·x, and ∇X·v = (1 − a·(t − r)²)·v gets no gradient."""
    a = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    gap = (T - R)[:, None]
    found = eulerian(lambda x, t, r: a * (t - r)[:, None] * x, lambda x, t: x * t[:, None], X, T, R)
    torch.testing.assert_close(found, -2 * 0.6 * gap * X + (1 - 0.6 * gap**2) * X * T[:, None])
    (gradient,) = torch.autograd.grad(found.sum(), a)
    torch.testing.assert_close(gradient, (-2 * gap * X).sum())


def test_the_eulerian_is_the_identity_of_mean_flows():
    """Its value is v − (t − r)·du/dt − u along the ODE (MeanFlow, arXiv 2505.13447)."""

    def average(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return (x * t[:, None]).sin() + r[:, None] ** 2 * x.cos()

    def total(h: Tensor) -> Tensor:
        return average(X + h * exact_velocity(X, T), T + h, R)

    h = torch.zeros((), dtype=torch.float64)
    slope = torch.func.jvp(total, (h,), (torch.ones_like(h),))[1]
    wanted = exact_velocity(X, T) - (T - R)[:, None] * slope - average(X, T, R)
    torch.testing.assert_close(eulerian(average, exact_velocity, X, T, R), wanted, rtol=0, atol=1e-12)


def transformer() -> TwoTime:
    """A two-time SD3 in float64 whose span is heard; its layer norms have no weights, its attention a softmax."""
    student = two_time(make_denoiser(tiny.alive(tiny.sd3(), 0.2), Schedule(Flow(), Kind.VELOCITY)))
    student.network.double().requires_grad_(True)
    for one in student.network.modules():
        if isinstance(one, GraftedEmbedding):
            tiny.alive(one.second, 0.3)
    return TwoTime.of(student)


def loss(network: TwoTime, kind: str) -> Tensor:
    """With v = 0, so that everything that is left has a gradient, and finite differences see the same."""
    words = {k: v.double() for k, v in tiny.inputs(network.denoiser.network).items()}  # pyright: ignore[reportAttributeAccessIssue]
    x, _ = words.pop("hidden_states"), words.pop("timestep")
    times = torch.tensor([0.9, 0.5], dtype=torch.float64), torch.tensor([0.2, 0.1], dtype=torch.float64)

    def average(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return network.velocity(x, t, r, Condition(words))

    of_kind = {"lsd": lagrangian, "esd": eulerian}[kind]
    return mean_square(of_kind(average, lambda x, t: torch.zeros_like(x), x, *times)).mean()


def error(kind: str) -> float:
    """Of the gradient, along one direction of all weights, relative to finite differences of the loss."""
    network, generator, step = transformer(), torch.Generator().manual_seed(5), 1e-5
    weights = list(network.denoiser.network.parameters())  # pyright: ignore[reportAttributeAccessIssue]
    turned = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
    gradients = torch.autograd.grad(loss(network, kind), weights, allow_unused=True)
    found = sum(float((g * d).sum()) for g, d in zip(gradients, turned, strict=True) if g is not None)
    values = []
    with torch.no_grad():
        for change in (step, -2 * step):
            for weight, d in zip(weights, turned, strict=True):
                weight += change * d
            values.append(float(loss(network, kind)))
    wanted = (values[0] - values[1]) / (2 * step)
    return abs(found - wanted) / abs(wanted)


@pytest.mark.parametrize("kind", ["lsd", "esd"])
def test_gradients_through_layer_norms_are_those_of_the_loss(kind, monkeypatch):
    assert error(kind) < 1e-4
    monkeypatch.setattr("fewstep.losses.flow_map.arithmetic_layer_norm", nullcontext)
    assert error(kind) > 1e-2, "PyTorch has mended its fused kernel"
