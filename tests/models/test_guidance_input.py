"""The guidance scale as an input: silent at the start, embedded as diffusers' pipelines do."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    LatentConsistencyModelPipeline,
    SanaTransformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import VP, Flow
from fewstep.errors import UserError
from fewstep.models.conditioning import NATIVE_SCALE, Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance import Guided
from fewstep.models.guidance_input import at_scale, with_guidance, with_guidance_input
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule, alphas_cumprod
from tests.tiny import alive, unet2d_classes, unet_sd15
from tests.training.runs import vector_denoiser

T = torch.tensor([19.0, 999.0])
RANGE = (1.0, 15.0)


@pytest.fixture
def teacher() -> NetworkDenoiser:
    return make_denoiser(alive(unet_sd15(8)), Schedule(VP(alphas_cumprod({})), Kind.EPS))


TEXT = Condition({"encoder_hidden_states": torch.linspace(-1, 1, 2 * 5 * 16).reshape(2, 5, 16)})


@pytest.mark.parametrize("scale", [1.0, 7.5, 15.0])
def test_the_student_starts_as_its_teacher(teacher, scale):
    student = with_guidance_input(teacher, RANGE)
    x = torch.randn(2, 4, 8, 8)
    expected = teacher(x, T, TEXT).value
    said = student(x, T, with_guidance(TEXT, torch.full((2,), scale), student)).value
    assert torch.equal(said, expected)
    assert torch.equal(student(x, T, TEXT).value, expected), "and without the input"
    assert student.network is not teacher.network


def test_once_trained_it_hears_the_scale(teacher):
    student = with_guidance_input(teacher, RANGE)
    torch.nn.init.normal_(student.parameters()["time_embedding.cond_proj.weight"], std=0.1)
    x = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1)
    text = TEXT.rows(slice(0, 1)).expand(2)
    said = student(x, T[:1].expand(2), with_guidance(text, torch.tensor([2.0, 9.0]), student)).value
    assert float((said[0] - said[1]).abs().max()) > 1e-4


def test_the_embedding_is_diffusers(teacher):
    student = with_guidance_input(teacher, RANGE)
    scales = torch.tensor([1.0, 1.01, 4.0, 7.5, 15.0])
    mine = with_guidance(Condition.none(), scales, student).batched[NATIVE_SCALE]
    its = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scales - 1, embedding_dim=256)  # pyright: ignore
    assert mine.shape == (5, 256)
    torch.testing.assert_close(mine, its, rtol=0, atol=1e-6)
    assert float((mine[0] - mine[1]).abs().max()) > 0.1


def test_a_network_that_has_the_input_keeps_it():
    network = UNet2DConditionModel.from_config(dict(unet_sd15(8).config), time_cond_proj_dim=32)
    assert isinstance(network, UNet2DConditionModel)
    denoiser = make_denoiser(network, Schedule(Flow(), Kind.VELOCITY))
    assert with_guidance_input(denoiser, RANGE).network is network
    assert with_guidance(TEXT, torch.ones(2), denoiser).batched[NATIVE_SCALE].shape == (2, 32)


@pytest.fixture
def pixels() -> NetworkDenoiser:
    return make_denoiser(alive(unet2d_classes(8)), Schedule(Flow(), Kind.VELOCITY))


LABELS = Condition.of_labels(torch.tensor([0, 3]))


def taught(pixels: NetworkDenoiser) -> NetworkDenoiser:
    """A student whose output depends on the scale."""
    student = with_guidance_input(pixels, (2.0, 6.0))
    alive(student.network.get_submodule("time_embedding.second"), 0.3)
    return student


def test_a_student_is_sampled_in_the_middle_of_its_range_or_where_asked(pixels):
    student, x, t = taught(pixels), torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9])
    said = {scale: at_scale(student, scale)(x, t, LABELS).value for scale in (None, 2.0, 4.0, 6.0)}
    mixed = student(x, t, with_guidance(LABELS, torch.tensor([2.0, 6.0]), student)).value
    assert torch.equal(said[None], said[4.0])
    torch.testing.assert_close(mixed, torch.stack([said[2.0][0], said[6.0][1]]))
    assert float((said[2.0] - said[6.0]).abs().max()) > 1e-3
    assert at_scale(pixels) is pixels, "one without the input"


@pytest.mark.parametrize("scale", [1.9, 6.1])
def test_a_scale_outside_the_range_is_refused(pixels, scale):
    with pytest.raises(UserError, match=rf"guidance: {scale} given; .* trained for scales from 2 to 6"):
        at_scale(with_guidance_input(pixels, (2.0, 6.0)), scale)


@pytest.mark.parametrize("build", ["added", "native"])
def test_a_student_with_a_scale_can_itself_be_guided(pixels, teacher, build):
    """Its null condition has no scale of its own: both halves hear the sample's."""
    if build == "added":
        student, given, null = taught(pixels), LABELS, pixels.null
    else:
        student, given = with_guidance_input(teacher, RANGE), TEXT
        torch.nn.init.normal_(student.parameters()["time_embedding.cond_proj.weight"], std=0.1)
        null = Condition({key: torch.zeros_like(value[:1]) for key, value in TEXT.batched.items()})
    assert null is not None
    x, t = torch.randn(2, len(student.network.state_dict()["conv_out.bias"]), 8, 8), torch.tensor([0.2, 0.9])
    scaled = with_guidance(given, torch.tensor([3.0, 5.0]), student)
    with_, without = (student(x, t, one).value for one in (scaled, scaled.nulled(null, 2)))
    guided = Guided(student, null, 2.0)(x, t, scaled).value
    torch.testing.assert_close(guided, without + 2 * (with_ - without), rtol=1e-4, atol=1e-5)
    assert float((guided - with_).abs().max()) > 1e-4


