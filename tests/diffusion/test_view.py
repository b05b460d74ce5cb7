"""A denoiser of one process seen on another: the same velocity field, exactly, and gradients that reach the network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import VP, Flow, Process, TrigFlow, transfer
from fewstep.diffusion.view import View, viewed
from fewstep.models.conditioning import Condition
from fewstep.models.guidance import Guided
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from tests import tiny

NONE = Condition.none()
DATA = GaussianMixture.gaussian(1.5, 0.4)
TARGETS: list[Process] = [Flow(), TrigFlow(1.0), TrigFlow(0.5)]


def inside(process: Process) -> Tensor:
    """Times at which a VP table of 1000 entries has an equal signal-to-noise ratio."""
    return process.at(torch.tensor([0.06, 0.2503, 0.5, 0.7017, 0.9], dtype=torch.float64))


def samples(t: Tensor, process: Process) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x0 = DATA.sample(len(t), generator, dtype=torch.float64)
    return process.add_noise(x0, torch.randn(x0.shape, generator=generator, dtype=torch.float64), t)


@pytest.mark.parametrize("target", TARGETS)
def test_a_view_of_the_exact_denoiser_is_that_of_the_other_process(vp: VP, target: Process):
    t = inside(target)
    x = samples(t, target)
    seen, wanted = viewed(DATA.denoiser(vp), target)(x, t, NONE), DATA.denoiser(target)(x, t, NONE)
    assert seen.process == target
    for name in ("x0", "eps", "velocity"):
        torch.testing.assert_close(getattr(seen, name), getattr(wanted, name), rtol=0, atol=1e-10)


def test_the_velocity_on_flow_by_hand(vp: VP):
    """v = −m + (t − (1−t)·s²)/((1−t)²s² + t²)·(x − (1−t)·m) for N(m, s²)."""
    t = inside(Flow())
    x, m, s = samples(t, Flow()), 1.5, 0.4
    a = ((t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2))[:, None]
    found = viewed(DATA.denoiser(vp), Flow())(x, t, NONE).velocity
    torch.testing.assert_close(found, -m + a * (x - (1 - t)[:, None] * m), rtol=0, atol=1e-10)


@pytest.mark.parametrize("target", TARGETS)
def test_there_and_back(vp: VP, target: Process):
    t = torch.tensor([20.25, 300.5, 700.75], dtype=torch.float64)
    x, exact = samples(t, vp), DATA.denoiser(vp)
    found = viewed(viewed(exact, target), vp)(x, t, NONE)
    torch.testing.assert_close(found.x0, exact(x, t, NONE).x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.velocity, exact(x, t, NONE).velocity, rtol=0, atol=1e-10)


def test_states_on_flow_are_divided_by_the_sum_of_the_scales(vp: VP):
    """t_F = σ/(α + σ) and x_F = x/(α + σ)."""
    t = torch.tensor([20.25, 300.5, 998.75], dtype=torch.float64)
    x, both = samples(t, vp), vp.alpha(t) + vp.sigma(t)
    state = transfer(x, t, vp, Flow())
    torch.testing.assert_close(state.t, vp.sigma(t) / both, rtol=1e-12, atol=0)
    torch.testing.assert_close(state.x, x / both[:, None], rtol=1e-12, atol=0)


def test_one_s_own_process_needs_no_view(vp: VP):
    exact = DATA.denoiser(Flow(3.0))
    assert viewed(exact, Flow()) is exact
    assert isinstance(viewed(DATA.denoiser(vp), Flow()), View)


def test_guidance_is_the_same_in_a_view(vp: VP):
    """A guided teacher seen on Flow is the guidance of the two views."""
    mixture = GaussianMixture(torch.ones(2), torch.tensor([[-1.0], [2.0]]), torch.tensor([0.4, 0.4]), torch.arange(2))
    t = inside(Flow())
    x, labels = samples(t, Flow()), Condition.of_labels(torch.tensor([0, 1, 0, 1, 0]))
    exact = mixture.denoiser(vp)
    found = viewed(Guided(exact, exact.null, 2.5), Flow())(x, t, labels).velocity
    wanted = Guided(mixture.denoiser(Flow()), exact.null, 2.5)(x, t, labels).velocity
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("target", [Flow(), TrigFlow(1.0)])
def test_gradients_reach_the_network_its_input_and_its_time(vp: VP, target: Process):
    """And the last two are the derivatives of the view itself."""
    denoiser = make_denoiser(tiny.alive(tiny.unet2d()), Schedule(vp, Kind.V))
    denoiser.network.requires_grad_(True)
    view, generator = viewed(denoiser, target), torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 3, 8, 8, generator=generator).requires_grad_(), inside(target).float()[1:3].requires_grad_()
    view(x, t, NONE).velocity.square().mean().backward()
    assert all(p.grad is not None for p in denoiser.network.parameters())
    assert x.grad is not None
    assert t.grad is not None
    assert bool(x.grad.any())
    assert bool(t.grad.all())


@pytest.mark.parametrize("target", TARGETS)
def test_the_time_derivative_of_a_view(vp: VP, target: Process):
    """Forward mode through the change of process, for the exact denoiser, against a central difference."""
    t = inside(target)
    x, view, step = samples(t, target), viewed(DATA.denoiser(vp), target), 1e-6

    def function(t: Tensor) -> Tensor:
        return view(x, t, NONE).velocity

    slope = torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(slope, (function(t + step) - function(t - step)) / (2 * step), rtol=1e-6, atol=1e-6)


def test_the_noise_end_of_a_view_is_the_network_s_own(vp: VP):
    """Flow's t = 1 is beyond a VP table: the network sees the sample as it starts its own sampling."""
    heard = []

    class Listening:
        process = vp

        def __call__(self, x_t: Tensor, t: Tensor, condition: Condition):
            heard.append((x_t, t))
            return DATA.denoiser(vp)(x_t, t, condition)

    x = torch.randn(3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = viewed(Listening(), Flow())(x, torch.ones(3, dtype=torch.float64), NONE)
    assert bool(found.velocity.isfinite().all())
    assert heard[0][1].tolist() == [999.0] * 3
    torch.testing.assert_close(heard[0][0], x * vp.sigma(heard[0][1])[:, None])
