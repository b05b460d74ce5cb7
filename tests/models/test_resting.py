"""Encoders that rest in the host's memory: one of them away at a time, and the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models import resting
from fewstep.models.encoder import Encoder, open_encoder
from tests import tiny_pipelines
from tests.tiny_pipelines import SIDE

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy, of diffusers

CAPTIONS = ["a red cat", "a blue dog on a hill", ""]
LATENT = [name for name in tiny_pipelines.PIPELINES if name not in ("ddpm", "dit", "flux_guidance")]


@contextmanager
def copied(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Inside, a visit is a copy, so that where weights lie can be told on one device; the copies' addresses."""
    there: set[int] = set()
    alive: list[Tensor] = []

    def brought(tensor: Tensor, device: torch.device) -> Tensor:
        alive.append(tensor.clone())
        there.add(alive[-1].data_ptr())
        return alive[-1]

    with monkeypatch.context() as patch:
        patch.setattr(resting, "brought", brought)
        yield there


def modules(encoder: Encoder) -> dict[str, nn.Module]:
    found = {name: one for name, one in encoder.capture.pipeline.components.items() if isinstance(one, nn.Module)}
    return {name: one for name, one in found.items() if one is not encoder.capture.network}


def visitors(encoder: Encoder, there: set[int]) -> set[str]:
    """Those who have weights on the device now."""
    found = modules(encoder).items()
    return {name for name, one in found if any(p.data_ptr() in there for p in one.parameters())}


def noted(encoder: Encoder, there: set[int]) -> list[set[str]]:
    """Who is away whenever somebody computes, filled as they do."""
    seen: list[set[str]] = []
    for one in modules(encoder).values():
        for layer in one.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
                layer.register_forward_pre_hook(lambda *_: seen.append(visitors(encoder, there)))
    return seen


def check(name: str, folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words: dict[str, Any] = {"side": SIDE, "call": tiny_pipelines.facts(name)}
    stays, rests = open_encoder(str(folder), **words), open_encoder(str(folder), **words, rest=True)
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with copied(monkeypatch) as there:
        seen = noted(rests, there)
        told, null, latents = rests.prompts(CAPTIONS), rests.null(), rests.latents(images)
        pictures, shape = rests.images(latents), rests.latent_shape(SIDE)
        assert visitors(rests, there) == set()
    assert {len(away) for away in seen} == {1}
    assert set().union(*seen) == set(modules(rests))
    expected = stays.prompts(CAPTIONS), stays.null()
    for one, other in zip((told, null), expected, strict=True):
        assert list(one.batched) == list(other.batched)
        for key, value in one.batched.items():
            assert torch.equal(value, other.batched[key]), key
    assert torch.equal(latents, stays.latents(images))
    assert torch.equal(pictures, stays.images(latents))
    assert shape == stays.latent_shape(SIDE)


def test_one_visits_at_a_time_and_says_the_same_to_the_bit(tmp_path, monkeypatch):
    check("sd3", tiny_pipelines.saved("sd3", tmp_path), monkeypatch)


def test_pipelines_are_told_where_their_resting_modules_compute(tmp_path):
    there = torch.device("cpu", 0)
    encoder = open_encoder(str(tiny_pipelines.saved("sd15", tmp_path)), there, side=SIDE, rest=True)
    assert encoder.capture.pipeline._execution_device == there


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sd3", "flux2_klein"])
def test_weights_come_to_cuda_and_go_again(tmp_path, name):
    words: dict[str, Any] = {"side": SIDE, "call": tiny_pipelines.facts(name)}
    folder, images = str(tiny_pipelines.saved(name, tmp_path)), torch.rand(2, 3, SIDE, SIDE)
    stays, rests = open_encoder(folder, "cuda", **words), open_encoder(folder, "cuda", **words, rest=True)
    for key, value in stays.prompts(CAPTIONS).batched.items():
        assert torch.equal(value, rests.prompts(CAPTIONS).batched[key]), key
    latents = rests.latents(images)
    assert latents.is_cuda
    assert torch.equal(latents, stays.latents(images))
    assert torch.equal(rests.images(latents), stays.images(latents))
    tensors = [p for one in modules(rests).values() for p in one.parameters()]
    assert all(p.device.type == "cpu" and p.is_pinned() for p in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("name", LATENT)
def test_every_family_rests(tmp_path, monkeypatch, name):
    check(name, tiny_pipelines.saved(name, tmp_path), monkeypatch)


def test_nobody_is_left_away_by_a_mistake(tmp_path, monkeypatch):
    encoder = open_encoder(str(tiny_pipelines.saved("sd15", tmp_path)), side=SIDE, rest=True)
    with copied(monkeypatch) as there:
        with pytest.raises(UserError, match="side: 33 pixels given"):
            encoder.latents(torch.zeros(1, 3, 33, 33))
        assert there, "the VAE is asked what sides it takes"
        assert visitors(encoder, there) == set()


def test_the_vae_alone_reads_no_text_encoder(tmp_path, monkeypatch):
    folder = tiny_pipelines.saved("sd15", tmp_path)
    monkeypatch.setattr("transformers.CLIPTextModel.from_pretrained", lambda *_, **__: pytest.fail("opened"))
    encoder = open_encoder(str(folder), parts="vae")
    assert set(modules(encoder)) == {"vae"}
    assert encoder.images(torch.zeros(1, *encoder.latent_shape(16))).shape == (1, 3, 16, 16)
