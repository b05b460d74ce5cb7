"""Conditions as pipelines make them, and the contract of every family."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from fewstep.errors import UserError
from fewstep.models.capture import Capture, captured
from fewstep.models.conditioning import LENGTHS, Condition
from fewstep.models.contract import contract, steps_of
from fewstep.models.families import FAMILIES
from fewstep.models.guidance import Guided
from fewstep.models.load import make_denoiser, schedule_of_network
from tests import tiny_pipelines

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy, of diffusers

PROMPTS = ["a red cat", "a blue dog on a hill"]


SIDES = {"height": 32, "width": 32}


def told_to(name: str) -> tuple[Any, dict[str, Any]]:
    """Prompts or labels, and further arguments of a short call."""
    if name in ("ddpm", "dit"):
        return ([1, 2] if name == "dit" else None), ({"batch_size": 2} if name == "ddpm" else {})
    return PROMPTS, {**SIDES, **tiny_pipelines.facts(name)}


@pytest.mark.parametrize("name", tiny_pipelines.PIPELINES)
def test_the_denoiser_says_what_the_pipeline_s_scheduler_hears(name):
    """To the last bit, at every step."""
    prompts, call = told_to(name)
    found = contract(tiny_pipelines.build(name), prompts, **call)
    assert len(found) == 2
    for step in found:
        assert float(step.pipeline.abs().mean()) > 1e-2
        assert step.difference == 0.0


@pytest.mark.parametrize("scheduler", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_schedulers_that_round_their_timesteps(scheduler):
    """Wan's and Sana's own ones: the network is told whole numbers."""
    pipeline: Any = tiny_pipelines.build("wan")
    pipeline.scheduler = scheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    found = contract(pipeline, PROMPTS, **SIDES, **tiny_pipelines.facts("wan"))
    assert max(step.difference for step in found) < 1e-5


GUIDES = ["dit", "sd15", "sdxl", "pixart", "sd3", "sana", "wan", "lumina2", "zimage", "flux2_klein", "cogvideox"]


@pytest.mark.parametrize("name", GUIDES)
def test_guidance_from_the_null_condition_is_the_pipeline_s_own(name):
    pipeline: Any = tiny_pipelines.build(name)
    prompts, call = told_to(name)
    capture = Capture(pipeline, {**call, **({"cfg_normalization": False} if name == "lumina2" else {})})
    config = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    denoiser = make_denoiser(capture.network, schedule_of_network(capture.network, config))
    (step,) = steps_of(pipeline, capture.words(prompts, guidance=3.0))
    t = (step.timestep.float() if step.sigma is None else step.sigma).expand(2)
    scale = 4.0 if name == "zimage" else 3.0  # Z-Image's is off at 0
    x, told = step.scaled[:2], capture.prompts(prompts)  # DiT's own x is two halves
    with torch.no_grad():
        said = Guided(denoiser, capture.null(), scale)(x, t, told)
    torch.testing.assert_close(said.value, step.prediction[:2], rtol=1e-5, atol=1e-5)
    unguided = denoiser(x, t, told).value
    assert float((unguided - said.value).abs().max()) > 1e-3


def test_what_the_empty_prompt_is_depends_on_the_pipeline():
    """SDXL guides from zeros, Sana from the empty prompt without its instruction, Lumina2 without its system's."""
    sdxl: Any = Capture(tiny_pipelines.build("sdxl"))
    told = sdxl.null()
    assert not told.batched["encoder_hidden_states"].any()
    assert not told.batched["added_cond_kwargs.text_embeds"].any()
    assert told.batched["added_cond_kwargs.time_ids"].any()
    sana: Any = tiny_pipelines.build("sana")
    short = {"height": 32, "width": 32, "max_sequence_length": 24}
    plain = captured(sana, [""], complex_human_instruction=None, **short)
    null = Capture(sana, {"complex_human_instruction": ["Draw:"], **short}).null()
    assert torch.equal(null.batched["encoder_hidden_states"], plain.batched["encoder_hidden_states"])
    wan: Any = Capture(tiny_pipelines.build("wan"), {"height": 32, "width": 32, **tiny_pipelines.facts("wan")})
    assert torch.equal(wan.null().batched["encoder_hidden_states"], wan.prompts([""]).batched["encoder_hidden_states"])


def test_what_belongs_to_samples_is_found_by_calling_twice():
    """Positions of 2 tokens for 2 samples would look batched to one who goes by shapes."""
    flux: Any = tiny_pipelines.build("flux_guidance")
    told = captured(flux, PROMPTS, height=8, width=4, max_sequence_length=2, guidance_scale=2.5)
    assert set(told.batched) == {"encoder_hidden_states", "pooled_projections", "guidance"}
    assert {key: value.shape for key, value in told.shared.items()} == {"img_ids": (2, 3), "txt_ids": (2, 3)}
    assert told.batched["guidance"].tolist() == [2.5, 2.5]
    assert captured(flux, PROMPTS, height=8, width=8).batched["guidance"].tolist() == [3.5, 3.5], "the pipeline's usual"


