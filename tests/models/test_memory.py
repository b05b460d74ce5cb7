"""Blocks computed twice give the gradients of blocks computed once; weights kept in fewer bits stay close."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.step import NETWORKS
from fewstep.diffusion.derivative import along, forward_derivative
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import VP
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.injection import Injection
from fewstep.models.load import make_denoiser
from fewstep.models.memory import bytes_of, checkpoint_gradients, store_in
from fewstep.models.schedule import Schedule, alphas_cumprod
from tests.training.runs import vector_denoiser

T = torch.tensor([100.0, 500.0])
LABELS = Condition.of_labels(torch.tensor([1, 2]))


def denoiser(network: str) -> NetworkDenoiser:
    """With weights that no layer starts silent by."""
    made = make_denoiser(NETWORKS[network](True), Schedule(VP(alphas_cumprod({"beta_start": 1e-4})), Kind.V))
    return shaken(made)


def shaken(made: NetworkDenoiser) -> NetworkDenoiser:
    for parameter in made.network.parameters():
        nn.init.normal_(parameter, std=0.05)
        parameter.requires_grad_(True)
    return made


def x() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def gradients(made: NetworkDenoiser, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    made.network.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in made.network.named_parameters() if p.grad is not None}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def saved_bytes(call: Callable[[], Tensor]) -> int:
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return total


@pytest.mark.parametrize("network", NETWORKS)
def test_the_gradients_are_those_of_one_pass(network):
    made, noisy = denoiser(network), x()

    def loss() -> Tensor:
        return made(noisy, T, LABELS).value.square().sum()

    before, held = gradients(made, loss), saved_bytes(loss)
    checkpoint_gradients(made, "student")
    assert_equal(gradients(made, loss), before)
    assert saved_bytes(loss) < (0.75 if network == "unet" else 0.9) * held


@pytest.mark.parametrize("network", NETWORKS)
def test_a_scalar_that_was_told_is_told_again(network):
    """Though the network has since been called without it: DiT embeds the time inside its blocks."""
    made, noisy = shaken(denoiser(network).with_scalar("w")), x()
    told = LABELS.with_scalar("w", torch.tensor([0.3, 0.7]))

    def loss() -> Tensor:
        out = made(noisy, T, told).value
        with torch.no_grad():
            made(noisy, T, LABELS)
        return out.square().sum()

    before = gradients(made, loss)
    assert sum(float(g.abs().sum()) for name, g in before.items() if ".second.w." in name) > 0
    checkpoint_gradients(made, "student")
    assert_equal(gradients(made, loss), before)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_adapter_that_computed_computes_again(network):
    """Though another has been switched on since, as in every step of DMD2 on adapters."""
    base, noisy = denoiser(network), x()
    student, fake_score = base.lora_view("student", 4), base.lora_view("fake_score", 4)
    for parameter in (*student.parameters().values(), *fake_score.parameters().values()):
        nn.init.normal_(parameter, std=0.1)

    def loss() -> Tensor:
        out = student(noisy, T, LABELS).value
        with torch.no_grad():
            fake_score(noisy, T, LABELS)
        return out.square().sum()

    before = gradients(base, loss)
    assert all(".student." in name for name in before)
    checkpoint_gradients(student, "student")
    assert_equal(gradients(base, loss), before)


def test_features_are_recorded_once_and_their_gradient_is_the_same():
    made, noisy = denoiser("unet").tapped(), x()

    def loss() -> Tensor:
        return torch.stack([one.square().sum() for one in made.features_of(noisy, T, LABELS)]).sum()

    before = gradients(made, loss)
    checkpoint_gradients(made, "student")
    assert_equal(gradients(made, loss), before)
    with pytest.raises(UserError, match=r"nothing recorded"):
        made.features()


def test_a_forward_derivative_is_unchanged():
    """Without a graph, and with one, whose backward pass another computation of the blocks would break."""
    made, noisy = denoiser("dit"), x()

    def velocity(at: Tensor) -> Tensor:
        return made(at, T, LABELS).velocity

    def trained() -> Tensor:
        return forward_derivative(velocity, (noisy,), (torch.ones_like(noisy),)).slope.square().sum()

    before, slope = gradients(made, trained), along(velocity, (noisy,), (torch.ones_like(noisy),)).slope
    checkpoint_gradients(made, "student")
    assert_equal(gradients(made, trained), before)
    assert torch.equal(along(velocity, (noisy,), (torch.ones_like(noisy),)).slope, slope)


def test_what_cannot_be_computed_again_is_refused():
    with pytest.raises(UserError, match=r"memory.checkpoint: student given, but VectorNetwork cannot"):
        checkpoint_gradients(vector_denoiser(), "student")
    made = denoiser("dit")
    made.network.add_module(
        "addition", type("Silent", (Injection,), {"hear": None, "addition": None, "forget": None})(())
    )
    with pytest.raises(UserError, match=r"adds to the outputs of its blocks"):
        checkpoint_gradients(made, "student")


@pytest.mark.parametrize(
    ("network", "storage", "bound", "size"),
    [
        ("unet", "bfloat16", 0.01, 0.55),
        ("unet", "float8", 0.15, 0.33),
        ("dit", "bfloat16", 0.01, 0.8),  # whose norms are modulated by layers, and norms stay as they are
        ("dit", "float8", 0.15, 0.7),
    ],
)
def test_weights_in_fewer_bits_are_smaller_and_close(network, storage, bound, size):
    made, noisy = denoiser(network), x()
    made.network.requires_grad_(False)
    whole, weight = made(noisy, T, LABELS).value, bytes_of(made.network)
    store_in(made.network, storage, torch.float32)
    error = (made(noisy, T, LABELS).value - whole).norm() / whole.norm()
    assert 1e-5 < float(error) < bound
    assert bytes_of(made.network) < size * weight


def test_no_gradient_flows_through_weights_in_fewer_bits():
    made = denoiser("dit")
    made.network.requires_grad_(False)
    store_in(made.network, "bfloat16", torch.float32)
    with pytest.raises(UserError, match=r"memory.teacher: this method's gradient flows through the teacher"):
        made(x().requires_grad_(), T, LABELS)
    with torch.no_grad():
        assert made(x().requires_grad_(), T, LABELS).value.dtype == torch.float32


def test_a_network_that_keeps_float32_only():
    made = vector_denoiser()
    made.network.requires_grad_(False)
    with pytest.raises(UserError, match=r"memory.teacher: float8 given, but VectorNetwork \(teacher\) keeps float32"):
        store_in(made.network, "float8", torch.float32)
    store_in(made.network, "float32", torch.float32)
