"""Scalar inputs that are added to a network: silent at the start, each network's its own, differentiable."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SanaTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.models.conditioning import SPAN, Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.graft import Graft, GraftedEmbedding, sinusoid
from fewstep.models.load import make_denoiser
from fewstep.models.players import Player
from fewstep.models.schedule import Schedule
from fewstep.models.vector_network import VectorConfig, VectorNetwork
from tests import tiny

T = torch.tensor([0.2, 0.9])


def vectors() -> VectorNetwork:
    torch.manual_seed(0)
    return VectorNetwork(VectorConfig(3, 4, (0.0, 0.0, 0.0), 1.0, width=16, depth=1))


def flux() -> FluxTransformer2DModel:
    """Packed latents `(B, 16, 4)` of a 4 × 4 grid, with a guidance embedding beside the time's."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()


def pixart() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
    ).eval()


def sana() -> SanaTransformer2DModel:
    torch.manual_seed(0)
    return SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=8,
    ).eval()


def called(network: nn.Module) -> dict[str, Any]:
    """Keyword arguments of one call in float64, of any class that a graft is tested on."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    time = torch.tensor([200.0, 700.0])
    words: dict[str, Any] = {"hidden_states": randn(4, 8, 8), "timestep": time, "encoder_hidden_states": randn(5, 16)}
    match network:
        case FluxTransformer2DModel():
            grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
            words |= {"hidden_states": randn(16, 4), "timestep": time / 1000, "pooled_projections": randn(8)}
            return words | {"img_ids": grid, "txt_ids": torch.zeros(5, 3), "guidance": torch.full((2,), 3.5)}
        case PixArtTransformer2DModel():
            return words | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        case SanaTransformer2DModel():
            return words
    given = tiny.inputs(network)
    return {key: x.double() if x.is_floating_point() else x for key, x in given.items()} | {"timestep": time}


@dataclass(frozen=True)
class Case:
    """A class, where it takes a scalar, how often, and how well a finite difference of step `step` does there.

    Flux turns its queries in float32 and Sana's linear attention computes in it, so small steps see rounding.
    """

    build: Callable[[], nn.Module]
    place: str = "timestep_embedder"
    count: int = 1
    step: float = 1e-5
    error: float = 1e-6


CLASSES = {
    "UNet2DModel": Case(tiny.unet2d, "time_embedding"),
    "UNet2DConditionModel": Case(tiny.unet_sd15, "time_embedding"),
    "DiTTransformer2DModel": Case(tiny.dit, count=2),
    "SD3Transformer2DModel": Case(tiny.sd3),
    "FluxTransformer2DModel": Case(flux, step=5e-4, error=1e-3),
    "PixArtTransformer2DModel": Case(pixart),
    "SanaTransformer2DModel": Case(sana, step=5e-4, error=1e-3),
}


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_of_diffusers_takes_a_span(name):
    """Silent at first; heard once trained, with the derivative of finite differences; its file has the class's keys."""
    case = CLASSES[name]
    network = tiny.alive(case.build()).double()
    words, keys, saved = called(network), list(network.state_dict()), copy.deepcopy(network.state_dict())
    before = network(**words, return_dict=False)[0]
    graft = Graft().grown(network, case.place, SPAN, 10.0)

    def told(span: Tensor) -> Tensor:
        with graft.hearing({SPAN: span}):
            return network(**words, return_dict=False)[0]

    span, step = torch.tensor([0.1, 0.6], dtype=torch.float64), case.step
    assert torch.equal(told(span), before)
    gained = set(network.state_dict()) - set(keys)
    assert set(keys) <= set(network.state_dict())
    assert len(gained) == 4 * case.count
    assert all(f".second.{SPAN}." in key for key in gained)
    for one in network.modules():
        if isinstance(one, GraftedEmbedding):
            tiny.alive(one.second, 0.3)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        slope = torch.func.jvp(told, (span,), (torch.ones_like(span),))[1]
        difference = (told(span + step) - told(span - step)) / (2 * step)
    assert float(slope.abs().max()) > 1e-4
    assert float((slope - difference).norm() / slope.norm()) < case.error
    heard = told(span)
    network.load_state_dict({**network.state_dict(), **saved})
    assert torch.equal(told(span), heard), "the class's own keys are the base's weights"
    assert set(network.load_state_dict(saved, strict=False).missing_keys) == gained


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "UNet2DModel": (tiny.unet2d_classes, 1),
    "UNet2DConditionModel": (tiny.unet_sd15, 1),
    "DiTTransformer2DModel": (tiny.dit, 2),
    "SD3Transformer2DModel": (tiny.sd3, 1),
    "VectorNetwork": (vectors, 1),
}