@pytest.mark.parametrize("build", ["unet2d", "vector"])
def test_with_an_added_input_the_student_starts_at_a_distance_of_zero(pixels, build):
    """From the conditional teacher, at every scale, and in training too: a run starts where its teacher stands."""
    start = pixels if build == "unet2d" else vector_denoiser()
    student = with_guidance_input(start, (1.0, 5.0))
    x = torch.randn(2, 3, 8, 8) if build == "unet2d" else torch.randn(2, 2)
    t, expected = torch.tensor([0.2, 0.9]), start(x, torch.tensor([0.2, 0.9]), LABELS).value
    for scale in (1.0, 3.7, 5.0):
        said = student(x, t, with_guidance(LABELS, torch.full((2,), scale), student)).value
        assert float((said - expected).abs().max()) == 0.0
    added = [name for name, p in student.parameters().items() if ".second." in name and not p.any()]
    assert added, "nothing is silent, so nothing was added"


@pytest.mark.parametrize(("name", "unit"), [("flux2", 1.0), ("sana", 0.1)])
def test_networks_made_for_a_scale_are_told_it_as_their_pipelines_tell_it(name, unit):
    """The number itself for Flux2; for Sana-Sprint times `guidance_embeds_scale`."""
    if name == "flux2":
        network: nn.Module = Flux2Transformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=48, timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4), guidance_embeds=True)  # fmt: skip
        ids = {"img_ids": torch.zeros(4, 4), "txt_ids": torch.zeros(5, 4)}
        x, told = torch.randn(2, 4, 16), Condition({"encoder_hidden_states": torch.randn(2, 5, 48)}, ids)
    else:
        network = SanaTransformer2DModel(patch_size=1, in_channels=4, out_channels=4, num_layers=1, sample_size=4,
            num_attention_heads=2, attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4,
            cross_attention_dim=8, caption_channels=16, guidance_embeds=True)  # fmt: skip
        x, told = torch.randn(2, 4, 4, 4), Condition({"encoder_hidden_states": torch.randn(2, 5, 16)})
    denoiser = make_denoiser(alive(network), Schedule(Flow(), Kind.VELOCITY))
    student = with_guidance_input(denoiser, (1.0, 8.0))
    assert student.network is network
    scale = torch.tensor([2.0, 6.5])
    t = torch.tensor([0.25, 0.5])
    heard = t if name == "flux2" else 1000 * t
    with torch.no_grad():
        said = student(x, t, with_guidance(told, scale, student)).value
        plain = network(hidden_states=x, timestep=heard, guidance=unit * scale, **told.kwargs(), return_dict=False)[0]
    assert torch.equal(said, plain)
    assert not torch.equal(said, student(x, t, with_guidance(told, scale + 1, student)).value)
