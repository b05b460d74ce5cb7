"""Logits off a score network's bottleneck."""

from __future__ import annotations

import pytest
import torch

from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.discriminator import Discriminator
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.rng import Rng
from tests.tiny import alive, dit, unet2d_classes

LABELS = Condition.of_labels(torch.tensor([0, 3]))


def backbone(name: str) -> NetworkDenoiser:
    network = alive(unet2d_classes(8, 4)) if name == "unet" else alive(dit(8))
    return make_denoiser(network, Schedule(Flow(), Kind.VELOCITY))


@pytest.mark.parametrize(("name", "channels"), [("unet", 3), ("dit", 4)])
def test_logits_and_whom_their_gradient_reaches(name, channels):
    example = Batch(torch.randn(1, channels, 8, 8), LABELS.rows(slice(0, 1)), torch.zeros(1).long())
    score = backbone(name)
    judge = Discriminator.on(score, example)
    x = torch.randn(2, channels, 8, 8, requires_grad=True)
    logits = judge(x, torch.tensor([0.3, 0.7]), LABELS)
    assert logits.shape == (2, 1)
    logits.sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
    assert {p.grad for p in score.network.parameters()} == {None}, "frozen, so it is only read"
    assert all(p.grad is not None for p in judge.heads.parameters())
    score.network.requires_grad_(True)
    judge(x, torch.tensor([0.3, 0.7]), LABELS).sum().backward()
    reached = [name for name, p in score.network.named_parameters() if p.grad is not None and p.grad.any()]
    assert reached, "a trained backbone learns from its logits"
    assert not any(name.startswith(("up_blocks", "conv_out", "proj_out")) for name in reached)


def test_a_copy_made_before_the_tap_records_nothing():
    score = backbone("unet")
    copied = score.copy()
    example = Batch(torch.randn(1, 3, 8, 8), LABELS.rows(slice(0, 1)), torch.zeros(1).long())
    judge = Discriminator.on(score, example)
    copied(example.x, torch.tensor([0.5]), example.condition)
    with pytest.raises(ValueError, match="nothing recorded"):
        judge.backbone.features()


def test_clean_samples_are_diffused_to_times_of_their_own():
    example = Batch(torch.randn(1, 3, 8, 8), LABELS.rows(slice(0, 1)), torch.zeros(1).long())
    judge = Discriminator.on(backbone("unet"), example)
    noisy = judge.noised(torch.full((4000, 3, 8, 8), 2.0), Rng(0))
    assert float(noisy.t.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(noisy.t.std()) == pytest.approx(12**-0.5, abs=0.01)
    torch.testing.assert_close(noisy.x.mean(dim=(1, 2, 3)), 2 * (1 - noisy.t), rtol=0, atol=0.4)
    rest = (noisy.x - 2 * (1 - noisy.t).view(-1, 1, 1, 1)) / noisy.t.clamp_min(1e-3).view(-1, 1, 1, 1)
    assert float(rest[noisy.t > 0.01].std()) == pytest.approx(1, abs=0.01)
    x = torch.randn(2, 3, 8, 8)
    noisy = judge.noised(x, Rng(7))
    assert torch.equal(judge.of_clean(x, LABELS, Rng(7)), judge(noisy.x, noisy.t, LABELS))
