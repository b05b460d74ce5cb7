"""What a scheduler's config stands for."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import VP, Flow
from fewstep.errors import UserError
from fewstep.models.schedule import schedule_of

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, LCMScheduler])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_variance_preserving_schedulers(scheduler, kind):
    made = scheduler(**SD, prediction_type=kind)
    found = schedule_of({**made.config, "_class_name": scheduler.__name__})
    assert isinstance(found.process, VP)
    assert found.kind == Kind(kind)
    torch.testing.assert_close(found.process.alphas_cumprod, made.alphas_cumprod.double())
    assert float(found.process.alphas_cumprod[-1]) == pytest.approx(0.00466, rel=1e-3)


def test_flow_schedulers_and_their_shift():
    made = FlowMatchEulerDiscreteScheduler(shift=3.0)
    found = schedule_of({**made.config, "_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert found.process == Flow(3.0)
    assert found.kind is Kind.VELOCITY
    for scheduler in (UniPCMultistepScheduler, DPMSolverMultistepScheduler):
        made = scheduler(use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction")
        assert schedule_of({**made.config, "_class_name": scheduler.__name__}).process == Flow(5.0)


def test_a_table_of_its_own():
    betas = [0.1, 0.2, 0.3]
    found = schedule_of({"_class_name": "DDPMScheduler", "trained_betas": betas, "num_train_timesteps": 3})
    assert isinstance(found.process, VP)
    torch.testing.assert_close(
        found.process.alphas_cumprod, torch.tensor([0.9, 0.72, 0.504]).double(), rtol=1e-6, atol=0
    )


def test_zero_terminal_snr_with_v_prediction():
    made = DDIMScheduler(**SD, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    found = schedule_of({**made.config, "_class_name": "DDIMScheduler"})
    assert isinstance(found.process, VP)
    assert float(found.process.alphas_cumprod[-1]) == 0
    assert float(found.process.alpha(torch.tensor(999.0))) == pytest.approx(2e-9, rel=0.1)


REFUSED = [
    ({**SD, "prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "leaves x̂_0 undefined at pure noise"),
    ({**SD, "prediction_type": "score"}, "prediction_type 'score' is not one of epsilon, sample, v_prediction"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting is not"),
    ({"beta_schedule": "quadratic"}, "scheduler: no noise table can be made of it: quadratic"),
    ({**EDMEulerScheduler().config, "_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler states no noise table"),
]


@pytest.mark.parametrize(("config", "told"), REFUSED)
def test_what_is_refused(config, told):
    with pytest.raises(UserError, match=told) as caught:
        schedule_of(config)
    assert "\n" not in str(caught.value)
