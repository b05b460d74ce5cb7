"""Which student leaves with which scheduler, and that the stock pipeline then makes the student's samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import EDM, VP, Flow, TrigFlow
from fewstep.diffusion.solvers import Sampler
from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule, alphas_cumprod, schedule_of
from fewstep.pipelines.check import allowed
from fewstep.pipelines.recipes import recipe_of
from fewstep.pipelines.schedulers import contract_of
from tests import tiny
from tests.pipelines.conftest import Student, difference

# The own grid of DPMSolverMultistepScheduler turns a tensor into an array in a way that NumPy 2 warns of.
pytestmark = [
    pytest.mark.usefixtures("here"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]
TABLES = [
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"trained_betas": torch.linspace(0.001, 0.02, 1000).tolist()},
]


@pytest.mark.parametrize(
    ("steps", "grid", "argument"),
    [
        (1, [999], "num_inference_steps"),
        (2, [999, 499], "num_inference_steps"),
        (3, [999, 666, 332], "timesteps"),
        (4, [999, 749, 499, 249], "num_inference_steps"),
        (5, [999, 799, 599, 399, 199], "num_inference_steps"),
        (6, [999, 832, 666, 499, 332, 166], "timesteps"),
        (7, [999, 856, 713, 570, 428, 285, 142], "timesteps"),
        (8, [999, 874, 749, 624, 499, 374, 249, 124], "num_inference_steps"),
    ],
)
def test_renoising_on_a_table_leaves_with_lcm(cosine, steps, grid, argument):
    contract = contract_of(Schedule(cosine, Kind.V), Sampler.of(cosine, steps))
    assert type(contract.scheduler) is LCMScheduler
    assert (contract.argument, list(contract.values)) == (argument, grid)
    told = {"timesteps": grid} if argument == "timesteps" else {"num_inference_steps": steps}
    contract.scheduler.set_timesteps(**told)
    assert contract.scheduler.timesteps.tolist() == grid


@pytest.mark.parametrize("steps", range(1, 9))
def test_ddim_leaves_with_a_scheduler_whose_own_grid_is_the_samplers(cosine, steps):
    contract = contract_of(Schedule(cosine, Kind.EPS), Sampler.of(cosine, steps, "ddim"))
    assert type(contract.scheduler) is (DPMSolverMultistepScheduler if 1000 % steps else DDIMScheduler)
    assert contract.by_number
    contract.scheduler.set_timesteps(steps)
    assert contract.scheduler.timesteps.tolist() == list(cosine.step_list(steps))


@pytest.mark.parametrize("words", TABLES, ids=lambda words: words.get("beta_schedule", "trained"))
@pytest.mark.parametrize("told", [True, False], ids=["teacher's words", "table alone"])
def test_the_noise_table_survives(words, told):
    process = VP(alphas_cumprod(words))
    contract = contract_of(Schedule(process, Kind.X0), Sampler.of(process, 4), words if told else None)
    torch.testing.assert_close(contract.scheduler.alphas_cumprod.double(), process.alphas_cumprod, rtol=2e-6, atol=0)
    reread = schedule_of({**contract.scheduler.config, "_class_name": "LCMScheduler"})
    assert reread.kind is Kind.X0


@pytest.mark.parametrize(("shift", "steps", "by_number"), [(1, 1, True), (1, 4, True), (3, 2, True), (3, 4, False)])
@pytest.mark.parametrize("kind", ["renoise", "ddim", "euler"])
def test_flow_leaves_with_euler_on_the_samplers_own_sigmas(shift, steps, by_number, kind):
    process = Flow(float(shift))
    contract = contract_of(Schedule(process, Kind.VELOCITY), Sampler.of(process, steps, kind))
    scheduler = contract.scheduler
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler
    assert scheduler.config["stochastic_sampling"] is (kind == "renoise")
    assert contract.by_number is by_number
    scheduler.set_timesteps(steps, sigmas=None if by_number else list(contract.values))
    sigmas: Any = scheduler.sigmas
    torch.testing.assert_close(sigmas[:-1].tolist(), list(process.step_list(steps)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("process", "kind", "sampler", "told"),
    [
        (EDM(), Kind.X0, Sampler((80.0,)), "no scheduler samples EDM with sample by 'renoise'"),
        (TrigFlow(), Kind.VELOCITY, Sampler((1.5,)), "no scheduler samples TrigFlow"),
        (Flow(), Kind.VELOCITY, Sampler((1.0,), "heun"), "by 'heun'"),
        (Flow(), Kind.EPS, Sampler((1.0,)), "Flow with epsilon"),
        (Flow(), Kind.VELOCITY, Sampler((1.0, 0.0)), "numbers above 0 up to 1"),
        (None, Kind.V, Sampler((1000.0, 499.5)), r"times \[1000.0, 499.5\] given, numbers from 0 up to 999 can leave"),
        (None, Kind.VELOCITY, Sampler((999.0,)), "VP with velocity"),
    ],
)
def test_what_cannot_leave_is_told(cosine, process, kind, sampler, told):
    with pytest.raises(UserError, match=told):
        contract_of(Schedule(process or cosine, kind), sampler)


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("kind", ["renoise", "ddim"])
def test_class_conditional_pixels_make_the_same_samples(pixels, tmp_path, steps, kind):
    assert difference(pixels, Sampler.of(pixels.denoiser.process, steps, kind), tmp_path / "out") <= 1e-5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [Kind.V, Kind.X0])
def test_unconditional_pixels_make_the_same_samples(cosine, tmp_path, channels, kind):
    student = Student(make_denoiser(tiny.alive(tiny.unet2d(channels=channels)), Schedule(cosine, kind)))
    assert difference(student, Sampler.of(cosine, 4), tmp_path / "out") <= 1e-5


@pytest.mark.parametrize(("steps", "kind"), [(1, "renoise"), (4, "renoise"), (4, "euler")])
def test_unconditional_flow_makes_the_same_samples(made_flow, tmp_path, steps, kind):
    assert difference(made_flow, Sampler.of(Flow(), steps, kind), tmp_path / "out") <= 1e-5


@pytest.mark.parametrize(
    ("name", "steps", "kind"),
    [
        ("sd15", 1, "renoise"),
        ("sd15", 3, "renoise"),
        ("sd15", 4, "ddim"),
        ("dit", 4, "renoise"),
        ("dit", 3, "ddim"),
        ("sd3", 2, "renoise"),
        ("sd3", 4, "renoise"),
        ("sd3", 4, "euler"),
    ],
)
def test_the_teachers_pipeline_makes_the_same_samples(teachers, tmp_path, name, steps, kind):
    student = teachers(name)
    sampler = Sampler.of(student.denoiser.process, steps, kind)
    limit = allowed(student.denoiser, sampler)
    assert limit == pytest.approx({"sd15": 1e-5 / 0.0682, "dit": 1e-5 / 0.00635, "sd3": 1e-5}[name], rel=1e-2)
    assert difference(student, sampler, tmp_path / "out") <= limit


def test_networks_without_a_pipeline_are_told(teachers):
    for student, teacher, told in [
        (teachers("sd3").denoiser, None, "no teacher is given"),
        (teachers("sd3").denoiser, "HiDreamImagePipeline", "HiDreamImagePipeline is not known"),
    ]:
        assert isinstance(student, NetworkDenoiser)
        with pytest.raises(UserError, match=told):
            recipe_of(student, teacher)
