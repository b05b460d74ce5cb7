from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.taps import FeatureTap
from tests import tiny

CASES = [
    (tiny.unet2d, ["mid_block"], (2, 16, 4, 4)),
    (tiny.unet2d, ["down_blocks.0"], (2, 8, 4, 4)),  # returns the hidden state and a tuple of residuals
    (tiny.unet_sd15, ["mid_block"], (2, 16, 4, 4)),
    (tiny.dit, ["transformer_blocks.0"], (2, 16, 16)),
    (tiny.sd3, ["transformer_blocks.0"], (2, 16, 16)),  # returns 5 text tokens and 16 image tokens
    (tiny.sd3, ["transformer_blocks.1"], (2, 16, 16)),  # returns None for the text
]


@pytest.mark.parametrize(("build", "names", "shape"), CASES, ids=[f"{b.__name__}-{n[0]}" for b, n, _ in CASES])
def test_gradient_reaches_the_input_through_a_frozen_network(
    build: Callable[[], nn.Module], names: Sequence[str], shape: tuple[int, ...]
) -> None:
    network = build().requires_grad_(False)
    kwargs = tiny.inputs(network)
    key = next(iter(kwargs))
    kwargs[key].requires_grad_()
    tap = FeatureTap(network, names)
    network(**kwargs)
    (feature,) = tap.take()
    assert feature.shape == shape

    probe = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((feature * probe).sum(), kwargs[key])
    assert (gradient.flatten(1).norm(dim=1) > 1e-4).all()
    assert all(parameter.grad is None for parameter in network.parameters())


def test_the_image_stream_of_sd3_is_the_one_that_is_projected_to_the_output() -> None:
    network = tiny.sd3()
    tap = FeatureTap(network, ["transformer_blocks.1", "norm_out"])
    seen: list[Tensor] = []
    network.norm_out.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    network(**tiny.inputs(network))
    assert torch.equal(tap.take()[0], seen[0])


class Twice(nn.Module):
    """x·2, then +1."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(1, 1, bias=False)
        self.add = nn.Identity()
        nn.init.constant_(self.twice.weight, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.twice(x) + 1)


def test_features_come_in_the_order_of_the_names_and_only_once() -> None:
    network = Twice()
    tap = FeatureTap(network, ["add", "twice"])
    network(torch.tensor([[3.0]]))
    assert [f.item() for f in tap.take()] == [7.0, 6.0]
    with pytest.raises(UserError, match="taps: nothing recorded at 'add'; call the network first"):
        tap.take()


def test_a_call_of_one_s_own_is_not_ended_by_what_another_left() -> None:
    network = Twice()
    tap = FeatureTap(network, ["twice", "add"])
    network(torch.tensor([[3.0]]))
    assert [f.item() for f in tap.of(lambda: network(torch.tensor([[5.0]])))] == [10.0, 11.0]


def test_a_second_pass_replaces_the_first() -> None:
    network = Twice()
    tap = FeatureTap(network, ["twice"])
    network(torch.tensor([[3.0]]))
    network(torch.tensor([[5.0]]))
    assert [f.item() for f in tap.take()] == [10.0]


def test_a_removed_tap_records_nothing() -> None:
    network = Twice()
    tap = FeatureTap(network, ["twice"])
    network(torch.tensor([[3.0]]))
    tap.remove()
    network(torch.tensor([[3.0]]))
    with pytest.raises(UserError, match="nothing recorded at 'twice'"):
        tap.take()


def test_a_tap_made_before_compiling_sees_every_call() -> None:
    network = Twice()
    tap = FeatureTap(network, ["twice"])
    network.compile(backend="eager", fullgraph=True)
    for value in (3.0, 5.0):
        x = torch.tensor([[value]], requires_grad=True)
        network(x)
        (feature,) = tap.take()
        assert feature.item() == 2 * value
        assert torch.autograd.grad(feature, x)[0].item() == 2.0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mid_blok"], "taps: no sub-module 'mid_blok'; did you mean 'mid_block'?"),
        (["transformer"], "taps: no sub-module 'transformer'; at the top there are conv_in, "),
        ([], "taps: no sub-module named, at least one is needed"),
    ],
)
def test_unknown_names_are_told_in_one_line(names: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        FeatureTap(tiny.unet2d(), names)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_sub_module_without_a_tensor_is_a_user_error() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    network = nn.Sequential(Nothing())
    FeatureTap(network, ["0"])
    with pytest.raises(UserError, match="taps: '0' returns NoneType without a tensor"):
        network(torch.zeros(1))
