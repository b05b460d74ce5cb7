"""f-distill against DMD2, which it generalises, and on students whose fixed points are known."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.errors import UserError
from fewstep.losses.f_divergence import Divergence
from fewstep.rng import Rng
from fewstep.training.loop import TrainState
from tests.methods.gaussians import Gaussian, denoiser, finish, state_of
from tests.training.runs import assert_same, begin, config, everything, go, weights

TINY: dict[str, Any] = {"name": "f_distill", "critic_updates": 2}


def student_gradient(state: TrainState, seed: int = 5) -> dict[str, Tensor]:
    """Of the student's loss at step 2, on the loader's next batch, with every draw from `seed`."""
    for name, player in state.method.players.items():
        player.require_grad(name == "student")
    state.method.turn(2).loss(state.next_batch(), Rng(seed)).total.backward()
    gradients = {name: p.grad for name, p in state.method.players["student"].parameters.items() if p.grad is not None}
    for player in state.method.players.values():
        for parameter in player.parameters.values():
            parameter.grad = None
    return gradients


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("gan_weight", [0.0, 0.1])
def test_with_the_reverse_kl_the_student_s_gradient_is_dmd2_s_to_the_bit(steps, gan_weight):
    shared = {"critic_updates": 2, "gan_weight": gan_weight}
    ours = begin(config({**shared, "name": "f_distill", "divergence": "reverse_kl"}, student={"steps": steps}))
    theirs = begin(config({**shared, "name": "dmd2"}, student={"steps": steps}))
    for name, parameter in ours.method.players["fake_score"].parameters.items():
        noise = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        for state in (ours, theirs):
            state.method.players["fake_score"].parameters[name].data.add_(noise)
    one, other = student_gradient(ours), student_gradient(theirs)
    assert_same(one, other)
    assert max(float(g.abs().max()) for g in one.values()) > 1e-3


def test_with_the_reverse_kl_and_the_gan_the_whole_run_is_dmd2_s():
    shared = {"critic_updates": 2, "gan_weight": 0.1, "r1_weight": 1.0}
    ours = begin(config({**shared, "name": "f_distill", "divergence": "reverse_kl"}))
    theirs = begin(config({**shared, "name": "dmd2"}))
    go(ours)
    go(theirs)
    assert_same(everything(ours), everything(theirs))


class Told(nn.Module):
    """Heads that say a given log-ratio for every sample, whatever the features."""

    def __init__(self, log_ratio: Tensor) -> None:
        super().__init__()
        self.log_ratio = log_ratio

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.log_ratio[: len(features[0]), None]


def told(divergence: str, log_ratio: Tensor, **more: object) -> Tensor:
    """The gradient of the student's last bias, which is the mean of the samples' weighted directions."""
    state = begin(config({**TINY, "divergence": divergence, "weight": "none", **more}))
    judge = state.method.discriminator  # pyright: ignore[reportAttributeAccessIssue]
    object.__setattr__(judge, "heads", Told(log_ratio))
    return student_gradient(state)["last.bias"]


@pytest.mark.parametrize("divergence", Divergence)
def test_a_discriminator_that_knows_nothing_weighs_all_alike(divergence):
    blank = torch.zeros(8)
    torch.testing.assert_close(told(divergence, blank), told("reverse_kl", blank), rtol=1e-5, atol=1e-7)


def test_samples_are_weighted_by_h_of_their_ratio_normalised():
    """One sample of ratio 4, seven of ratio ¼: h of forward KL is 4 and ¼, of softened reverse KL 0.2 and 0.8."""
    only = [
        told("forward_kl", torch.where(torch.arange(8) == i, 2.0, -50.0), ratio_bounds=(1e-20, 20.0)) for i in range(8)
    ]
    log_ratio = torch.where(torch.arange(8) == 3, 4.0, 0.25).log()
    for divergence, high, low in (("forward_kl", 4.0, 0.25), ("softened_rkl", 0.2, 0.8), ("js", 0.8, 0.2)):
        parts = torch.stack(only) / 8 * torch.where(torch.arange(8) == 3, high, low)[:, None]
        expected = parts.sum(0) * 8 / (high + 7 * low)
        torch.testing.assert_close(told(divergence, log_ratio), expected, rtol=1e-4, atol=1e-6)


def test_ratios_are_normalised_within_their_noise_levels():
    """With a bin for each sample every ratio becomes 1."""
    log_ratio = torch.linspace(-1, 1, 8)
    alike = told("reverse_kl", log_ratio)
    torch.testing.assert_close(told("js", log_ratio, ratio_bins=10_000), alike, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(told("js", log_ratio), alike, rtol=1e-2)


def test_whose_turn_it_is_decides_who_has_gradients():
    state = begin(config(TINY))
    before = weights(state)
    go(state, 2)
    after = weights(state)
    changed = {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fake_score", "discriminator"}
    for step, alone in ((2, {"student"}), (3, {"fake_score", "discriminator"})):
        turn = state.method.turn(step)
        for player in state.method.players.values():
            player.require_grad(True)  # the loss alone must route them
        turn.loss(state.next_batch(), state.rng).total.backward()
        players = state.method.players.items()
        reached = {name for name, one in players if any(p.grad is not None for p in one.parameters.values())}
        assert reached == alone == set(turn.trains)
        for _, player in players:
            for parameter in player.parameters.values():
                parameter.grad = None


@pytest.mark.parametrize(
    ("divergence", "rounds"), [("js", 150), pytest.param("forward_kl", 200, marks=pytest.mark.slow)]
)
def test_the_student_ends_at_the_teacher_s_moments(divergence, rounds):
    """Mean (1, −1) and standard deviations (1.5, 0.4), with a learned fake score and a learned ratio."""
    means, stds = torch.tensor([1.0, -1.0]), torch.tensor([1.5, 0.4])
    teacher, student = Gaussian(2, steps=()), Gaussian(2)
    with torch.no_grad():
        teacher.mean.copy_(means)
        teacher.log_std.copy_(stds.log())
    data = GaussianMixture.gaussian(means, 1.0)
    method = {"name": "f_distill", "divergence": divergence, "critic_updates": 4, "discriminator_weight": 1e-6}
    optim: dict[str, object] = {"lr": 3e-2, "betas": [0.0, 0.999], "decay": "cosine", "clip": None}
    state = state_of(method, student, denoiser(teacher), data, optim=optim, train={"steps": 5 * rounds})
    finish(state)
    assert student.mean.tolist() == pytest.approx(means.tolist(), abs=0.04)
    assert student.log_std.exp().tolist() == pytest.approx(stds.tolist(), rel=0.04)


def test_the_window_of_noise_levels_and_the_figures():
    state = begin(config({**TINY, "renoise": [0.3, 0.4], "anneal": 0.0}))
    turn = state.method.turn(2)
    assert isinstance(turn.loss, partial)
    times = turn.loss.keywords["judged_at"](torch.tensor([0.0, 0.999]))
    assert times.tolist() == pytest.approx([0.3, 0.4], abs=1e-3)
    critic, _, student = go(state, 3)
    assert set(critic.terms.losses) == {"denoising", "discriminator"}
    assert float(critic.terms.losses["discriminator"]) == pytest.approx(1e-2 * 2 * 0.6931, rel=0.2), "2·ln 2 at first"
    assert set(student.terms.losses) == {"f_divergence"}
    assert 0.1 <= float(student.terms.figures["ratio"]) <= 20


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"ratio_bounds": [0.0, 2.0]}, r"method.ratio_bounds: \[0.0, 2.0\] given, ratios are positive"),
        ({"times": [1.0, 0.5]}, r"method.times: 2 given, student.steps=1 needs as many"),
        ({"fake_score_lora": 2}, r"adapters and feature taps need a network"),
    ],
)
def test_what_cannot_be_is_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        begin(config({**TINY, **wrong}))
