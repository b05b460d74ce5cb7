"""The guidance scale as an input: silent at the start, embedded as diffusers' pipelines do."""

from __future__ import annotations

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import VP, Flow
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance_input import KEY, with_guidance, with_guidance_input
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule, alphas_cumprod
from tests.tiny import alive, unet2d, unet_sd15

T = torch.tensor([19.0, 999.0])


@pytest.fixture
def teacher() -> NetworkDenoiser:
    return make_denoiser(alive(unet_sd15(8)), Schedule(VP(alphas_cumprod({})), Kind.EPS))


TEXT = Condition({"encoder_hidden_states": torch.linspace(-1, 1, 2 * 5 * 16).reshape(2, 5, 16)})


@pytest.mark.parametrize("scale", [1.0, 7.5, 15.0])
def test_the_student_starts_as_its_teacher(teacher, scale):
    student = with_guidance_input(teacher)
    x = torch.randn(2, 4, 8, 8)
    expected = teacher(x, T, TEXT).value
    said = student(x, T, with_guidance(TEXT, torch.full((2,), scale), student)).value
    assert torch.equal(said, expected)
    assert torch.equal(student(x, T, TEXT).value, expected), "and without the input"
    assert student.network is not teacher.network


def test_once_trained_it_hears_the_scale(teacher):
    student = with_guidance_input(teacher)
    torch.nn.init.normal_(student.parameters()["time_embedding.cond_proj.weight"], std=0.1)
    x = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1)
    text = TEXT.rows(slice(0, 1)).expand(2)
    said = student(x, T[:1].expand(2), with_guidance(text, torch.tensor([2.0, 9.0]), student)).value
    assert float((said[0] - said[1]).abs().max()) > 1e-4


def test_the_embedding_is_diffusers(teacher):
    student = with_guidance_input(teacher)
    scales = torch.tensor([1.0, 1.01, 4.0, 7.5, 15.0])
    mine = with_guidance(Condition.none(), scales, student).batched[KEY]
    its = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scales - 1, embedding_dim=256)  # pyright: ignore
    assert mine.shape == (5, 256)
    torch.testing.assert_close(mine, its, rtol=0, atol=1e-6)
    assert float((mine[0] - mine[1]).abs().max()) > 0.1


def test_a_network_that_has_the_input_keeps_it():
    network = UNet2DConditionModel.from_config(dict(unet_sd15(8).config), time_cond_proj_dim=32)
    assert isinstance(network, UNet2DConditionModel)
    denoiser = make_denoiser(network, Schedule(Flow(), Kind.VELOCITY))
    assert with_guidance_input(denoiser) is denoiser
    assert with_guidance(TEXT, torch.ones(2), denoiser).batched[KEY].shape == (2, 32)


def test_other_networks_have_no_such_input(teacher):
    with pytest.raises(UserError, match=r"method.guidance_range: only UNet2DConditionModel .* found UNet2DModel"):
        with_guidance_input(make_denoiser(unet2d(8), Schedule(Flow(), Kind.VELOCITY)))
    with pytest.raises(UserError, match=r"method.guidance_range: .* leave out student.lora"):
        with_guidance_input(teacher.lora_view("student", 2))
