"""Whatever can be trained, leaves: every pipeline, in few steps, with fresh noise or along the ODE."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.process import Flow
from fewstep.diffusion.solvers import Sampler, SamplerKind
from fewstep.errors import UserError
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.families import FAMILIES
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import schedule_of
from fewstep.pipelines.plan import Form, Plan, plan_of
from fewstep.pipelines.recipes import RECIPES

TABLE = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PURE = {**TABLE, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
COG = {**PURE, "_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
EDMS = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5}
SCM = {"_class_name": "SCMScheduler", "prediction_type": "trigflow"}
CASES = [
    ("DDPMPipeline", "UNet2DModel", (FLOW,)),
    ("ConsistencyModelPipeline", "UNet2DModel", (TABLE, PURE, EDMS)),
    ("DiTPipeline", "DiTTransformer2DModel", (TABLE, PURE, FLOW)),
    ("StableDiffusionPipeline", "UNet2DConditionModel", (TABLE, PURE, EDMS)),
    ("StableDiffusionXLPipeline", "UNet2DConditionModel", (TABLE, PURE, EDMS)),
    ("PixArtAlphaPipeline", "PixArtTransformer2DModel", (TABLE, PURE)),
    ("PixArtSigmaPipeline", "PixArtTransformer2DModel", (TABLE, PURE)),
    ("CogVideoXPipeline", "CogVideoXTransformer3DModel", (COG, TABLE)),
    ("StableDiffusion3Pipeline", "SD3Transformer2DModel", (FLOW,)),
    ("FluxPipeline", "FluxTransformer2DModel", (FLOW,)),
    ("Flux2KleinPipeline", "Flux2Transformer2DModel", (FLOW,)),
    ("Flux2Pipeline", "Flux2Transformer2DModel", (FLOW,)),
    ("SanaPipeline", "SanaTransformer2DModel", (FLOW,)),
    ("SanaSprintPipeline", "SanaTransformer2DModel", (SCM,)),
    ("Lumina2Pipeline", "Lumina2Transformer2DModel", (FLOW,)),
    ("ZImagePipeline", "ZImageTransformer2DModel", (FLOW,)),
    ("QwenImagePipeline", "QwenImageTransformer2DModel", (FLOW,)),
    ("WanPipeline", "WanTransformer3DModel", (FLOW,)),
]
SCHEDULES = [(pipeline, network, words) for pipeline, network, many in CASES for words in many]
KINDS: tuple[SamplerKind, ...] = ("renoise", "ddim", "flow_map")


def student_of(network: str, words: Mapping[str, Any]) -> NetworkDenoiser:
    """A student without weights."""
    blocks = {name: nn.ModuleList([nn.Identity()]) for name in FAMILIES[network].compute_blocks}
    made = type(network, (nn.Module,), {"config": {}})()
    for name, block in blocks.items():
        made.add_module(name, block)
    return make_denoiser(made, schedule_of(words))


def folder_of(pipeline: str, words: Mapping[str, Any], folder: Path) -> Path:
    (folder / "scheduler").mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(words))
    return folder


def taken(plan: Plan) -> Tensor:
    """The times of the steps, as the scheduler takes them after the pipeline's own call of it."""
    scheduler, call = plan.contract.scheduler, plan.call
    if plan.contract.space == "trig":
        ends = {name: call[name] for name in ("max_timesteps", "intermediate_timesteps")}
        scheduler.set_timesteps(call["num_inference_steps"], **ends)
        angles = scheduler.timesteps[:-1].double()
        return angles.sin() / (angles.sin() + angles.cos())
    lists = {name: call[name] for name in ("timesteps", "sigmas") if name in call}
    scheduler.set_timesteps(**(lists or {"num_inference_steps": call["num_inference_steps"]}))
    match plan.contract.space:
        case "table":
            return scheduler.timesteps.double()
        case "flow":
            return scheduler.sigmas[:-1].double()
    return (4 * scheduler.timesteps.double()).exp()


