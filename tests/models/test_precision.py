"""Weights kept in bfloat16 compute what mixed precision computes; times are never rounded."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from torch import Tensor, nn

from benchmarks.shapes import SHAPES
from fewstep.diffusion.derivative import along
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.families import FAMILIES
from fewstep.models.precision import keep_in_bfloat16, keep_times
from tests.models.test_memory import LABELS, T, denoiser, shaken, x

CPU = torch.device("cpu")


def rounded(made: NetworkDenoiser) -> NetworkDenoiser:
    """Every weight a number of bfloat16."""
    for parameter in made.network.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return made


def mixed() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("network", [pytest.param("unet", marks=pytest.mark.slow), "dit"])
def test_mixed_precision_computes_the_same_to_the_bit(network):
    """Forward pass and gradients; what is large is in bfloat16, norms and embeddings are not."""
    made, noisy = rounded(denoiser(network)), x()
    kept = copy.deepcopy(made.network)

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        made.network.zero_grad()
        with mixed():
            value = made(noisy, T, LABELS).value
        value.float().square().sum().backward()
        return value, {n: p.grad.float() for n, p in made.network.named_parameters() if p.grad is not None}

    value, gradients = run()
    names = {name: id(p) for name, p in made.network.named_parameters()}
    keep_in_bfloat16(made.network, made.family, ())
    assert {name: id(p) for name, p in made.network.named_parameters()} == names
    again, theirs = run()
    assert torch.equal(again, value)
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=2**-7, atol=1e-4 * float(gradient.abs().max()))
    for name, module in made.network.named_modules():
        whole = name in ("conv_in", "pos_embed.proj") or made.family.time_embedding in name.split(".")
        narrow = isinstance(module, nn.Linear | nn.Conv2d) and not whole
        for p in module.parameters(recurse=False):
            assert p.dtype == (torch.bfloat16 if narrow else torch.float32), name
            assert torch.equal(p.float(), kept.get_parameter(_name_of(made.network, p)))


def _name_of(network: nn.Module, parameter: nn.Parameter) -> str:
    return next(name for name, p in network.named_parameters() if p is parameter)


@pytest.mark.parametrize("network", [pytest.param("unet", marks=pytest.mark.slow), "dit"])
def test_without_mixed_precision_it_computes_in_float32(network):
    made, noisy = rounded(denoiser(network)), x()
    with torch.no_grad():
        value = made(noisy, T, LABELS).value
    slope = along(lambda at: made(at, T, LABELS).velocity, (noisy,), (torch.ones_like(noisy),)).slope
    keep_in_bfloat16(made.network, made.family, ())
    with torch.no_grad():
        assert torch.equal(made(noisy, T, LABELS).value, value)
    with mixed():  # which a derivative turns off
        found = along(lambda at: made(at, T, LABELS).velocity, (noisy,), (torch.ones_like(noisy),)).slope
    torch.testing.assert_close(found, slope, rtol=0, atol=1e-6)


def test_what_is_excepted_and_adapters_stay():
    made = denoiser("dit")
    view = made.lora_view("student", 4)
    followed = made.network.get_parameter("proj_out_2.weight")
    keep_in_bfloat16(made.network, made.family, {id(followed)})
    assert followed.dtype == torch.float32
    assert {p.dtype for p in view.parameters().values()} == {torch.float32}
    assert sum(p.dtype == torch.bfloat16 for p in made.network.parameters()) > 10
    with mixed():
        view(x(), T, LABELS).value.float().sum().backward()
    assert all(p.grad is not None for p in view.parameters().values())


def test_a_copy_computes_by_itself():
    made, noisy = denoiser("unet"), x()
    keep_in_bfloat16(made.network, made.family, ())
    other = made.copy()
    with torch.no_grad():
        value = made(noisy, T, LABELS).value
        for parameter in made.network.parameters():
            parameter.zero_()
        assert torch.equal(other(noisy, T, LABELS).value, value)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_neighbouring_times_stay_apart_in_flux(keeps):
    """It casts its time to what its first layer puts out, which mixed precision makes bfloat16."""
    shape = SHAPES["flux_blocks"]
    made, batch = shaken(shape.denoiser(True, CPU)), shape.example(2, True)
    for parameter in made.network.parameters():
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    if keeps:
        keep_times(made.network, made.family)
        keep_in_bfloat16(made.network, made.family, ())
    with torch.no_grad(), mixed():
        one, other = (made(batch.x, torch.full((2,), t), batch.condition).value for t in (0.5, 0.5005))
    assert torch.equal(one, other) != keeps


def test_networks_that_round_their_time_have_the_layer_that_is_named():
    classes = {name: family for name, family in FAMILIES.items() if family.first_layer is not None}
    assert set(classes) == {"FluxTransformer2DModel", "QwenImageTransformer2DModel"}
    for name, family in classes.items():
        with torch.device("meta"):
            network = getattr(diffusers, name)(num_layers=1, attention_head_dim=16, num_attention_heads=1,
                                               axes_dims_rope=(8, 4, 4))  # fmt: skip
        assert family.first_layer is not None
        assert isinstance(network.get_submodule(family.first_layer), nn.Linear)
