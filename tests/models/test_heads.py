from __future__ import annotations

import pytest
import torch
from torch import nn

from fewstep.errors import UserError
from fewstep.losses.adversarial import Adversarial, discriminator_loss, generator_loss, r1
from fewstep.models.heads import Heads
from fewstep.models.taps import FeatureTap
from tests import tiny

SHAPES = [(24, 8, 8), (24, 3, 5), (8, 16, 2), (7, 1, 1), (16, 24), (2,)]


def seeded(shapes: list[tuple[int, ...]], width: int | None = None) -> Heads:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Heads(shapes, width)


def features(shapes: list[tuple[int, ...]], batch: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, *shape, generator=generator) for shape in shapes]


def test_one_logit_for_each_feature_and_sample() -> None:
    heads, given = seeded(SHAPES), features(SHAPES)
    logits = heads(given)
    assert logits.shape == (3, len(SHAPES))
    assert logits.dtype == torch.float32
    # Samples do not see each other, and every head tells them apart.
    torch.testing.assert_close(heads([f[1:2] for f in given]), logits[1:2], rtol=1e-4, atol=1e-5)
    assert (logits.std(dim=0) > 1e-3).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_heads_are_unbounded(shape: tuple[int, ...]) -> None:
    """Scaling the last layer scales the logits, of both signs: no squashing function comes after it."""
    heads, given = seeded([shape], width=32), features([shape], batch=64)
    last = [module for module in heads.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    assert last.bias is not None
    nn.init.zeros_(last.bias)
    before = heads(given)
    assert before.min() < 0 < before.max()
    with torch.no_grad():
        last.weight *= 1000
    torch.testing.assert_close(heads(given), 1000 * before, rtol=1e-4, atol=1e-4)
    bounded = (nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Softsign, nn.LogSigmoid)
    assert not any(isinstance(module, bounded) for module in heads.modules())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_head_learns_to_tell_two_distributions_apart(shape: tuple[int, ...]) -> None:
    heads, fake = seeded([shape], width=16), features([shape], batch=32)
    real = [fake[0] + 4 * torch.randn(shape, generator=torch.Generator().manual_seed(2)).sign()]
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    losses: list[float] = []
    for _ in range(40):
        loss = discriminator_loss(Adversarial.NON_SATURATING, heads(real), heads(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.386, abs=0.4)
    assert losses[-1] < 0.5


def test_conv_and_token_heads_take_other_sizes_than_they_were_built_for() -> None:
    heads = seeded([(8, 8, 8), (16, 8)])
    tall = features([(8, 8, 8), (16, 8)])
    wide = features([(8, 16, 24), (96, 8)])
    assert heads(tall).shape == heads(wide).shape == (3, 2)


def test_the_conv_tower_ends_in_a_single_place() -> None:
    heads = seeded([(64, 32, 32)], width=8)
    convolutions = [m for m in heads.modules() if isinstance(m, nn.Conv2d)]
    # 32 → 16 → 8 → 4 → 1, then the logit
    assert [m.kernel_size for m in convolutions] == [(4, 4)] * 4 + [(1, 1)]
    assert [m.stride for m in convolutions] == [(2, 2)] * 3 + [(1, 1)] * 2
    assert [m.out_channels for m in convolutions] == [8, 8, 8, 8, 1]


def test_group_norm_is_that_of_dmd2_for_wide_features() -> None:
    heads = seeded([(1280, 1, 1), (24, 8, 8)], width=None)
    norms = [(m.num_groups, m.num_channels) for m in heads.modules() if isinstance(m, nn.GroupNorm)]
    assert norms == [(32, 1280), (4, 64), (4, 64)]


def test_half_precision_features_give_float32_logits() -> None:
    given = [f.bfloat16() for f in features([(4, 8, 8), (16, 8), (2,)])]
    heads = Heads.like(given)
    assert heads(given).dtype == torch.float32
    assert {p.dtype for p in heads.parameters()} == {torch.float32}


def test_the_exact_penalty_can_be_descended_through_every_head() -> None:
    shapes = [(8, 8, 8), (16, 8), (8,)]
    heads = seeded(shapes, width=16)
    given = [f.requires_grad_() for f in features(shapes)]
    for head, feature in zip(heads.heads, given, strict=True):
        penalty = r1(head(feature), feature)
        gradients = torch.autograd.grad(penalty, list(head.parameters()), materialize_grads=True)
        assert penalty.item() > 0
        assert all(g.isfinite().all() for g in gradients)
        assert sum(g.norm().item() for g in gradients) > 0


def test_the_generators_turn_leaves_heads_and_backbone_without_gradient() -> None:
    network = tiny.unet2d().requires_grad_(False)
    tap = FeatureTap(network, ["mid_block"])
    kwargs = tiny.inputs(network)
    network(**kwargs)
    heads = Heads.like(tap.take(), width=16).requires_grad_(False)
    kwargs["sample"].requires_grad_()
    network(**kwargs)
    generator_loss(Adversarial.NON_SATURATING, heads(tap.take())).backward()
    assert kwargs["sample"].grad is not None
    assert kwargs["sample"].grad.norm() > 0
    assert all(p.grad is None for module in (network, heads) for p in module.parameters())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "heads: no feature given, at least one is needed"),
        (
            [(4, 2, 8, 8)],
            r"heads: a feature of shape \(4, 2, 8, 8\) given, allowed are \(C, H, W\), \(N, D\) and \(D,\)",
        ),
    ],
)
def test_shapes_without_a_head_are_user_errors(shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Heads(shapes)
