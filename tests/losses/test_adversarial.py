from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.losses.adversarial import Adversarial, approximate_r1, discriminator_loss, generator_loss, r1
from fewstep.losses.score import distribution_matching
from tests.losses.closed_form import Student, gauss_hermite, gaussian, log_density

LN2 = math.log(2)
LOGITS = torch.tensor([[0.5, -1.5], [2.0, 0.0]])


@pytest.mark.parametrize(
    ("kind", "level", "discriminator", "generator"),
    [
        (Adversarial.NON_SATURATING, 0.0, 2 * LN2, LN2),
        (Adversarial.HINGE, 0.0, 2.0, 0.0),
        (Adversarial.HINGE_RELU, 0.0, 2.0, 1.0),
        (Adversarial.LSGAN, 0.5, 0.25, 0.125),
        (Adversarial.WGAN_CLAMPED, 0.0, 0.0, 0.0),
        (Adversarial.RELATIVISTIC, 0.0, LN2, LN2),
    ],
)
def test_chance_levels(kind: Adversarial, level: float, discriminator: float, generator: float) -> None:
    logits = torch.full((4, 3), level)
    assert discriminator_loss(kind, logits, logits).item() == pytest.approx(discriminator, rel=1e-6)
    assert generator_loss(kind, logits, logits).item() == pytest.approx(generator, rel=1e-6)


@pytest.mark.parametrize("kind", list(Adversarial))
def test_losses_fall_to_their_floor_when_the_game_is_won(kind: Adversarial) -> None:
    """No floor above chance: a bounded or clamped logit would leave the softplus losses far from zero."""
    win = 1.0 if kind is Adversarial.LSGAN else 40.0
    lose = 0.0 if kind is Adversarial.LSGAN else -40.0
    floor = -2.0 if kind is Adversarial.WGAN_CLAMPED else 0.0
    real, fake = torch.full((2, 2), win), torch.full((2, 2), lose)
    assert discriminator_loss(kind, real, fake).item() == pytest.approx(floor, abs=1e-6)
    assert generator_loss(kind, real, fake).item() <= 1e-6


@pytest.mark.parametrize(
    ("kind", "discriminator", "generator"),
    [
        (Adversarial.HINGE, (0.5 + 2.5 + 0 + 1) / 4 + (2 + 0 + 1.5 + 4) / 4, -0.625),
        (Adversarial.HINGE_RELU, (0.5 + 2.5 + 0 + 1) / 4 + (2 + 0 + 1.5 + 4) / 4, (0 + 3 + 0.5 + 0) / 4),
        (Adversarial.LSGAN, (0.25 + 6.25 + 1 + 1) / 8 + (1 + 4 + 0.25 + 9) / 8, (0 + 9 + 0.25 + 4) / 8),
        (Adversarial.WGAN_CLAMPED, (-0.5 + 1.5 - 1 + 0) / 4 + (1 - 1 + 0.5 + 3) / 4, -0.625),
    ],
)
def test_values_by_hand(kind: Adversarial, discriminator: float, generator: float) -> None:
    fake = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    assert discriminator_loss(kind, LOGITS, fake).item() == pytest.approx(discriminator)
    assert generator_loss(kind, fake).item() == pytest.approx(generator)


def test_relativistic_pairs_each_fake_with_its_real() -> None:
    fake = LOGITS + torch.tensor([[1.0], [-1.0]])
    expected = (math.log1p(math.e) + math.log1p(1 / math.e)) / 2
    assert discriminator_loss(Adversarial.RELATIVISTIC, LOGITS, fake).item() == pytest.approx(expected)
    assert discriminator_loss(Adversarial.RELATIVISTIC, LOGITS, LOGITS - 2).item() == pytest.approx(
        math.log1p(math.exp(-2))
    )
    assert generator_loss(Adversarial.RELATIVISTIC, LOGITS - 2, LOGITS).item() == pytest.approx(math.log1p(math.exp(2)))
    with pytest.raises(AssertionError, match="compares each fake"):
        generator_loss(Adversarial.RELATIVISTIC, fake)


