from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.prediction import Kind, Prediction
from fewstep.diffusion.process import EDM, VP, Flow, Process
from fewstep.errors import UserError
from fewstep.losses.score import (
    distribution_matching,
    dmd_weight,
    score_direction,
    sid,
    surrogate,
    uniform,
    vsd_weight,
)
from tests.losses.closed_form import Student, exact_for_quadratics, gauss_hermite, gaussian, log_density

MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("process", "t", "a_expected", "b_expected"),
    [
        (Flow(), 0.4, (-0.2707, 0.4997, 0.3123), -0.6197),
        (EDM(), 1.7, (-0.8203, 1.5144, 0.9465), -0.4648),
    ],
    ids=["flow", "edm"],
)
def test_the_gradient_is_that_of_the_closed_form(
    process: Process, t: float, a_expected: tuple[float, ...], b_expected: float
) -> None:
    student = Student.on(exact_for_quadratics(), process, t, a=[-0.3, 0.4, 2.0], b=0.6)
    fake = gaussian(process, student.x_t, student.t, student.a.detach(), 0.6)
    real = gaussian(process, student.x_t, student.t, MEAN, 1.3)
    # The surrogate is a mean over everything; the closed form sums over the three dimensions.
    a, b = student.gradients(3 * distribution_matching(student.x_hat, fake, real, weight="none"))
    assert a == pytest.approx(a_expected, abs=6e-5)
    assert b == pytest.approx(b_expected, abs=6e-5)


@pytest.mark.parametrize("kind", list(Kind))
def test_fake_minus_real_is_of_clean_samples_whatever_the_networks_predict(kind: Kind) -> None:
    generator = torch.Generator().manual_seed(0)
    process = VP(torch.linspace(0.99, 0.05, 10))
    t = torch.tensor([2.0, 6.5], dtype=torch.float64)
    x_t, fake, real = torch.randn(3, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    as_kind = [
        Prediction(process, x_t, t, Prediction.of_x0(process, x_t, t, x0).as_kind(kind).requires_grad_(), kind)
        for x0 in (fake, real)
    ]
    direction = score_direction(*as_kind)
    torch.testing.assert_close(direction, fake - real, rtol=0, atol=1e-12)
    assert not direction.requires_grad


@pytest.mark.parametrize("form", ["rkl", "kl", "js"])
def test_ratio_weights_turn_the_reverse_kl_into_other_divergences(form: str) -> None:
    process, b, std = Flow(), 0.8, 1.0
    student = Student.on(gauss_hermite(), process, 0.4, a=[0.0], b=b)
    x_t, t = student.x_t.detach(), student.t
    r = (log_density(process, x_t, t, 0.0, std) - log_density(process, x_t, t, 0.0, b)).exp()[:, 0]
    h = {"rkl": torch.ones_like(r), "kl": r, "js": r / (1 + r)}[form]
    fake, real = gaussian(process, x_t, t, 0.0, b), gaussian(process, x_t, t, 0.0, std)
    loss = distribution_matching(student.x_hat, fake, real, weight="none", ratio=h * student.weight)
    _, gradient = student.gradients(loss)
    # In x_0 space the direction is σ²/α times the score difference; the divergence's derivative has α times it.
    assert gradient * 0.6**2 / 0.4**2 == pytest.approx(
        {"rkl": -0.18386, "kl": -0.24489, "js": -0.10211}[form], abs=6e-6
    )


def sid_gradients(a_scale: float, mean: float, std: float, b: float) -> tuple[float, list[float], float]:
    """Value and gradients of SiD for d=3, teacher N(mean, std²), student N(0, b²), fake exact and frozen."""
    process = Flow()
    student = Student.on(exact_for_quadratics(), process, 0.4, a=[0.0, 0.0, 0.0], b=b)
    fake = gaussian(process, student.x_t, student.t, 0.0, b)
    real = gaussian(process, student.x_t, student.t, mean, std)
    loss = sid(student.x_hat, fake.x0, real.x0, a_scale, weight="none")
    return (float(loss.detach()), *student.gradients(loss))


@pytest.mark.parametrize(
    ("b", "alpha", "expected"),
    [
        (0.5, 0.5, -0.4724),
        (0.5, 1.0, -0.6380),
        (0.5, 1.2, -0.7043),
        (3.0, 0.5, 0.8321),
        (3.0, 1.0, 0.2208),
        (3.0, 1.2, -0.0238),  # the wrong way: for a > 1 a student that is far too broad is pushed to be broader
    ],
)
def test_sid_gradient_of_the_spread(b: float, alpha: float, expected: float) -> None:
    _, _, gradient = sid_gradients(alpha, mean=0.0, std=1.0, b=b)
    assert gradient == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_gradient_of_the_mean_does_not_depend_on_alpha(alpha: float) -> None:
    _, gradient, _ = sid_gradients(alpha, mean=2.0, std=0.7, b=0.7)
    rho = 0.4**2 / (0.6**2 * 0.7**2 + 0.4**2)
    assert gradient == pytest.approx([-2 * rho**2] * 3, rel=1e-12)


def test_sid_value_is_no_measure_of_progress() -> None:
    values = {alpha: sid_gradients(alpha, mean=2.0, std=1.0, b=0.5)[0] for alpha in (0.0, 0.5, 1.0)}
    assert values[0.0] > 1  # E‖y_r − y_f‖²
    assert values[0.5] == pytest.approx(0.5 * values[0.0], rel=1e-12)
    assert values[1.0] == pytest.approx(0.0, abs=1e-12)


def test_sid_divides_each_sample_by_its_own_normaliser() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0]], requires_grad=True)
    real, fake = torch.tensor([[1.0, -3.0], [10.0, -30.0]]), torch.zeros(2, 2)
    # y_r − y_f = y_r and a = ½: Σ y_r²/2 = 5 and 500, over the normalisers 2 and 20.
    assert sid(x, fake, real, 0.5).item() == pytest.approx((5 / 2 + 500 / 20) / 2)


