"""A denoiser says what a hand-made call of the diffusers network says."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import EDM, VP, Flow, Process, TrigFlow
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.families import FAMILIES, family_of, scheduler_time
from fewstep.models.guidance import Guided
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule, alphas_cumprod
from tests.tiny import alive, dit, sd3, unet2d, unet2d_classes, unet_sd15

TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class Case:
    """A network with its input, and the keyword arguments its pipeline would pass."""

    network: nn.Module
    x: Tensor
    condition: Condition

    def denoiser(self, process: Process, kind: Kind) -> NetworkDenoiser:
        return make_denoiser(self.network, Schedule(process, kind))


def case(name: str, batch: int = 3) -> Case:
    generator = torch.Generator().manual_seed(4)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    match name:
        case "unet2d":
            return Case(alive(unet2d(8)), randn(3, 8, 8), Condition.none())
        case "unet2d_classes":
            return Case(alive(unet2d_classes(8, 4)), randn(3, 8, 8), Condition.of_labels(torch.arange(batch)))
        case "unet_sd15":
            return Case(alive(unet_sd15(8)), randn(4, 8, 8), Condition({"encoder_hidden_states": randn(5, 16)}))
        case "dit":
            return Case(alive(dit(8)), randn(4, 8, 8), Condition.of_labels(torch.arange(batch)))
    text = {"encoder_hidden_states": randn(5, 24), "pooled_projections": randn(12)}
    return Case(alive(sd3(8)), randn(4, 8, 8), Condition(text))


NAMES = ("unet2d", "unet2d_classes", "unet_sd15", "dit", "sd3")


@pytest.mark.parametrize("name", NAMES)
def test_on_vp_the_network_sees_the_table_s_index(name):
    one = case(name)
    process = VP(alphas_cumprod(TABLE))
    t = torch.tensor([10.0, 500.0, 999.0])
    said = one.denoiser(process, Kind.EPS)(one.x, t, one.condition)
    by_hand = one.network(one.x, timestep=t, **one.condition.batched, return_dict=False)[0][:, : one.x.shape[1]]
    assert said.value.abs().mean() > 0.01
    assert torch.equal(said.value, by_hand)
    abar = process.alphas_cumprod[t.long()].view(3, 1, 1, 1)
    expected = (one.x - (1 - abar).sqrt() * by_hand) / abar.sqrt()
    torch.testing.assert_close(said.x0, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_on_flow_the_network_sees_a_thousand_times_t(name):
    one = case(name)
    t = torch.tensor([0.0625, 0.5, 1.0])
    said = one.denoiser(Flow(3.0), Kind.VELOCITY)(one.x, t, one.condition)
    by_hand = one.network(one.x, timestep=1000 * t, **one.condition.batched, return_dict=False)[0]
    by_hand = by_hand[:, : one.x.shape[1]]
    assert torch.equal(said.value, by_hand)
    torch.testing.assert_close(said.x0, one.x - t.view(3, 1, 1, 1) * by_hand)


def test_the_learned_variance_is_split_off():
    one = case("dit")
    t = torch.full((3,), 500.0)
    whole = one.network(one.x, timestep=t, **one.condition.batched, return_dict=False)[0]
    assert whole.shape == (3, 8, 8, 8)
    said = one.denoiser(VP(alphas_cumprod(TABLE)), Kind.EPS)(one.x, t, one.condition)
    assert torch.equal(said.value, whole[:, :4])


def test_no_label_is_dropped_by_the_network_itself():
    """DiT drops a tenth of its labels in training mode, students included: eval mode is for good."""
    network = alive(dit(8)).train()
    student = make_denoiser(network, Schedule(Flow(), Kind.VELOCITY)).copy()
    student.network.requires_grad_(True)
    x, t, labels = torch.randn(1, 4, 8, 8).expand(64, -1, -1, -1), torch.full((64,), 0.5), torch.zeros(64).long()
    value = student(x, t, Condition.of_labels(labels)).value
    torch.testing.assert_close(value, value[:1].expand_as(value), rtol=0, atol=1e-5)
    assert not student.network.training


def test_time_stays_float32_beside_a_bf16_network():
    seen = []
    one = case("unet2d_classes")
    denoiser = one.denoiser(Flow(), Kind.VELOCITY)
    one.network.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["timestep"]), with_kwargs=True)
    with torch.autocast("cpu", torch.bfloat16):
        said = denoiser(one.x, torch.tensor([0.123456, 0.5, 0.9]), one.condition)
    assert seen[0].dtype == torch.float32
    assert float(seen[0][0]) == pytest.approx(123.456, abs=1e-4)
    assert said.value.dtype == torch.bfloat16
    assert said.x0.dtype == torch.float32


def test_the_timestep_of_every_process():
    t = torch.tensor([0.25, 1.0])
    assert scheduler_time(VP(alphas_cumprod(TABLE)), t).tolist() == [0.25, 1.0]
    assert scheduler_time(Flow(), t).tolist() == [250.0, 1000.0]
    assert scheduler_time(TrigFlow(), t).tolist() == [0.25, 1.0]
    torch.testing.assert_close(scheduler_time(EDM(), torch.tensor([1.0, 80.0])), torch.tensor([0.0, 1.0955067]))


@pytest.mark.parametrize(
    ("name", "null"), [("unet2d", None), ("unet2d_classes", 4), ("unet_sd15", None), ("dit", 10), ("sd3", None)]
)
def test_the_null_label_is_the_one_after_the_classes(name, null):
    found = case(name).denoiser(Flow(), Kind.VELOCITY).null
    if null is None:
        assert found is None
    else:
        assert found is not None
        assert found.labels is not None
        assert found.labels.tolist() == [null]


@pytest.mark.parametrize("name", NAMES)
def test_the_bottleneck_is_where_the_family_says(name):
    one = case(name)
    tapped = one.denoiser(Flow(), Kind.VELOCITY).tapped()
    tapped(one.x.requires_grad_(), torch.full((3,), 0.5), one.condition)
    (feature,) = tapped.features()
    assert feature.shape == ((3, 16, 4, 4) if name.startswith("unet") else (3, 16, 16))
    (gradient,) = torch.autograd.grad(feature.square().sum(), one.x)
    assert float(gradient.abs().sum()) > 0, "a discriminator on it must reach the sample"


def test_a_copy_shares_nothing_and_computes_alike():
    one = case("unet2d_classes")
    denoiser = one.denoiser(Flow(), Kind.VELOCITY)
    copied, t = denoiser.copy(), torch.full((3,), 0.5)
    assert torch.equal(copied(one.x, t, one.condition).value, denoiser(one.x, t, one.condition).value)
    with torch.no_grad():
        for parameter in copied.parameters().values():
            parameter.zero_()
    assert float(denoiser(one.x, t, one.condition).value.abs().mean()) > 0.01
    strides = [p.stride() for p in copied.parameters().values()]
    assert strides == [p.stride() for p in denoiser.parameters().values()]


def test_a_follower_is_frozen_and_listed_under_its_player_s_names():
    from fewstep.models.players import Player

    denoiser = case("unet2d_classes").denoiser(Flow(), Kind.VELOCITY)
    follower = denoiser.follower("target")
    shadow = follower.shadow_of(Player(denoiser.parameters()))
    assert list(shadow) == list(denoiser.parameters())
    assert not any(value.requires_grad for value in shadow.values())
    assert all(torch.equal(shadow[name], value) for name, value in denoiser.parameters().items())


def test_moving_takes_the_null_condition_along():
    denoiser = case("unet2d_classes").denoiser(Flow(), Kind.VELOCITY).to("meta")
    assert denoiser.null is not None
    assert denoiser.null.labels is not None
    assert denoiser.null.labels.device.type == "meta"
    assert {p.device.type for p in denoiser.parameters().values()} == {"meta"}
    assert denoiser.adapters.names == ()


def test_gradients_reach_the_sample_through_a_frozen_network():
    one = case("unet_sd15")
    x = one.x.requires_grad_()
    one.denoiser(Flow(), Kind.VELOCITY)(x, torch.full((3,), 0.5), one.condition).x0.sum().backward()
    assert x.grad is not None
    assert float(x.grad.std()) > 0
    assert {p.grad for p in one.network.parameters()} == {None}


def test_families_are_found_by_class_name():
    assert set(NAMES) >= {"unet2d", "dit"}
    assert family_of("DiTTransformer2DModel").learned_sigma
    assert {family.component for family in FAMILIES.values()} == {"unet", "transformer", "network"}
    with pytest.raises(UserError, match=r"network 'UNet2Model' is not known; did you mean 'UNet2DModel'\?; known: "):
        family_of("UNet2Model")


def test_guided_pipelines_agree_with_diffusers_dit():
    """DiTPipeline's own arithmetic: both halves in one call, ε = ε_∅ + s(ε_c − ε_∅)."""
    one = case("dit")
    denoiser = one.denoiser(VP(alphas_cumprod(TABLE)), Kind.EPS)
    t = torch.full((3,), 700.0)
    said = Guided(denoiser, denoiser.null, 4.0)(one.x, t, one.condition)
    labels = torch.cat([torch.arange(3), torch.full((3,), 10)])
    both = one.network(torch.cat([one.x] * 2), timestep=torch.cat([t] * 2), class_labels=labels, return_dict=False)[0]
    conditional, unconditional = both[:, :4].chunk(2)
    torch.testing.assert_close(said.value, unconditional + 4.0 * (conditional - unconditional))
