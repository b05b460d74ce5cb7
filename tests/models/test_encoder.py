"""The ends of a pipeline folder: what they say is what the whole pipeline says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.capture import Capture
from fewstep.models.conditioning import Condition
from fewstep.models.encoder import Encoder, open_encoder
from fewstep.models.load import load_denoiser
from tests import tiny_pipelines
from tests.tiny_pipelines import SIDE

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy, of diffusers

LATENT = [name for name in tiny_pipelines.PIPELINES if name not in ("ddpm", "flux_guidance", "playground")]
CAPTIONS = ["a red cat", "a blue dog on a hill", ""]


@dataclass(frozen=True)
class Opened:
    """A pipeline, and the ends of its folder."""

    name: str
    folder: Path
    pipeline: Any
    encoder: Encoder


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Opened]:
    """The pipeline of a name; built and saved once."""
    made: dict[str, Opened] = {}

    def get(name: str) -> Opened:
        if name not in made:
            folder = tiny_pipelines.saved(name, tmp_path_factory.mktemp("pipelines"))
            encoder = open_encoder(str(folder), side=SIDE, call=tiny_pipelines.facts(name))
            made[name] = Opened(name, folder, tiny_pipelines.build(name), encoder)
        return made[name]

    return get


def same(one: Condition, other: Condition) -> None:
    assert (list(one.batched), list(one.shared)) == (list(other.batched), list(other.shared))
    for key, value in one.kwargs().items():
        torch.testing.assert_close(value, other.kwargs()[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in LATENT if name != "dit"])
def test_conditions_are_those_of_the_whole_pipeline(opened, name):
    one = opened(name)
    whole = Capture(one.pipeline, one.encoder.capture.call)
    same(one.encoder.prompts(CAPTIONS), whole.prompts(CAPTIONS))
    same(one.encoder.null(), whole.null())


def test_conditions_of_a_video_pipeline_are_of_the_one_frame_that_its_latents_have(opened):
    """CogVideoX tells the network positions, as many as the pipeline makes frames."""
    one = opened("cogvideox")
    facts = {key: value for key, value in tiny_pipelines.facts("cogvideox").items() if key != "num_frames"}
    same(open_encoder(str(one.folder), side=SIDE, call=facts).prompts(CAPTIONS), one.encoder.prompts(CAPTIONS))


def decoded(one: Opened, latents: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What the whole pipeline makes `(B, 3, H, W)` of latents that its last step is said to have given."""

    class Given(tuple):  # pipelines read a step's result as a tuple or by name
        prev_sample = latents

    def step(prediction: Tensor, timestep: Any, x: Tensor, *args: Any, **kwargs: Any) -> Given:
        assert x.shape[1:] == latents.shape[1:]
        return Given((latents, latents))

    monkeypatch.setattr(one.pipeline.scheduler, "step", step)
    call = tiny_pipelines.call(one.name, output_type="np" if one.name == "dit" else "pt", return_dict=False)
    images = torch.as_tensor(one.pipeline(**call)[0])
    return images[:, 0] if one.name in ("wan", "cogvideox") else images.movedim(-1, 1) if one.name == "dit" else images


@pytest.mark.parametrize("name", LATENT)
def test_images_are_those_of_the_whole_pipeline_and_latents_the_way_back(opened, name, monkeypatch):
    one, side = opened(name), 16 if name == "dit" else SIDE
    latents = torch.randn(2, *one.encoder.latent_shape(side))
    images = one.encoder.images(latents)
    torch.testing.assert_close(images / 2 + 0.5, decoded(one, latents, monkeypatch), rtol=0, atol=1e-6)
    assert images.shape == (2, 3, side, side)
    assert float(images.std()) > 0.01

    vae, given = one.pipeline.vae, torch.rand(2, 3, side, side) * 2 - 1
    said = vae.encode(given[:, :, None] if name in ("wan", "qwen", "cogvideox") else given, return_dict=False)[0]
    straight = vae.decode(said if isinstance(said, Tensor) else said.mode(), return_dict=False)[0].clamp(-1, 1)
    found = one.encoder.latents(given)
    assert found.shape == (2, *one.encoder.latent_shape(side))
    torch.testing.assert_close(one.encoder.images(found), straight.view(given.shape), rtol=0, atol=1e-5)


def test_latents_are_scaled_as_the_network_takes_them(opened):
    one, images = opened("sd3").encoder, torch.rand(1, 3, 16, 16) * 2 - 1
    mode = opened("sd3").pipeline.vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(one.latents(images), (mode - 0.0609) * 1.5305)


def test_latents_are_drawn_from_the_generator_alone(opened):
    encoder, images = opened("sd15").encoder, torch.rand(1, 3, 16, 16) * 2 - 1
    drawn = [encoder.latents(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], encoder.latents(images))


def test_the_denoiser_s_weights_are_not_loaded(opened):
    network = opened("flux").encoder.capture.network
    storages = {p.untyped_storage().data_ptr() for p in network.parameters()}
    assert len(storages) == 1
    assert next(network.parameters()).untyped_storage().nbytes() == 4