def test_sid_carries_gradient_through_both_scores() -> None:
    x, fake, real = (torch.full((1, 2), v, requires_grad=True) for v in (0.0, 1.0, 2.0))
    gradients = torch.autograd.grad(sid(x, fake, real, 1.0, weight="none"), (x, fake, real))
    # For a = 1 the loss is Σ (y_r − y_f)(y_f − x̂).
    assert [g[0, 0].item() for g in gradients] == pytest.approx([-1.0, 0.0, 1.0])


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("detached", ["real", "fake"])
def test_sid_loses_a_predicted_part_of_its_gradient_with_either_score_s(detached: str, alpha: float) -> None:
    """At t = .4 with d = 3, teacher N(m, s²), student N(0, b²), y = k·x_t + const of each, x_t = .6·(a + b·z) + .4·ε.

    ∂L/∂y_r = (y_r − x̂) + (1 − 2a)·(y_r − y_f) and ∂L/∂y_f = −(y_r − x̂) + 2a·(y_r − y_f) go on to x̂ with .6·k.
    """
    mean, std, b = 2.0, 1.0, 0.5
    k_real, k_fake = (0.6 * v**2 / (0.36 * v**2 + 0.16) for v in (std, b))
    process = Flow()
    student = Student.on(exact_for_quadratics(), process, 0.4, a=[0.0, 0.0, 0.0], b=b)
    fake, real = (gaussian(process, student.x_t, student.t, m, v).x0 for m, v in ((0.0, b), (mean, std)))
    whole = student.gradients(sid(student.x_hat, fake, real, alpha, weight="none"))
    kept = (fake, real.detach()) if detached == "real" else (fake.detach(), real)
    partly = student.gradients(sid(student.x_hat, *kept, alpha, weight="none"))
    # E[y_r − x̂] = E[y_r − y_f] = (1 − .6·k_r)·m, since a = 0; E[(y_r − x̂)·z] and E[(y_r − y_f)·z] likewise.
    gap_mean, error_z, gap_z = (1 - 0.6 * k_real) * mean, (0.6 * k_real - 1) * b, 0.6 * (k_real - k_fake) * b
    weight_error, weight_gap, k = (1, 1 - 2 * alpha, k_real) if detached == "real" else (-1, 2 * alpha, k_fake)
    lost_a = 0.6 * k * (weight_error + weight_gap) * gap_mean
    lost_b = 0.6 * k * 3 * (weight_error * error_z + weight_gap * gap_z)
    assert [w - p for w, p in zip(whole[0], partly[0], strict=True)] == pytest.approx([lost_a] * 3, abs=1e-12)
    assert whole[1] - partly[1] == pytest.approx(lost_b, rel=1e-9)
    assert abs(lost_b) > 0.1


