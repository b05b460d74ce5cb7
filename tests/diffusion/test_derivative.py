"""Derivatives along a direction: forward mode, central differences, and what each may cost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.derivative import STEP, along, forward_derivative
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.models.vector_network import VectorConfig, VectorNetwork
from tests import tiny


def vectors() -> VectorNetwork:
    torch.manual_seed(0)
    return VectorNetwork(VectorConfig(3, 0, (0.0, 0.0, 0.0), 1.0, width=16, depth=1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "VectorNetwork": vectors,
    "UNet2DModel": tiny.unet2d,
    "UNet2DConditionModel": tiny.unet_sd15,
    "DiTTransformer2DModel": tiny.dit,
    "SD3Transformer2DModel": tiny.sd3,
}


def double(name: str) -> NetworkDenoiser:
    """In float64, with attention in all but the first."""
    denoiser = make_denoiser(tiny.alive(NETWORKS[name]()), Schedule(Flow(), Kind.VELOCITY))
    denoiser.network.double()
    return denoiser


def point(denoiser: NetworkDenoiser) -> tuple[Tensor, Tensor, Condition]:
    if isinstance(denoiser.network, VectorNetwork):
        return torch.randn(2, 3, dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64), Condition()
    words = {k: v.double() if v.is_floating_point() else v for k, v in tiny.inputs(denoiser.network).items()}
    x, _ = words.pop(denoiser.family.sample), words.pop("timestep")
    return x, torch.tensor([0.3, 0.7], dtype=torch.float64), Condition(words)


@pytest.mark.parametrize("name", NETWORKS)
def test_both_kinds_agree_in_space(name):
    """Forward mode against the difference at a step where both its errors are small."""
    denoiser = double(name)
    x, t, condition = point(denoiser)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def function(x: Tensor) -> Tensor:
        return denoiser(x, t, condition).velocity

    exact = along(function, (x,), (direction,))
    difference = along(function, (x,), (direction,), "central_difference", 1e-4)
    torch.testing.assert_close(exact.value, function(x), rtol=1e-10, atol=1e-12)  # another attention kernel
    assert torch.equal(difference.value, function(x))
    assert float((exact.slope - difference.slope).norm() / exact.slope.norm()) < 1e-6


def test_convolutions_are_not_rounded_to_tf32_meanwhile():
    """cuDNN's setting is every device's to read; it is put back, after an error too."""
    convolutions: Any = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    before, seen = convolutions.fp32_precision, []

    def function(x: Tensor) -> Tensor:
        seen.append(convolutions.fp32_precision)
        return x * x

    one = torch.ones(2)
    for how in ("jvp", "central_difference"):
        along(function, (one,), (one,), how)
    forward_derivative(function, (one,), (one,))
    with pytest.raises(ZeroDivisionError):
        along(lambda x: x / (1 // 0), (one,), (one,))
    assert seen == ["ieee"] * 5
    assert convolutions.fp32_precision == before == "tf32"


@pytest.mark.parametrize("name", ["VectorNetwork", "UNet2DModel", "SD3Transformer2DModel"])
def test_both_kinds_agree_in_space_and_time_together(name):
    """At the step that is the default: diffusers embeds 1000·t in float32, so that a smaller one is noise."""
    denoiser = double(name)
    x, t, condition = point(denoiser)
    direction = (torch.randn(x.shape, dtype=torch.float64), torch.ones_like(t) / 1000)

    def function(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(x, t, condition).velocity

    exact = along(function, (x, t), direction)
    difference = along(function, (x, t), direction, "central_difference")
    assert STEP == 1e-2
    assert float((exact.slope - difference.slope).norm() / exact.slope.norm()) < 5e-3


@pytest.mark.parametrize(("how", "order"), [("jvp", None), ("central_difference", 2)])
def test_a_known_derivative(how, order):
    """d/dh of sin((a + h)·(x + 2h)) at h = 0 is cos(a·x)·(x + 2a); the difference is of second order."""
    x, a = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None], torch.full((5,), 0.7, dtype=torch.float64)
    at, direction = (x, a), (torch.full_like(x, 2.0), torch.ones_like(a))

    def function(x: Tensor, a: Tensor) -> Tensor:
        return (a[:, None] * x).sin()

    wanted = (0.7 * x).cos() * (x + 1.4)
    errors = [float((along(function, at, direction, how, step).slope - wanted).abs().max()) for step in (1e-2, 5e-3)]
    if order is None:
        assert max(errors) < 1e-14
    else:
        assert errors[0] / errors[1] == pytest.approx(2**order, rel=1e-2)


@pytest.mark.parametrize("how", ["jvp", "central_difference"])
def test_a_slope_for_targets_keeps_no_graph(how):
    denoiser = double("UNet2DModel")
    denoiser.network.requires_grad_(True)
    x, t, condition = point(denoiser)
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return denoiser(x, t, condition).velocity

    tangent = along(function, (x.requires_grad_(),), (torch.ones_like(x),), how)
    assert not tangent.value.requires_grad
    assert not tangent.slope.requires_grad
    assert len(calls) == {"jvp": 1, "central_difference": 3}[how]


@pytest.mark.parametrize("name", ["VectorNetwork", "UNet2DModel"])
def test_a_slope_can_be_trained(name):
    """The gradient of a loss on it, against finite differences of that loss along a direction of the weights."""
    denoiser = double(name)
    denoiser.network.requires_grad_(True)
    x, t, condition = point(denoiser)

    def loss() -> Tensor:
        return forward_derivative(lambda x: denoiser(x, t, condition).velocity, (x,), (x.cos(),)).slope.square().mean()

    weights = list(denoiser.network.parameters())
    gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    generator, found, step = torch.Generator().manual_seed(4), 0.0, 1e-5
    turned = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
    found = sum(float((g * d).sum()) for g, d in zip(gradients, turned, strict=True) if g is not None)
    values = []
    with torch.no_grad():
        for change in (step, -2 * step):
            for weight, d in zip(weights, turned, strict=True):
                weight += change * d
            values.append(float(loss()))
    assert found == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-5)


def test_mixed_precision_stays_out_of_a_forward_derivative():
    """Under bf16 autocast a convolution meets a float32 tangent and fails; the derivative is taken in float32."""
    denoiser = make_denoiser(tiny.alive(tiny.unet2d()), Schedule(Flow(), Kind.VELOCITY))
    x, t, condition = point(denoiser)
    x, t = x.float(), t.float()

    def function(x: Tensor) -> Tensor:
        return denoiser(x, t, condition).velocity

    plain = along(function, (x,), (torch.ones_like(x),))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = along(function, (x,), (torch.ones_like(x),))
    assert torch.equal(mixed.slope, plain.slope)


FIRST = """
import torch
from fewstep.diffusion.derivative import along
print(along(lambda x: x * x, (torch.ones(2),), (torch.ones(2),)).slope.tolist())
"""


@pytest.mark.slow
def test_the_first_derivative_of_a_process_warns_of_nothing():
    """torch scripts its rules for them with a function that it has deprecated."""
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=True)
    assert done.stdout == "[2.0, 2.0]\n"
    assert "deprecated" not in done.stderr
