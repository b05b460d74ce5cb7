"""Logits off a score network's bottleneck."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.diffusion.times import Choice, Uniform
from fewstep.losses.adversarial import Adversarial
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.discriminator import Discriminator, Judged, Smoothness
from fewstep.models.heads import Heads
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.models.taps import FeatureTap, block_names
from fewstep.models.vector_network import VectorConfig, VectorNetwork
from fewstep.rng import Rng
from tests.tiny import alive, dit, unet2d_classes

LN2 = math.log(2)
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


def vector_judge(loss: Adversarial, smoothness: Smoothness = Smoothness(), trains: bool = False) -> Discriminator:
    """On a small network of vectors `(B, 2)` whose bottleneck is read without distortion, heads linear in x_t."""
    network = VectorNetwork(VectorConfig(2, 0, (0.0, 0.0), 1.0, width=8, depth=1))
    score = make_denoiser(network, Schedule(Flow(), Kind.VELOCITY))
    example = Batch(torch.zeros(1, 2), Condition.none(), torch.zeros(1).long())
    made = Discriminator.on(score, example, ("first",))
    return replace(made, loss=loss, smoothness=smoothness, trains_backbone=trains)


def shown(mean: float, count: int = 64, seed: int = 0, spread: float = 1.0) -> Judged:
    generator = torch.Generator().manual_seed(100 + seed)
    return Judged(mean + spread * torch.randn(count, 2, generator=generator), Condition.none())


CHANCE = {
    Adversarial.NON_SATURATING: (2 * LN2, LN2),
    Adversarial.HINGE: (2.0, 0.0),
    Adversarial.RELATIVISTIC: (LN2, LN2),
}


@pytest.mark.parametrize("kind", list(CHANCE))
def test_indifferent_heads_pay_the_chance_level(kind):
    judge = vector_judge(kind)
    for parameter in judge.heads.parameters():
        nn.init.zeros_(parameter)
    real, fake = shown(1.0), shown(-1.0, seed=1)
    paid, fooled = judge.pay(real, fake, Rng(0)), judge.fool(fake, Rng(0), real)
    assert set(paid) == {"discriminator"}
    assert (paid["discriminator"].tolist(), fooled.tolist()) == pytest.approx(CHANCE[kind], abs=1e-6)


@pytest.mark.parametrize("trains", [False, True])
def test_each_turn_leaves_the_other_side_without_gradient(trains):
    judge = vector_judge(Adversarial.RELATIVISTIC, Smoothness(1.0, 1.0), trains)
    judge.backbone.network.requires_grad_(trains)
    real, x = shown(1.0), shown(-1.0).x.requires_grad_()
    fake = Judged(x, Condition.none())
    heads, score = list(judge.heads.parameters()), list(judge.backbone.network.first.parameters())  # pyright: ignore
    torch.stack(tuple(judge.pay(real, fake, Rng(0)).values())).sum().backward()
    assert x.grad is None, "the discriminator's turn does not reach the samples"
    assert all(p.grad is not None for p in heads)
    assert all((p.grad is not None) is trains for p in score)
    for parameter in (*heads, *score):
        parameter.grad = None
        parameter.requires_grad_(False)
    judge.fool(fake, Rng(0), real).backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
    assert {p.grad for p in (*heads, *score)} == {None}


def test_a_backbone_that_is_only_read_takes_no_gradient_though_it_is_trained_elsewhere():
    """A fake score learns by denoising in the same turn; the verdict and its penalties must not move it."""
    judge = vector_judge(Adversarial.NON_SATURATING, Smoothness(1.0, 1.0))
    judge.backbone.network.requires_grad_(True)
    torch.stack(tuple(judge.pay(shown(1.0), shown(0.0), Rng(0)).values())).sum().backward()
    assert {p.grad for p in judge.backbone.network.parameters()} == {None}


@pytest.mark.parametrize("kind", list(Adversarial))
def test_a_trained_discriminator_draws_fakes_to_the_real_mean(kind):
    """Heads trained on N(2, 1/16) against N(0, 1/16): descending what fakes pay raises their mean."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = vector_judge(kind)
    optimizer = torch.optim.Adam(judge.heads.parameters(), lr=5e-3)
    rng = Rng(0)
    for step in range(100):
        optimizer.zero_grad()
        judge.pay(shown(2.0, seed=step, spread=0.25), shown(0.0, seed=step + 1000, spread=0.25), rng)[
            "discriminator"
        ].backward()
        optimizer.step()
    x = shown(0.0, 256, spread=0.25).x.requires_grad_()
    judge.fool(Judged(x, Condition.none()), rng, shown(2.0, 256, seed=5, spread=0.25)).backward()
    assert x.grad is not None
    assert (x.grad.sum(0) < 0).all()


def test_the_penalties_of_a_linear_discriminator():
    """D(x_t) = ⟨a, x_t⟩: both penalties are γ/2·‖a‖² by the samples, and by the features of the layer that says x_t."""
    a = torch.tensor([[3.0, -4.0]])
    judge = vector_judge(Adversarial.NON_SATURATING)
    reader = Passing(2)
    network = NetworkDenoiser(reader, judge.backbone.family, Flow(), Kind.X0, None, judge.backbone.adapters)
    heads = Heads([(2,)])
    heads.heads = nn.ModuleList([nn.Linear(2, 1, bias=False)])
    heads.heads[0].weight.data = a.clone()  # pyright: ignore[reportAttributeAccessIssue]
    tapped = replace(network, tap=FeatureTap(reader, ("same",)))
    for of_features in (False, True):
        smoothness = Smoothness(real=0.5, fake=2.0, of_features=of_features)
        linear = Discriminator(tapped, heads, Uniform(Flow()), smoothness=smoothness, trains_backbone=False)
        paid = linear.pay(shown(1.0, 20_000), shown(0.0, 20_000), Rng(0))
        assert paid["r1"].tolist() == pytest.approx(0.25 * 25, rel=1e-4 if of_features else 0.05)
        assert paid["r2"].tolist() == pytest.approx(1.0 * 25, rel=1e-4 if of_features else 0.05)