@pytest.mark.parametrize("process", [VP(torch.linspace(0.99, 0.05, 10)), Flow()], ids=["vp", "flow"])
def test_the_vsd_weight_gives_the_difference_of_noises_times_sigma_squared(process: Process) -> None:
    t = torch.tensor([0.2, 0.7], dtype=torch.float64) * process.t_max
    x_t, fake, real = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f, r = (Prediction.of_x0(process, x_t, t, x0) for x0 in (fake, real))
    x_hat = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    loss = distribution_matching(x_hat, f, r, weight="none", ratio=vsd_weight(process, t))
    expected = process.sigma(t)[:, None] ** 2 * (r.eps - f.eps)
    torch.testing.assert_close(10 * torch.autograd.grad(loss, x_hat)[0], expected, rtol=1e-12, atol=1e-12)


def test_dmd_weight_is_per_sample() -> None:
    x_hat = torch.zeros(2, 1, 1, 2, requires_grad=True)
    weight = dmd_weight(x_hat, torch.tensor([1.0, -3.0, 0.25, 0.25]).view(2, 1, 1, 2))
    assert weight.shape == (2, 1, 1, 1)
    assert weight.flatten().tolist() == pytest.approx([0.5, 4.0])
    assert not weight.requires_grad


def test_dmd_weight_of_a_student_that_has_arrived_is_finite() -> None:
    x = torch.ones(1, 3)
    assert dmd_weight(x, x).item() == pytest.approx(1e6)
    assert uniform(x, x).tolist() == [[1.0]]


def test_dmd_weight_makes_the_gradient_independent_of_the_scale() -> None:
    def gradient(scale: float) -> Tensor:
        x = (scale * torch.tensor([[0.5, -1.0, 2.0]])).requires_grad_()
        t, fake, real = torch.full((1,), 0.5), scale * torch.tensor([[1.0, 0.0, 3.0]]), scale * torch.ones(1, 3)
        f, r = (Prediction.of_x0(Flow(), x.detach(), t, x0) for x0 in (fake, real))
        return torch.autograd.grad(distribution_matching(x, f, r), x)[0]

    torch.testing.assert_close(gradient(1000.0), gradient(1.0))
    # mean|x̂ − x̂_0^real| = (0.5 + 2 + 1)/3, direction (0, −1, 2), three elements
    torch.testing.assert_close(gradient(1.0), torch.tensor([[0.0, -1.0, 2.0]]) / 3.5)


def test_an_unknown_weight_is_a_user_error() -> None:
    x = torch.zeros(1, 2)
    prediction = Prediction.of_x0(Flow(), x, torch.ones(1), x)
    with pytest.raises(UserError, match="weight: 'dmd2' given, allowed are dmd, none; did you mean 'dmd'"):
        distribution_matching(x, prediction, prediction, weight="dmd2")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("size", "zeroed", "cosine"), [(1e-2, 0.17, 0.99), (3e-3, 0.47, 0.89), (1e-3, 0.78, 0.63)])
def test_the_surrogate_is_exact_in_bf16_where_a_pseudo_target_is_not(size: float, zeroed: float, cosine: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2**16, generator=generator).bfloat16().requires_grad_()
    direction = (size * torch.randn(2**16, generator=generator)).bfloat16()
    (ours,) = torch.autograd.grad(surrogate(x, direction.float()), x)
    assert torch.equal(ours * 2**16, direction)  # 2¹⁶ elements: g/numel has the mantissa of g

    pseudo_target = (x - direction).detach()
    theirs = x.detach() - pseudo_target
    assert (theirs == 0).float().mean().item() == pytest.approx(zeroed, abs=0.02)
    similarity = torch.cosine_similarity(theirs.float(), direction.float(), dim=0)
    assert similarity.item() == pytest.approx(cosine, abs=0.02)


def test_the_surrogate_is_float32_and_its_gradient_that_of_the_squared_error() -> None:
    x = torch.tensor([[0.3, -0.7]], requires_grad=True)
    g = torch.tensor([[0.2, 0.5]])
    reference = 0.5 * torch.nn.functional.mse_loss(x, (x - g).detach())
    torch.testing.assert_close(torch.autograd.grad(surrogate(x, g), x), torch.autograd.grad(reference, x))
    assert surrogate(x.bfloat16(), g.bfloat16()).dtype == torch.float32
    assert math.isclose(surrogate(x, g).item(), (0.3 * 0.2 - 0.7 * 0.5) / 2, rel_tol=1e-6)
