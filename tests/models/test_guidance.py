"""Guidance: one pass for both, none where it is off."""

from __future__ import annotations

import pytest
import torch

from fewstep.diffusion.gaussian import five_modes
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance import Guided
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from tests.tiny import alive, unet2d_classes

T = torch.tensor([0.2, 0.5, 0.9])


@pytest.fixture
def denoiser() -> NetworkDenoiser:
    return make_denoiser(alive(unet2d_classes(8, 4)), Schedule(Flow(), Kind.VELOCITY))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 3, 8, 8)


CONDITION = Condition.of_labels(torch.tensor([0, 3, 1]))


def counted(denoiser: NetworkDenoiser) -> list[int]:
    """Batch sizes of the network's calls."""
    calls: list[int] = []
    denoiser.network.register_forward_pre_hook(lambda m, a, kw: calls.append(len(kw["sample"])), with_kwargs=True)
    return calls


@pytest.mark.parametrize("scale", [0.0, 2.5, 7.0])
def test_one_pass_equals_two(denoiser, x, scale):
    calls = counted(denoiser)
    guided = Guided(denoiser, denoiser.null, scale)(x, T, CONDITION)
    assert calls == [6]
    with_label = denoiser(x, T, CONDITION).value
    without = denoiser(x, T, Condition.of_labels(torch.full((3,), 4))).value
    assert float((with_label - without).abs().max()) > 1e-3
    torch.testing.assert_close(guided.value, without + scale * (with_label - without), rtol=0, atol=2e-6)


def test_off_is_one_plain_pass(denoiser, x):
    calls = counted(denoiser)
    guided = Guided(denoiser, denoiser.null)(x, T, CONDITION)
    assert calls == [3]
    assert torch.equal(guided.value, denoiser(x, T, CONDITION).value)


def test_a_scale_for_each_sample(denoiser, x):
    scales = torch.tensor([1.0, 3.0, 8.0])
    together = Guided(denoiser, denoiser.null).at(scales)(x, T, CONDITION).value
    for i, scale in enumerate(scales.tolist()):
        row = slice(i, i + 1)
        alone = Guided(denoiser, denoiser.null, scale)(x[row], T[row], CONDITION.rows(row)).value
        torch.testing.assert_close(together[row], alone, rtol=0, atol=5e-6)


def test_an_exact_teacher_is_guided_alike():
    teacher = five_modes(labelled=True).denoiser(Flow())
    x, labels = torch.randn(3, 2, dtype=torch.float64), Condition.of_labels(torch.tensor([0, 2, 4]))
    guided = Guided(teacher, teacher.null, 3.0)(x, T.double(), labels)
    conditional, null = teacher(x, T.double(), labels), teacher(x, T.double(), Condition.none())
    torch.testing.assert_close(guided.x0, null.x0 + 3.0 * (conditional.x0 - null.x0))


def test_guidance_needs_a_null_condition(denoiser):
    assert Guided(denoiser, None).process is denoiser.process
    with pytest.raises(UserError, match=r"teacher.guidance: 3.0 needs a conditional teacher; this one takes 1.0 only"):
        Guided(denoiser, None, 3.0)
    with pytest.raises(UserError, match=r"teacher.guidance"):
        Guided(denoiser, None).at(torch.tensor([1.0]))