def samplers(student: NetworkDenoiser) -> list[Sampler]:
    """In 1 to 4 steps on the process's own list, and at three times of no list's."""
    process = student.process
    first = 1.0 if process == Flow(timesteps=1.0) else 0.99  # Sana-Sprint's pipeline starts there
    odd = process.at(torch.tensor([first, 0.55, 0.2], dtype=torch.float64))
    return [Sampler(times, kind) for kind in KINDS
            for times in (*(process.step_list(n) for n in (1, 2, 3, 4)), tuple(odd.tolist()))]  # fmt: skip


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy, of diffusers
@pytest.mark.parametrize(("pipeline", "network", "words"), SCHEDULES)
def test_every_student_has_a_plan(tmp_path, pipeline, network, words):
    student, folder = student_of(network, words), folder_of(pipeline, words, tmp_path)
    for sampler in samplers(student):
        plan = plan_of(student, sampler, folder, Form())
        assert plan.recipe.pipeline == pipeline
        assert taken(plan).tolist() == pytest.approx(list(sampler.times), rel=1e-5), (sampler, plan.scheduler)
        noisy = sampler.kind == "renoise" and len(sampler.times) > 1
        assert noises(plan) is noisy or len(sampler.times) == 1


def noises(plan: Plan) -> bool:
    """Whether the scheduler draws noise between steps."""
    config = plan.contract.scheduler.config
    always = plan.scheduler.__name__ in ("LCMScheduler", "SCMScheduler")
    return always or bool(config.get("renoise") or config.get("stochastic_sampling"))


def test_every_family_and_every_recipe_is_among_them():
    assert {pipeline for pipeline, _, _ in SCHEDULES} == set(RECIPES)
    assert {network for _, network, _ in SCHEDULES} == set(FAMILIES) - {"VectorNetwork"}


OWN: list[tuple[str, str, Mapping[str, Any], set[tuple[SamplerKind, int]]]] = [
    ("StableDiffusionXLPipeline", "UNet2DConditionModel", TABLE, set()),
    ("StableDiffusionXLPipeline", "UNet2DConditionModel", EDMS, {("renoise", 2), ("renoise", 3), ("renoise", 4)}),
    ("DiTPipeline", "DiTTransformer2DModel", TABLE, {("renoise", 3)}),
    ("CogVideoXPipeline", "CogVideoXTransformer3DModel", COG, {("ddim", 3), ("flow_map", 3)}),
    ("QwenImagePipeline", "QwenImageTransformer2DModel", FLOW, set()),
    (
        "SanaSprintPipeline",
        "SanaTransformer2DModel",
        SCM,
        {("renoise", 3), ("renoise", 4), *((kind, steps) for kind in KINDS[1:] for steps in (1, 2, 3, 4))},
    ),
    ("WanPipeline", "WanTransformer3DModel", FLOW, {(kind, steps) for kind in KINDS for steps in (3, 4)}),
]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy, of diffusers
@pytest.mark.parametrize(("pipeline", "network", "words", "own"), OWN)
def test_fewstep_s_own_schedulers_are_the_exception(tmp_path, pipeline, network, words, own):
    student, folder = student_of(network, words), folder_of(pipeline, words, tmp_path)
    found = {(kind, n) for kind in KINDS for n in (1, 2, 3, 4)
             if plan_of(student, Sampler.of(student.process, n, kind), folder, Form()).contract.own}  # fmt: skip
    assert found == own


def test_sana_sprint_s_pipeline_starts_at_pure_noise(tmp_path):
    student, folder = student_of("SanaTransformer2DModel", SCM), folder_of("SanaSprintPipeline", SCM, tmp_path)
    with pytest.raises(UserError, match=r"times \[0.9\] given, Sana-Sprint's pipeline starts at 1 alone"):
        plan_of(student, Sampler((0.9,)), folder, Form())


def test_edm_s_noise_needs_a_pipeline_that_scales_it(tmp_path):
    student, folder = student_of("DiTTransformer2DModel", EDMS), folder_of("DiTPipeline", EDMS, tmp_path)
    with pytest.raises(UserError, match="export: DiTPipeline does not scale its noise, as EDM's preconditioning needs"):
        plan_of(student, Sampler((80.0,)), folder, Form())