class Passing(nn.Module):
    """Says its input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.same, self.dim = nn.Identity(), dim

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.same(sample),)


@pytest.mark.parametrize("kind", [Adversarial.NON_SATURATING, Adversarial.RELATIVISTIC])
def test_the_optimal_slope_on_noised_gaussians(kind):
    """N(1.2, .7²) against N(−.4, .7²) at t = 1/2: log-odds of slope α(m_r − m_f)/(α²s² + σ²) = 2.1477."""
    judge = vector_judge(kind)
    reader = Passing(1)
    network = NetworkDenoiser(reader, judge.backbone.family, Flow(), Kind.X0, None, judge.backbone.adapters)
    heads = Heads([(1,)])
    linear = nn.Linear(1, 1)
    heads.heads = nn.ModuleList([linear])
    judge = Discriminator(replace(network, tap=FeatureTap(reader, ("same",))), heads, Choice((0.5,)), kind)
    optimizer = torch.optim.LBFGS(heads.parameters(), max_iter=40, line_search_fn="strong_wolfe")
    generator = torch.Generator().manual_seed(7)
    real, fake = (Judged(m + 0.7 * torch.randn(200_000, 1, generator=generator), Condition.none()) for m in (1.2, -0.4))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = judge.pay(real, fake, Rng(0))["discriminator"]
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    assert float(linear.weight.detach()) == pytest.approx(0.5 * 1.6 / (0.25 * 0.49 + 0.25), rel=0.015)
    if kind is Adversarial.NON_SATURATING:
        assert float(linear.bias.detach()) == pytest.approx(-0.25 * (1.44 - 0.16) / (2 * 0.3725), rel=0.03)


def test_a_pair_of_real_and_fake_is_judged_at_one_time():
    """The two halves of one batch have the same noise levels: equal samples tell nothing of themselves."""
    judge = vector_judge(Adversarial.RELATIVISTIC)
    seen: list[Tensor] = []
    judge.backbone.network.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    judge.pay(shown(1.0, 8), shown(0.0, 8), Rng(0))
    real, fake = seen[-1].chunk(2)
    assert torch.equal(real, fake)
    assert len(real.unique()) == 8


def test_each_output_is_trained_alone():
    """Of three questions the second one is asked: the others' last layer has no gradient."""
    network = VectorNetwork(VectorConfig(2, 0, (0.0, 0.0), 1.0, width=8, depth=2))
    score = make_denoiser(network, Schedule(Flow(), Kind.VELOCITY))
    example = Batch(torch.zeros(1, 2), Condition.none(), torch.zeros(1).long())
    judge = Discriminator.on(score, example, ("blocks",), outputs=3)
    assert judge(torch.zeros(5, 2), torch.full((5,), 0.5), Condition.none()).shape == (5, 6)
    judge.pay(shown(1.0), shown(0.0), Rng(0), output=1)["discriminator"].backward()
    for head in judge.heads.heads:
        rows = next(p for name, p in reversed(list(head.named_parameters())) if name.endswith("weight")).grad
        assert rows is not None
        assert (rows.abs().sum(1) > 0).tolist() == [False, True, False]


def test_blocks_are_the_network_s_own():
    unet, vectors = backbone("unet"), VectorNetwork(VectorConfig(2, 0, (0.0, 0.0), 1.0, width=8, depth=2))
    assert block_names(vectors, make_denoiser(vectors, Schedule(Flow(), Kind.VELOCITY)).family) == (
        "middle.0",
        "middle.1",
    )
    names = block_names(unet.network, unet.family)
    assert names.index("mid_block") == len([n for n in names if n.startswith("down_blocks")])
    assert [n for n in names if n.startswith("up_blocks")] == list(names[names.index("mid_block") + 1 :])
    example = Batch(torch.randn(1, 3, 8, 8), LABELS.rows(slice(0, 1)), torch.zeros(1).long())
    judge = Discriminator.on(unet, example, ("blocks",), modulated=True)
    logits = judge(torch.randn(2, 3, 8, 8), torch.tensor([0.3, 1.0]), LABELS)
    assert logits.shape == (2, len(names))
    assert logits.isfinite().all()


def test_modulated_heads_start_plain_and_learn_to_hear():
    heads = Heads([(8, 4, 4), (6, 8), (8,)], classes=4)
    features = [torch.randn(3, 8, 4, 4), torch.randn(3, 6, 8), torch.randn(3, 8)]
    labels = torch.tensor([0, 1, 2])
    told = heads(features, torch.zeros(3), labels)
    torch.testing.assert_close(told, heads(features, torch.full((3,), torch.inf), labels.flip(0)))
    with torch.no_grad():
        for film in heads.films:
            nn.init.normal_(film.both.weight)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    told = heads(features, torch.zeros(3), labels)
    other = heads(features, torch.zeros(3), torch.tensor([0, 3, 2]))
    assert ((told - other).abs() > 1e-5).tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert ((told - heads(features, torch.ones(3), labels)).abs() > 1e-5).all()