def teacher_of(name: str) -> NetworkDenoiser:
    return make_denoiser(tiny.alive(NETWORKS[name][0]()), Schedule(Flow(), Kind.VELOCITY))


def told(denoiser: NetworkDenoiser) -> tuple[Tensor, Condition]:
    """A noisy batch of two with its condition."""
    if isinstance(denoiser.network, VectorNetwork):
        return torch.randn(2, 3), Condition.of_labels(torch.tensor([0, 2]))
    words = tiny.inputs(denoiser.network)
    x, _ = words.pop(denoiser.family.sample), words.pop("timestep")
    return x, Condition.of_labels(torch.tensor([0, 2])) if denoiser.null is not None else Condition(words)


def scaled(condition: Condition, **scalars: Tensor) -> Condition:
    return Condition({**condition.batched, **{f"scalars.{k}": v for k, v in scalars.items()}}, condition.shared)


def grafts(denoiser: NetworkDenoiser) -> list[GraftedEmbedding]:
    return [one for one in denoiser.network.modules() if isinstance(one, GraftedEmbedding)]


def trained(denoiser: NetworkDenoiser, std: float = 0.3) -> NetworkDenoiser:
    """Its inputs heard, as after training."""
    for one in grafts(denoiser):
        tiny.alive(one.second, std)
    return denoiser


@pytest.mark.parametrize("name", NETWORKS)
def test_a_grafted_network_starts_as_its_teacher_bit_for_bit(name):
    teacher = teacher_of(name)
    x, condition = told(teacher)
    before = teacher(x, T, condition).value
    student = teacher.with_scalar("guidance").with_scalar("interval", 1000.0)
    for scale in (0.0, 1.0, 7.5):
        words = scaled(condition, guidance=torch.full((2,), scale), interval=torch.tensor([0.1, scale]))
        assert torch.equal(student(x, T, words).value, before)
    assert torch.equal(student(x, T, condition).value, before), "and without the inputs"
    assert torch.equal(teacher(x, T, condition).value, before)
    assert len(grafts(student)) == NETWORKS[name][1]
    assert grafts(teacher) == []