def test_sizes_in_pixels(opened):
    assert opened("flux").encoder.latent_shape(64) == (256, 16)
    assert opened("wan").encoder.latent_shape(64) == (16, 1, 8, 8)
    with pytest.raises(UserError, match=r"side: 30 pixels given; AutoencoderKL here takes multiples of 4"):
        opened("flux").encoder.latent_shape(30)
    with pytest.raises(UserError, match=r"side: 33 pixels given; AutoencoderKL here takes multiples of 2"):
        opened("sd15").encoder.latents(torch.zeros(1, 3, 33, 33))


@pytest.mark.parametrize("name", ["flux", "flux2_klein", "sd15", "wan"])
def test_latents_of_oblong_images(opened, name):
    """Packed tokens do not tell the height from the width; they go the pipeline's way with both."""
    one, size = opened(name), (16, 40) if name != "wan" else (16, 48)
    given = torch.rand(2, 3, *size) * 2 - 1
    latents = one.encoder.latents(given)
    assert latents.shape == (2, *one.encoder.latent_shape(size))
    said = one.pipeline.vae.encode(given[:, :, None] if name == "wan" else given).latent_dist.mode()
    straight = one.pipeline.vae.decode(said, return_dict=False)[0].clamp(-1, 1).view(given.shape)
    torch.testing.assert_close(one.encoder.images(latents, size), straight, rtol=0, atol=1e-5)


def test_packed_latents_of_another_size_are_refused(opened):
    encoder = opened("flux").encoder
    with pytest.raises(UserError, match=r"size: none given; 40 tokens are of images of another height and width"):
        encoder.images(torch.zeros(1, 40, 16))
    with pytest.raises(UserError, match=r"size: 16×16 pixels given; 40 tokens are of images of another height"):
        encoder.images(torch.zeros(1, 40, 16), (16, 16))


def outside() -> DiffusionPipeline:
    """SD1.5 of other widths throughout, a VAE of factor 4, text of 24 numbers."""
    widths = {"block_out_channels": (12, 24), "cross_attention_dim": 24, "norm_num_groups": 3, "sample_size": 6}
    made: Any = tiny_pipelines.sd15(**widths)
    vae, text = tiny_pipelines.vae(0.7, levels=3), tiny_pipelines.clip_text(made.tokenizer, width=24)
    return StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=made.tokenizer, unet=made.unet,  # pyright: ignore[reportArgumentType]
                                   scheduler=made.scheduler, safety_checker=None, feature_extractor=None,  # pyright: ignore[reportArgumentType]
                                   requires_safety_checker=False)  # fmt: skip


def test_an_outside_model_works_without_code(tmp_path):
    pipeline: Any = tiny_pipelines.settled(outside)
    pipeline.save_pretrained(tmp_path)
    encoder, denoiser = open_encoder(str(tmp_path)), load_denoiser(str(tmp_path))
    shape = encoder.latent_shape(24)
    assert shape == (4, 6, 6)
    x, t = torch.randn(2, *shape), torch.tensor([100.0, 900.0])
    condition = encoder.prompts(["a red cat", "a dog"])
    assert condition.batched["encoder_hidden_states"].shape == (2, 77, 24)
    text = pipeline.encode_prompt(["a red cat", "a dog"], "cpu", 1, False)[0]
    with torch.no_grad():
        expected = pipeline.unet(x, t, encoder_hidden_states=text).sample
        torch.testing.assert_close(denoiser(x, t, condition).value, expected)
    assert encoder.images(x).shape == (2, 3, 24, 24)


MISSING = [
    ("text_encoder", "no text_encoder; prompts need it"),
    ("tokenizer", "no tokenizer; prompts need it"),
    ("vae", "no vae; latents and images need one"),
    ("scheduler", "scheduler: no scheduler_config.json; a diffusers pipeline folder is needed"),
]


@pytest.mark.parametrize(("part", "told"), MISSING)
def test_what_is_missing_is_told_when_it_is_needed(opened, tmp_path, part, told):
    folder = shutil.copytree(opened("sd15").folder, tmp_path / "one")
    shutil.rmtree(folder / part)

    def use() -> object:
        found = open_encoder(str(folder), side=SIDE)
        return found.latents(torch.zeros(1, 3, 16, 16)) if part == "vae" else found.prompts(["a cat"])

    with pytest.raises(UserError, match=told) as caught:
        use()
    assert "\n" not in str(caught.value)


def test_pipelines_without_text(opened):
    with pytest.raises(UserError, match="DiTPipeline has no text encoder; prompts need one"):
        opened("dit").encoder.prompts(["a cat"])
    assert opened("dit").encoder.null().batched["class_labels"].tolist() == [1000]
    with pytest.raises(UserError, match="DDPMPipeline: takes neither prompts nor class labels"):
        opened("ddpm").encoder.null()


def test_a_folder_of_another_pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "X", "unet": ["diffusers", "UNet3D"]}))
    with pytest.raises(UserError, match=r"one network of UNet2DModel, .* is needed; its components are unet: UNet3D"):
        open_encoder(str(tmp_path))
