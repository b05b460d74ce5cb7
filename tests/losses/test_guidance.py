"""Regressions whose optimum is a guided prediction, on Gaussians: every fixed point in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.prediction import Kind, Prediction
from fewstep.diffusion.process import EDM, VP, Flow, Process, TrigFlow
from fewstep.losses.denoising import denoising, regression_target
from fewstep.losses.guidance import guidance_free, guided_regression, model_guidance
from tests.losses.closed_form import gaussian

CONDITIONAL, NULL, STD = 1.0, -0.5, 0.7
PROCESSES = [
    pytest.param(VP(torch.linspace(0.99, 0.05, 10)), [2.25, 6.5], id="vp"),
    pytest.param(EDM(), [0.3, 12.0], id="edm"),
    pytest.param(Flow(), [0.2, 0.9], id="flow"),
    pytest.param(TrigFlow(0.5), [0.4, 1.2], id="trigflow"),
]


class Exact:
    """Both predictions of x_t `(2, 5)` in one parametrisation, and what the data says on average."""

    def __init__(self, process: Process, times: list[float], kind: Kind) -> None:
        self.process, self.kind = process, kind
        self.t = torch.tensor(times, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        self.x_t = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        self.conditional, self.null = self.of(CONDITIONAL), self.of(NULL)

    def of(self, mean: float) -> Prediction:
        said = gaussian(self.process, self.x_t, self.t, mean, STD)
        return self.saying(said.as_kind(self.kind))

    def saying(self, value: Tensor) -> Prediction:
        return Prediction(self.process, self.x_t, self.t, value, self.kind)

    def guided(self, scale: float) -> Prediction:
        """Of equal widths: the Gaussian whose mean is NULL + scale·(CONDITIONAL − NULL)."""
        return self.of(NULL + scale * (CONDITIONAL - NULL))


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize(("process", "times"), PROCESSES)
def test_the_guided_target_is_the_gaussian_of_the_guided_mean(process, times, kind):
    """In every parametrisation, and w of the papers is s − 1: (1 + w)·f_c − w·f_∅."""
    exact, w = Exact(process, times, kind), 6.5
    mixed = (1 + w) * exact.conditional.value - w * exact.null.value
    torch.testing.assert_close(mixed, exact.guided(1 + w).value, rtol=1e-12, atol=1e-12)
    assert float((mixed - exact.guided(w).value).abs().max()) > 1e-2, "taking w for s is seen"


@pytest.mark.parametrize("weight", ["output", "snr_plus_one", "truncated_snr"])
@pytest.mark.parametrize(("process", "times"), PROCESSES)
def test_no_gradient_at_the_exact_guided_student(process, times, weight):
    exact = Exact(process, times, Kind.V)
    value = exact.guided(4.0).value.clone().requires_grad_()
    loss = guided_regression(exact.saying(value), exact.guided(4.0), weight)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-25)
    assert float(torch.autograd.grad(loss, value)[0].abs().max()) < 1e-12


@pytest.mark.parametrize(("process", "times"), PROCESSES)
def test_the_weights_are_those_of_progressive_distillation(process, times):
    """Of the error of x̂_0: 1 + α²/σ², max(α²/σ², 1), and of v itself."""
    exact = Exact(process, times, Kind.V)
    student, target = exact.of(2.0), exact.guided(3.0)
    clean = (student.x0 - target.x0).square().mean(1)
    snr = process.ratio(exact.t) ** -2
    assert (snr > 1).tolist() == [True, False], "both sides of the truncation"
    found = {w: float(guided_regression(student, target, w)) for w in ("output", "snr_plus_one", "truncated_snr")}
    assert found["snr_plus_one"] == pytest.approx(float(((1 + snr) * clean).mean()), rel=1e-12)
    assert found["truncated_snr"] == pytest.approx(float((snr.clamp_min(1) * clean).mean()), rel=1e-12)
    v = ((process.alpha(exact.t) ** 2 + process.sigma(exact.t) ** 2) / process.sigma(exact.t)) ** 2
    assert found["output"] == pytest.approx(float((v * clean).mean()), rel=1e-12)
    if isinstance(process, VP):
        assert found["output"] == pytest.approx(found["snr_plus_one"], rel=1e-12)


@pytest.mark.parametrize("kind", [Kind.EPS, Kind.V, Kind.VELOCITY])
@pytest.mark.parametrize(("process", "times"), PROCESSES)
def test_guidance_free_training_ends_at_one_over_beta(process, times, kind):
    """The data's mean target is the conditional prediction, so x_0 and ε that say just that stand for the mean.

    β = 1/2 ends at f_∅ + 2(f_c − f_∅) and β = 1/4 at 4 times; the gradient vanishes there, and only there.
    """
    exact = Exact(process, times, kind)
    x0, noise = exact.conditional.x0, exact.conditional.eps
    for beta in (0.5, 0.25):
        for scale, flat in ((1 / beta, True), (1 / beta - 1, False), (1.0, False), (beta, False)):
            value = exact.guided(scale).value.clone().requires_grad_()
            loss = guidance_free(exact.saying(value), exact.null, x0, noise, torch.full((2,), 1 / beta))
            steepest = float(torch.autograd.grad(loss, value)[0].abs().max())
            assert (steepest < 1e-12) is flat, (beta, scale, steepest)


def test_guidance_free_training_by_hand():
    """β·3 + (1 − β)·1 − 2 with β = 1/4 is −1/2, and the gradient 2·β·(−1/2) reaches the student alone."""
    x_t, t = torch.zeros(1, 1), torch.full((1,), 0.5)
    said, base = (torch.tensor([[value]], requires_grad=True) for value in (3.0, 1.0))
    noise = torch.tensor([[2.0]])
    one, other = (Prediction(Flow(), x_t, t, value, Kind.EPS) for value in (said, base))
    loss = guidance_free(one, other, x_t, noise, torch.tensor([4.0]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.25)
    assert said.grad is not None
    assert float(said.grad) == pytest.approx(-0.25)
    assert base.grad is None


def test_at_scale_one_guidance_free_training_is_denoising():
    exact = Exact(Flow(), [0.2, 0.9], Kind.VELOCITY)
    x0, noise = torch.randn(2, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = guidance_free(exact.conditional, exact.null, x0, noise, torch.ones(2))
    torch.testing.assert_close(loss, denoising(exact.conditional, x0, noise, Kind.VELOCITY))


@pytest.mark.parametrize(("w", "scale"), [(0.25, 4 / 3), (0.5, 2.0), (0.75, 4.0), (0.9, 10.0)])
def test_model_guidance_ends_at_one_over_one_minus_w(w, scale):
    """Each round the student takes the mean target of its present self: the error to the fixed point shrinks by w."""
    exact = Exact(Flow(), [0.2, 0.9], Kind.VELOCITY)
    x0, noise = exact.conditional.x0, exact.conditional.eps
    wanted, said = exact.guided(scale).value, exact.conditional.value
    errors = []
    for _ in range(60):
        value = torch.zeros_like(said, requires_grad=True)
        loss = model_guidance(exact.saying(value), said - exact.null.value, x0, noise, scale)
        (slope,) = torch.autograd.grad(loss, value)
        said = -slope * value.numel() / 2  # the minimiser, of a mean of squares
        errors.append(float((said - wanted).abs().max()))
    assert errors[1] / errors[0] == pytest.approx(w, rel=1e-9)
    assert errors[-1] == pytest.approx(errors[0] * w**59, rel=1e-3, abs=1e-12)
    target = regression_target(Flow(), exact.t, x0, noise, Kind.VELOCITY)
    first = target + w * (exact.conditional.value - exact.null.value)
    assert errors[0] == pytest.approx(float((first - wanted).abs().max()), rel=1e-9), "w of the paper, not s"


def test_model_guidance_keeps_its_own_difference_out_of_the_gradient():
    x_t, t = torch.zeros(1, 1), torch.full((1,), 0.5)
    said = torch.tensor([[3.0]], requires_grad=True)
    loss = model_guidance(Prediction(Flow(), x_t, t, said, Kind.EPS), said - 1.0, x_t, torch.tensor([[1.0]]), 2.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx((3 - (1 + 0.5 * 2)) ** 2)
    assert said.grad is not None
    assert float(said.grad) == pytest.approx(2.0), "2·(3 − 2), and not half of it"