def test_texts_whose_mask_is_not_always_told_are_held_at_one_length():
    """Qwen-Image's pipeline leaves the mask out where no prompt of the call is shorter than the longest."""
    qwen: Any = tiny_pipelines.build("qwen")
    words = {**SIDES, "max_sequence_length": 40}
    both = captured(qwen, PROMPTS, **words)
    assert both.batched["encoder_hidden_states"].shape == (2, 40, 32)
    lengths = both.batched["encoder_hidden_states_mask"].sum(1).tolist()
    assert lengths[1] - lengths[0] == len(PROMPTS[1]) - len(PROMPTS[0])
    alone = [captured(qwen, [prompt], **words) for prompt in PROMPTS]
    together = Condition.cat(alone)
    assert torch.equal(together.batched["encoder_hidden_states_mask"], both.batched["encoder_hidden_states_mask"])
    for one, two in zip(together.batched["encoder_hidden_states"], both.batched["encoder_hidden_states"], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_lists_are_held_in_rows_and_cut_again():
    zimage: Any = tiny_pipelines.build("zimage")
    words = {"height": 32, "width": 32, "max_sequence_length": 64}
    told = captured(zimage, PROMPTS, **words)
    assert told.batched["cap_feats"].shape == (2, 64, 16)
    lengths = told.batched[LENGTHS + "cap_feats"].tolist()
    assert lengths[1] - lengths[0] == len(PROMPTS[1]) - len(PROMPTS[0])
    assert [len(row) for row in told.kwargs()["cap_feats"]] == lengths
    longer = captured(zimage, PROMPTS[:1], **{**words, "max_sequence_length": 96})
    both = Condition.cat([longer, told])
    assert both.batched["cap_feats"].shape == (3, 96, 16)
    assert torch.equal(both.kwargs()["cap_feats"][0], both.kwargs()["cap_feats"][1])
    swapped = told.replaced_where(torch.tensor([False, True]), longer.expand(2))
    assert [len(row) for row in swapped.kwargs()["cap_feats"]] == lengths[:1] * 2
    assert torch.equal(told.rows(slice(1, 2)).kwargs()["cap_feats"][0], told.kwargs()["cap_feats"][1])


def test_the_pipeline_is_left_as_it_was():
    pipeline: Any = tiny_pipelines.build("sd3")
    before = steps_of(pipeline, tiny_pipelines.call("sd3"))[0]
    captured(pipeline, PROMPTS, height=32, width=32)
    with pytest.raises(UserError, match=r"StableDiffusion3Pipeline refuses the call: .*divisible by 4"):
        captured(pipeline, PROMPTS, height=33, width=32)
    after = steps_of(pipeline, tiny_pipelines.call("sd3"))[0]
    assert torch.equal(before.prediction, after.prediction)


def test_a_pipeline_without_a_known_network():
    pipeline: Any = tiny_pipelines.build("wan")
    pipeline.transformer = None
    with pytest.raises(UserError, match=r"WanPipeline: no denoiser of a known class; known: UNet2DModel, "):
        captured(pipeline, PROMPTS)


def auraflow() -> Any:
    network = AuraFlowTransformer2DModel(sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
        caption_projection_dim=16, out_channels=4, pos_embed_max_size=256)  # fmt: skip
    tokenizer, scheduler = tiny_pipelines.t5_tokenizer(), FlowMatchEulerDiscreteScheduler(shift=1.73)
    text: Any = tiny_pipelines.t5_text(tokenizer, multilingual=True)
    return AuraFlowPipeline(tokenizer, text, tiny_pipelines.vae(0.13025), network, scheduler)


def test_the_worked_example_of_a_new_family(monkeypatch):
    """The page's own lines, on a pipeline of a class that is not in the table."""
    monkeypatch.setattr("fewstep.models.capture.FAMILIES", known := dict(FAMILIES))
    monkeypatch.setattr("fewstep.models.families.FAMILIES", known)
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "AuraFlow" in block]
    seen: list[Any] = []
    names = {"pipeline": tiny_pipelines.settled(auraflow), "seen": seen}
    exec(f"{example}    seen.append(step)", names)
    assert len(seen) == 2
    assert float(seen[0].pipeline.abs().mean()) > 1e-2
    assert "AuraFlowTransformer2DModel" in known
    assert "AuraFlowTransformer2DModel" not in FAMILIES