def test_losses_of_bf16_logits_are_float32() -> None:
    logits = LOGITS.bfloat16()
    for kind in Adversarial:
        assert discriminator_loss(kind, logits, logits).dtype == torch.float32
        assert generator_loss(kind, logits, logits).dtype == torch.float32


# With the best possible discriminator, log p/q, frozen, the generator's gradient is a weighted score difference.


def non_saturating(fake: Tensor) -> Tensor:
    return generator_loss(Adversarial.NON_SATURATING, fake)


def saturating(fake: Tensor) -> Tensor:
    return -discriminator_loss(Adversarial.NON_SATURATING, torch.zeros_like(fake), fake)


def linear(fake: Tensor) -> Tensor:
    return generator_loss(Adversarial.HINGE, fake)


@pytest.mark.parametrize(
    ("loss", "h", "expected"),
    [
        (non_saturating, lambda r: 1 / (1 + r), (0.0941271, -0.0753932)),
        (saturating, lambda r: r / (1 + r), (0.1135652, -0.1084656)),
        (linear, torch.ones_like, (0.2076923, -0.1838588)),
    ],
    ids=["non-saturating", "saturating", "linear"],
)
def test_a_gan_is_a_weighted_score_difference(
    loss: Callable[[Tensor], Tensor], h: Callable[[Tensor], Tensor], expected: tuple[float, float]
) -> None:
    process, t = Flow(), 0.4
    student = Student.on(gauss_hermite(), process, t, a=[0.3], b=0.8)
    frozen = student.x_t.detach().requires_grad_()
    logits = log_density(process, frozen, student.t, 0.0, 1.0) - log_density(process, frozen, student.t, 0.3, 0.8)
    # The losses weigh samples equally, so the quadrature's weights come in at the gradient of x_t.
    (per_sample,) = torch.autograd.grad(loss(logits), frozen)
    gan_a, gan_b = student.gradients((per_sample * student.weight[:, None] * student.x_t).sum())
    assert (*gan_a, gan_b) == pytest.approx(expected, abs=1e-6)

    ratio = h(logits.detach().exp()[:, 0]) * student.weight
    fake, real = (gaussian(process, frozen.detach(), student.t, m, s) for m, s in ((0.3, 0.8), (0.0, 1.0)))
    dmd = distribution_matching(student.x_hat, fake, real, weight="none", ratio=ratio) * (0.6 / 0.4) ** 2
    dmd_a, dmd_b = student.gradients(dmd)
    assert (*gan_a, gan_b) == pytest.approx((*dmd_a, dmd_b), abs=1e-12)


@pytest.mark.parametrize("kind", [Adversarial.NON_SATURATING, Adversarial.RELATIVISTIC])
def test_the_optimal_slope_between_two_noised_gaussians(kind: Adversarial) -> None:
    """D(x) = w·x + c, trained on N(α·m_r, τ²) against N(α·m_f, τ²), must find w = α·(m_r − m_f)/τ²."""
    alpha, tau2, means = 0.5, 0.5**2 * 0.7**2 + 0.5**2, (1.0, -0.5)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 200_000, 1, generator=generator)
    real, fake = (alpha * m + math.sqrt(tau2) * n for m, n in zip(means, noise, strict=True))
    parameters = torch.zeros(2, requires_grad=True)  # w and c; the relativistic loss does not see c
    optimizer = torch.optim.LBFGS([parameters], max_iter=15)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = discriminator_loss(kind, *(parameters[0] * x + parameters[1] for x in (real, fake)))
        value.backward()
        return value

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    assert parameters[0].item() == pytest.approx(alpha * (means[0] - means[1]) / tau2, rel=0.01)
    if kind is Adversarial.NON_SATURATING:
        bias = -(alpha**2) * (means[0] ** 2 - means[1] ** 2) / (2 * tau2)
        assert parameters[1].item() == pytest.approx(bias, abs=0.02)