@pytest.mark.parametrize("name", NETWORKS)
def test_once_trained_each_sample_hears_its_own_scalar(name):
    student = trained(teacher_of(name).with_scalar("guidance"))
    x, condition = told(student)
    low, high = (student(x, T, scaled(condition, guidance=torch.full((2,), s))).value for s in (2.0, 5.0))
    both = student(x, T, scaled(condition, guidance=torch.tensor([2.0, 5.0]))).value
    torch.testing.assert_close(both, torch.stack([low[0], high[1]]), rtol=1e-4, atol=1e-5)
    assert float((low - high).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_the_zero_layer_is_where_learning_starts(name):
    student = teacher_of(name).with_scalar("guidance")
    player = Player(student.parameters())
    player.require_grad(True)
    x, condition = told(student)
    student(x, T, scaled(condition, guidance=torch.tensor([2.0, 5.0]))).value.square().mean().backward()
    added = {name: p for name, p in player.parameters.items() if ".second.guidance." in name}
    moving = {name for name, p in added.items() if p.grad is not None and bool(p.grad.any())}
    zero = {name for name, p in added.items() if not bool(p.any())}
    assert len(added) == 4 * NETWORKS[name][1]
    assert moving == zero
    assert len(zero) == 2 * NETWORKS[name][1], "weight and bias of the last layer"


@pytest.mark.parametrize("duplicate", [NetworkDenoiser.copy, copy.deepcopy, lambda one: one.follower("target")])
def test_copies_hear_their_own_scalars_only(duplicate):
    first = trained(teacher_of("DiTTransformer2DModel").with_scalar("guidance"))
    x, condition = told(first)
    words = scaled(condition, guidance=torch.tensor([2.0, 5.0]))
    expected, plain = first(x, T, words).value, first(x, T, condition).value
    second = duplicate(first)
    assert torch.equal(second(x, T, words).value, expected)
    with first.graft.hearing({"guidance": torch.tensor([2.0, 5.0])}):
        assert torch.equal(second(x, T, condition).value, plain), "the other network is in a pass of its own"
    assert {id(one.scalars) for one in grafts(second)} == {id(second.graft.scalars)}
    assert second.graft.scalars is not first.graft.scalars
    trained(second, 1.0)
    assert torch.equal(first(x, T, words).value, expected)


def test_a_pass_that_fails_leaves_nothing_behind():
    student = trained(teacher_of("VectorNetwork").with_scalar("guidance"))
    x, condition = told(student)
    plain = student(x, T, condition).value
    with pytest.raises(RuntimeError):
        student(x[:, :2], T, scaled(condition, guidance=torch.ones(2)))
    assert student.graft.scalars.values == {}
    assert torch.equal(student(x, T, condition).value, plain)


def test_an_adapter_on_a_grafted_network_reaches_the_input_too():
    student = trained(teacher_of("UNet2DModel").with_scalar("guidance"))
    x, condition = told(student)
    words = scaled(condition, guidance=torch.tensor([2.0, 5.0]))
    expected = student(x, T, words).value
    view = student.lora_view("student", 2)
    assert torch.equal(view(x, T, words).value, expected)
    assert torch.equal(student(x, T, words).value, expected)
    view(x, T, words).value.square().mean().backward()
    heard = [p for name, p in view.parameters().items() if ".second.guidance." in name]
    assert sum(p.grad is not None and bool(p.grad.any()) for p in heard) == 2
    with pytest.raises(UserError, match="the network is shared by adapters"):
        student.with_scalar("interval")
    assert view.with_scalar("interval").network is student.network


@pytest.mark.parametrize("name", ["UNet2DModel", "DiTTransformer2DModel", "VectorNetwork"])
def test_the_forward_derivative_along_a_scalar(name):
    """Against a central difference in float64: the sinusoid is not rounded to float32 on the way."""
    student = trained(teacher_of(name).with_scalar("interval", 10.0))
    student.network.double()
    x, condition = told(student)

    def value(length: Tensor) -> Tensor:
        return student(x.double(), T.double(), scaled(condition, interval=length)).value

    length, step = torch.tensor([0.1, 0.4], dtype=torch.float64), 1e-5
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tangent = torch.func.jvp(value, (length,), (torch.ones_like(length),))[1]
        difference = (value(length + step) - value(length - step)) / (2 * step)
    assert float((tangent - difference).abs().max() / difference.abs().max()) < 1e-6
    assert student.graft.scalars.values == {}


def test_the_sinusoid_is_diffusers_time_embedding():
    from diffusers.models.embeddings import get_timestep_embedding

    value = torch.tensor([0.0, 0.3, 4.0, 700.0])
    its = get_timestep_embedding(value, 16, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(sinusoid(value, 16), its, rtol=0, atol=1e-4)


def test_half_precision_weights_hear_neighbouring_scalars():
    """In bf16, 7.5 and 7.51 are one number; their sinusoids, made in float32, are two."""
    student = trained(teacher_of("VectorNetwork").with_scalar("interval", 1000.0))
    embedding = grafts(student)[0].second["interval"].bfloat16()
    near = embedding(torch.tensor([7.5, 7.501]))
    assert near.dtype == torch.bfloat16
    assert float((near[0] - near[1]).detach().abs().max()) > 0.05


def test_a_network_without_a_time_embedding_is_told():
    teacher = teacher_of("VectorNetwork")
    for place in ("", "nowhere"):
        with pytest.raises(UserError, match="VectorNetwork has no time embedding"):
            replace(teacher, family=replace(teacher.family, time_embedding=place)).with_scalar("guidance")


def test_a_compiled_network_hears_each_scalar():
    student = trained(teacher_of("VectorNetwork").with_scalar("guidance"))
    x, condition = told(student)
    words = [scaled(condition, guidance=torch.full((2,), s)) for s in (2.0, 5.0)]
    expected = [student(x, T, one).value for one in [*words, condition]]
    student.network.compile(backend="eager")
    for one, value in zip([*words, condition], expected, strict=True):
        torch.testing.assert_close(student(x, T, one).value, value)
