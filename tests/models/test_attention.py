"""The kernel of attention: both of diffusers' switches, and what is said where one cannot be had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from benchmarks.step import NETWORKS
from fewstep.errors import UserError
from fewstep.models import attention
from fewstep.models.attention import set_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).eval()


@pytest.fixture
def installed(monkeypatch):
    """As if every package were there."""
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())


@pytest.fixture
def _dispatcher():
    """diffusers keeps the choice for the whole process."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.usefixtures("_dispatcher")
def test_a_dispatching_network_takes_torch_s_kernel():
    network = flux()
    set_attention(network, "sdpa", CPU)
    processors: list[Any] = [m.processor for m in network.modules() if hasattr(m, "processor")]
    assert {str(one._attention_backend.value) for one in processors} == {"native"}


@pytest.mark.parametrize("network", NETWORKS)
def test_others_have_torch_s_kernel_already(network):
    made = NETWORKS[network](True).eval()
    before = [type(m.processor) for m in made.modules() if hasattr(m, "processor")]
    set_attention(made, "sdpa", CPU)
    assert [type(m.processor) for m in made.modules() if hasattr(m, "processor")] == before
    assert {one.__name__ for one in before} == {"AttnProcessor2_0"}


@pytest.mark.parametrize(
    ("kernel", "package"), [("flash", "flash-attn"), ("sage", "sageattention"), ("xformers", "xformers")]
)
def test_a_missing_package_is_named(kernel, package, monkeypatch):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"memory.attention: {kernel} given, but {package} is not installed"):
        set_attention(flux(), kernel, CUDA)


@pytest.mark.usefixtures("installed")
def test_a_kernel_of_cuda_alone():
    with pytest.raises(
        UserError, match=r"memory.attention: xformers given, but it runs on CUDA only, and this run is on cpu"
    ):
        set_attention(flux(), "xformers", CPU)


@pytest.mark.usefixtures("installed", "_dispatcher")
def test_what_diffusers_says_is_passed_on():
    with pytest.raises(
        UserError, match=r"memory.attention: flash given: Flash Attention backend 'flash' is not usable"
    ):
        set_attention(flux(), "flash", CUDA)
    with pytest.raises(UserError, match=r"memory.attention: xformers given, but it cannot run here: "):
        set_attention(NETWORKS["unet"](True), "xformers", CUDA)


@pytest.mark.usefixtures("installed")
def test_a_network_that_calls_torch_itself_takes_no_other():
    with pytest.raises(
        UserError, match=r"memory.attention: sage given, but UNet2DModel takes auto, sdpa and xformers only"
    ):
        set_attention(NETWORKS["unet"](True), "sage", CUDA)
