from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.prediction import Kind, Prediction
from fewstep.diffusion.process import EDM, VP, Flow, Process, TrigFlow
from fewstep.losses.denoising import (
    denoising,
    edm_weight,
    in_space,
    min_snr_weight,
    regression_target,
    snr_weight,
    uniform_weight,
)

PROCESSES = [
    (VP(torch.linspace(0.99, 0.05, 10)), [2.25, 6.5]),
    (EDM(), [0.3, 12.0]),
    (Flow(), [0.2, 0.9]),
    (TrigFlow(0.5), [0.4, 1.2]),
]
IDS = ["vp", "edm", "flow", "trigflow"]


def draw(times: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise, guess = torch.randn(3, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    return x0, noise, guess, torch.tensor(times, dtype=torch.float64)


@pytest.mark.parametrize(("process", "times"), PROCESSES, ids=IDS)
@pytest.mark.parametrize("kind", list(Kind))
def test_the_target_is_what_a_perfect_network_would_say(process: Process, times: list[float], kind: Kind) -> None:
    x0, noise, _, t = draw(times)
    perfect = Prediction.of_x0(process, process.add_noise(x0, noise, t), t, x0)
    torch.testing.assert_close(regression_target(process, t, x0, noise, kind), perfect.as_kind(kind))
    assert denoising(perfect, x0, noise, kind).item() == pytest.approx(0.0, abs=1e-20)


@pytest.mark.parametrize(("process", "times"), PROCESSES, ids=IDS)
@pytest.mark.parametrize("kind", list(Kind))
def test_a_weight_carried_to_another_space_gives_the_same_loss(
    process: Process, times: list[float], kind: Kind
) -> None:
    x0, noise, guess, t = draw(times)
    prediction = Prediction.of_x0(process, process.add_noise(x0, noise, t), t, guess)
    weight = edm_weight(process, t)
    there = denoising(prediction, x0, noise, kind, in_space(weight, process, t, kind))
    here = denoising(prediction, x0, noise, Kind.X0, weight)
    torch.testing.assert_close(there, here)


def test_mean_over_each_sample_then_weight_then_mean_over_the_batch() -> None:
    x0, noise = torch.zeros(2, 1, 1, 2), torch.ones(2, 1, 1, 2)
    value = torch.tensor([[1.0, 3.0], [0.0, 2.0]]).view(2, 1, 1, 2)
    prediction = Prediction.of_x0(Flow(), noise, torch.full((2,), 0.5), value)
    assert denoising(prediction, x0, noise, Kind.X0).item() == pytest.approx((5 + 2) / 2)
    weighted = denoising(prediction, x0, noise, Kind.X0, torch.tensor([2.0, 10.0]))
    assert weighted.item() == pytest.approx((2 * 5 + 10 * 2) / 2)


def test_weights_by_hand() -> None:
    t = torch.tensor([0.5, 2.0])
    assert uniform_weight(EDM(), t).tolist() == [1.0, 1.0]
    assert snr_weight(EDM(), t).tolist() == pytest.approx([4.0, 0.25])
    assert min_snr_weight(EDM(), t, gamma=3.0).tolist() == pytest.approx([3.0, 0.25])
    # 1/σ² + 1/σ_d²
    assert edm_weight(EDM(), t, sigma_data=0.5).tolist() == pytest.approx([8.0, 4.25])
    # At t = 0.2 flow matching has σ/α = 1/4.
    assert edm_weight(Flow(), torch.tensor([0.2]), sigma_data=0.5).tolist() == pytest.approx([20.0])


def test_familiar_weights_of_other_spaces() -> None:
    """SNR for x̂_0 is the plain ε loss; min-SNR is min(SNR, γ)/SNR for ε and min(SNR, γ)/(SNR + 1) for v."""
    process, t = VP(torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)), torch.arange(3, dtype=torch.float64)
    snr = torch.tensor([9.0, 1.0, 0.25], dtype=torch.float64)
    torch.testing.assert_close(in_space(snr_weight(process, t), process, t, Kind.EPS), torch.ones_like(t))
    clipped = min_snr_weight(process, t)
    torch.testing.assert_close(in_space(clipped, process, t, Kind.EPS), snr.clamp_max(5) / snr)
    torch.testing.assert_close(in_space(clipped, process, t, Kind.V), snr.clamp_max(5) / (snr + 1))


def test_bf16_predictions_are_compared_in_float32() -> None:
    x0 = torch.tensor([[0.1, 0.2]]).bfloat16()
    value = (x0.float() + 1e-3).requires_grad_()
    loss = denoising(Prediction.of_x0(Flow(), x0, torch.full((1,), 0.5), value), x0, x0, Kind.X0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1e-6, rel=1e-3)
    torch.testing.assert_close(torch.autograd.grad(loss, value)[0], torch.full((1, 2), 1e-3), rtol=1e-3, atol=0)