@pytest.mark.parametrize("kind", list(Adversarial))
def test_the_generator_is_drawn_towards_the_real_mean(kind: Adversarial) -> None:
    """D rises towards the real samples, so descending on the generator's loss moves the fakes towards them."""
    mean_real, fake = 2.0, torch.zeros(4, 1, requires_grad=True)
    loss = generator_loss(kind, 0.3 * fake, 0.3 * torch.full((4, 1), mean_real))
    (gradient,) = torch.autograd.grad(loss, fake)
    assert (gradient * (mean_real - fake.detach()) < 0).all()


# Penalties.


def linear_logits(x: Tensor, weight: Tensor) -> Tensor:
    return x.flatten(1) @ weight


def three_point_nodes(dim: int) -> Tensor:
    """Equally weighted points with the moments of a unit Gaussian up to order five: 0 four times, ±√3 once each."""
    axis = torch.tensor([-math.sqrt(3), 0, 0, 0, 0, math.sqrt(3)], dtype=torch.float64)
    return torch.cartesian_prod(*[axis] * dim)


def test_r1_of_a_linear_discriminator() -> None:
    weight = torch.tensor([[1.0, 3.0], [2.0, 0.0], [-2.0, 4.0]])  # squared norms 9 and 25
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert r1(linear_logits(x, weight), x).item() == pytest.approx(0.5 * (9 + 25) / 2)


def test_r1_can_be_descended() -> None:
    weight = torch.tensor([[1.0], [2.0]], requires_grad=True)
    x = torch.ones(3, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(r1(linear_logits(x, weight), x), weight)
    torch.testing.assert_close(gradient, weight.detach())


def test_approximate_r1_is_twice_r1_for_a_linear_discriminator_at_any_std() -> None:
    weight = torch.tensor([[1.0, 3.0], [2.0, 0.0]], dtype=torch.float64)
    noise = three_point_nodes(2)
    x = torch.full_like(noise, 0.7).requires_grad_()
    logits = linear_logits(x, weight)
    for std in (1e-3, 0.1, 3.0):
        penalty = approximate_r1(lambda y: linear_logits(y, weight), x, logits, std, noise)
        assert penalty.item() == pytest.approx(2 * r1(logits, x).item(), rel=1e-9)
        assert penalty.item() == pytest.approx((5 + 9) / 2, rel=1e-9)


@pytest.mark.parametrize("std", [0.01, 0.1, 0.5])
def test_approximate_r1_of_a_quadratic_discriminator_has_the_known_bias(std: float) -> None:
    hessian = torch.tensor([[2.0, -1.0], [-1.0, 0.5]], dtype=torch.float64)
    point, noise = torch.tensor([0.4, -0.3], dtype=torch.float64), three_point_nodes(2)

    def discriminator(x: Tensor) -> Tensor:
        return 0.5 * ((x @ hessian) * x).sum(1, keepdim=True)

    x = point.expand_as(noise)
    penalty = approximate_r1(discriminator, x, discriminator(x), std, noise)
    gradient = hessian @ point
    bias = std**2 * (hessian.trace() ** 2 + 2 * hessian.square().sum()) / 4
    assert penalty.item() == pytest.approx((gradient.square().sum() + bias).item(), rel=1e-9)


def test_approximate_r1_vanishes_with_std_only_if_the_noised_input_is_perturbed() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps, noise = torch.randn(3, 64, 4, generator=generator, dtype=torch.float64)
    x_t, weight = 0.6 * x0 + 0.4 * eps, torch.ones(4, 1, dtype=torch.float64)

    def discriminator(x: Tensor) -> Tensor:
        return softplus(linear_logits(x, weight))

    def difference(x: Tensor, std: float) -> float:
        return std**2 * approximate_r1(discriminator, x, discriminator(x_t), std, noise).item()

    assert difference(x_t, 1e-2) < 1e-3
    assert difference(x_t, 1e-6) < 1e-11
    assert difference(x0, 1e-6) > 0.1  # the clean sample perturbed, its re-noising left out


def test_approximate_r1_needs_a_positive_std() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(UserError, match=r"std: 0.0 given, it must be positive"):
        approximate_r1(lambda y: y, x, x, 0.0, x)
