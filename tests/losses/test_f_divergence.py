"""Weights of f-divergences against their definition, and against the divergences of two Gaussians."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.losses.f_divergence import Divergence, density_ratio, divergence_weight, unit_mean
from fewstep.losses.score import distribution_matching
from tests.losses.closed_form import Student, gauss_hermite, gaussian, log_density

GENERATORS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    Divergence.REVERSE_KL: lambda r: -r.log(),
    Divergence.SOFTENED_RKL: lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    Divergence.JS: lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    Divergence.SQUARED_HELLINGER: lambda r: (1 - r.sqrt()).square(),
    Divergence.FORWARD_KL: lambda r: r * r.log(),
    Divergence.JEFFREYS: lambda r: (r - 1) * r.log(),
}


def test_every_divergence_has_its_generator_here():
    assert set(GENERATORS) == set(Divergence)
    one = torch.ones(1, dtype=torch.float64)
    assert [float(f(one)) for f in GENERATORS.values()] == [0.0] * 6


@pytest.mark.parametrize("kind", Divergence)
def test_the_weight_is_the_second_derivative_times_the_squared_ratio(kind):
    ratio = torch.logspace(-3, 3, 25, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(GENERATORS[kind](ratio).sum(), ratio, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), ratio)
    torch.testing.assert_close(divergence_weight(kind, ratio.detach()), second * ratio.detach() ** 2, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Divergence.REVERSE_KL, (1, 1, 1)),
        (Divergence.SOFTENED_RKL, (0.8, 0.5, 0.2)),
        (Divergence.JS, (0.2, 0.5, 0.8)),
        (Divergence.SQUARED_HELLINGER, (0.25, 0.5, 1)),
        (Divergence.FORWARD_KL, (0.25, 1, 4)),
        (Divergence.JEFFREYS, (1.25, 2, 5)),
    ],
)
def test_weights_by_hand(kind, expected):
    assert divergence_weight(kind, torch.tensor([0.25, 1.0, 4.0])).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Divergence.REVERSE_KL, -0.18386), (Divergence.FORWARD_KL, -0.24489), (Divergence.JS, -0.10211)],
)
def test_the_weighted_direction_is_the_divergence_s_gradient(kind, expected):
    """At t = 0.4 of flow matching, student N(0, b²), b = 0.8, teacher N(0, 1): dD_f/db, in closed form and here."""
    t, b = 0.4, 0.8
    student = Student.on(gauss_hermite(), Flow(), t, a=[0.0], b=b)
    x_t = student.x_t.detach()
    logits = log_density(Flow(), x_t, student.t, 0.0, 1.0) - log_density(Flow(), x_t, student.t, 0.0, b)
    ratio = density_ratio(logits, 1e-30, 1e30)
    torch.testing.assert_close(ratio, logits[:, 0].exp())
    fake, real = (gaussian(Flow(), x_t, student.t, 0.0, std) for std in (b, 1.0))
    weight = divergence_weight(kind, ratio) * student.weight
    loss = distribution_matching(student.x_hat, fake, real, weight="none", ratio=weight) * (0.6 / 0.4) ** 2
    gradient = student.gradients(loss)[1]
    assert gradient == pytest.approx(expected, abs=2e-5)
    vq, vp, alpha = 0.36 * b**2 + 0.16, 0.36 + 0.16, 0.6
    closed = {"reverse_kl": alpha**2 * b * (vq - vp) / (vq * vp), "forward_kl": alpha**2 * b * (vq - vp) / vq**2}
    if kind in closed:
        assert gradient == pytest.approx(closed[kind], abs=1e-9)


def test_a_trained_discriminator_s_logit_is_the_log_ratio():
    """D(x) = w·x + c between N(1, 1) and N(−1, 1), trained by the log-likelihood loss: ln(p/q) = 2x."""
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 200_000, 1, generator=generator, dtype=torch.float64) + torch.tensor(
        [[[1.0]], [[-1.0]]]
    )
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=30)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = sum(softplus(sign * (parameters[0] * x + parameters[1])).mean() for sign, x in ((-1, real), (1, fake)))
        assert isinstance(value, Tensor)
        value.backward()
        return value

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    x = torch.tensor([[-1.0], [0.0], [0.5]], dtype=torch.float64)
    ratio = density_ratio(parameters[0] * x + parameters[1])
    assert ratio.tolist() == pytest.approx([math.exp(-2), 1.0, math.e], rel=0.03)


def test_the_ratio_is_a_mean_over_heads_within_its_bounds():
    logits = torch.tensor([[1.0, 3.0], [-50.0, -60.0], [99.0, 99.0]], dtype=torch.bfloat16)
    ratio = density_ratio(logits.requires_grad_())
    assert ratio.tolist() == pytest.approx([math.exp(2), 0.1, 20.0])
    assert (ratio.dtype, ratio.requires_grad) == (torch.float32, False)
    with pytest.raises(UserError, match=r"ratio bounds: \(0.0, 2.0\) given"):
        density_ratio(logits, 0.0, 2.0)


def test_values_of_mean_one():
    values = torch.tensor([1.0, 3.0, 10.0, 30.0])
    assert unit_mean(values).tolist() == pytest.approx([1 / 11, 3 / 11, 10 / 11, 30 / 11])
    assert unit_mean(torch.ones(7)).tolist() == [1.0] * 7, "exactly: reverse KL is DMD"
    binned = unit_mean(values, torch.tensor([0, 0, 2, 2]), 4)
    assert binned.tolist() == pytest.approx([0.5, 1.5, 0.5, 1.5])
