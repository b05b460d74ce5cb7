"""What a scheduler's config stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import EDM, VP, Flow
from fewstep.diffusion.shift import EmpiricalMu, LinearMu
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


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_is_the_scheduler_s_own(kind):
    """The step list that Flux's pipeline gets from its scheduler for samples of that size."""
    made: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, base_shift=0.4)
    flow = schedule_of({**made.config, "_class_name": "FlowMatchEulerDiscreteScheduler"}).process
    assert isinstance(flow, Flow)
    for tokens in (256, 1024, 5000):
        made.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=calculate_shift(tokens, base_shift=0.4))
        assert flow.sized(tokens).step_list(4) == pytest.approx(made.sigmas[:4].tolist(), rel=1e-6)
    assert flow.step_list(4) == flow.sized(4096).step_list(4), "before it is told a size"


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 4300, 4301, 8192])
def test_flux2_s_fit(tokens):
    for steps in (1, 4, 28, 50, 200):
        assert EmpiricalMu()(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)
        assert LinearMu()(tokens, steps) == pytest.approx(calculate_shift(tokens), rel=1e-12)


def test_a_flow_config_that_states_a_noise_table_too():
    for words in ({"prediction_type": "flow_prediction"}, {"use_flow_sigmas": True}):
        found = schedule_of({"_class_name": "UniPCMultistepScheduler", **SD, "flow_shift": 3.0, **words})
        assert (found.process, found.kind) == (Flow(3.0), Kind.VELOCITY)


def test_cogvideox_s_shifted_table():
    made = CogVideoXDDIMScheduler(prediction_type="v_prediction", snr_shift_scale=3.0, rescale_betas_zero_snr=True)
    found = schedule_of({**made.config, "_class_name": "CogVideoXDDIMScheduler"})
    assert isinstance(found.process, VP)
    torch.testing.assert_close(found.process.alphas_cumprod, made.alphas_cumprod.double())
    assert float(found.process.alphas_cumprod[500]) != pytest.approx(float(DDIMScheduler(**SD).alphas_cumprod[500]))


def test_trigflow_of_sana_sprint():
    made = SCMScheduler()
    found = schedule_of({**made.config, "_class_name": "SCMScheduler"})
    assert (found.process, found.kind) == (Flow(timesteps=1.0), Kind.VELOCITY)


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_edm_s_preconditioning_is_diffusers(scheduler, kind):
    made: Any = scheduler(sigma_data=1.0, sigma_min=0.01, sigma_max=120.0, rho=5.0, prediction_type=kind)
    found = schedule_of({**made.config, "_class_name": scheduler.__name__})
    assert (found.process, found.kind) == (EDM(0.01, 120.0, 5.0), Kind.X0)
    assert found.preconditioning is not None
    generator = torch.Generator().manual_seed(0)
    x, said = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(2))
    for sigma in (0.01, 0.7, 120.0):
        one, many = torch.tensor(sigma), torch.full((3,), sigma)
        assert torch.equal(found.preconditioning.scaled(x, many), made.precondition_inputs(x, one))
        assert torch.equal(found.preconditioning.x0(x, many, said), made.precondition_outputs(x, said, one))


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
    ({**SD, "timestep_type": "continuous"}, "timestep_type continuous is of networks that are told ln σ/4"),
    ({"beta_schedule": "quadratic"}, "scheduler: no noise table can be made of it: quadratic"),
    ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "'sample' is not one of epsilon, v_prediction"),
    ({"_class_name": "KarrasVeScheduler"}, "KarrasVeScheduler states no noise table"),
]


@pytest.mark.parametrize(("config", "told"), REFUSED)
def test_what_is_refused(config, told):
    with pytest.raises(UserError, match=told) as caught:
        schedule_of(config)
    assert "\n" not in str(caught.value)
