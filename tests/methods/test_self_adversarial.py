"""Adversarial self-distillation: n steps move towards n + 1, and only because a score difference ties them down."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fewstep.data.batch import Batch
from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.process import Flow
from fewstep.diffusion.solvers import Sampler, sample
from fewstep.diffusion.times import Uniform
from fewstep.errors import UserError
from fewstep.losses.adversarial import Adversarial
from fewstep.models.conditioning import STEP, Condition
from fewstep.models.discriminator import Discriminator, Judged
from fewstep.models.rollout import backward_simulation, last_estimate
from fewstep.rng import Rng
from fewstep.training import checkpoint
from tests.methods.gaussians import denoiser
from tests.training.runs import assert_same, begin, config, everything, go, moved, vector_denoiser, weights

METHOD = {"name": "self_adversarial", "critic_updates": 2, "most_steps": 3}
LN2 = math.log(2)


class Scripted(Rng):
    """Host draws as told, then 0."""

    def __init__(self, *integers: int) -> None:
        super().__init__(0)
        self.integers = list(integers)

    def integer(self, high: int) -> int:
        value = self.integers.pop(0) if self.integers else 0
        assert value < high
        return value


def test_the_last_estimate_is_the_sampler_s_and_that_of_backward_simulation():
    student, noise = vector_denoiser(), torch.randn(16, 2)
    labels, times = Condition.of_labels(torch.arange(16) % 5), Flow().step_list(3)
    replay = Rng(3)
    expected = sample(student, Sampler(times), replay.normal(noise), labels, replay._device)
    torch.testing.assert_close(last_estimate(student, times, noise, labels, Rng(3)), expected)
    for last in range(3):
        once = backward_simulation(student, times, noise, labels, Scripted(last)).x
        torch.testing.assert_close(last_estimate(student, times[: last + 1], noise, labels, Rng(0)), once)


def test_the_adversarial_term_is_of_fewer_steps_than_n_only():
    state = begin(config(METHOD))
    method, batch = state.method, state.next_batch()
    law = Uniform(Flow(), 0.02, 0.98)
    for steps, compared in ((1, True), (2, True), (3, False)):
        terms = method.student_loss(batch, Scripted(steps - 1), law)  # pyright: ignore
        assert ("adversarial" in terms.losses) is compared
        critic = method.critic_loss(batch, Scripted(steps - 1))  # pyright: ignore
        assert set(critic.losses) == {"denoising"} | ({"discriminator", "r1", "r2"} if compared else set())


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_fake_score_is_told_how_many_steps_made_a_sample(steps):
    """Whatever `student.steps` is: it learns of samples of every number of steps."""
    method = (state := begin(config(METHOD))).method
    told: list[float] = []
    graft = method.fake_score.graft  # pyright: ignore
    method.fake_score.network.register_forward_pre_hook(  # pyright: ignore
        lambda *_: told.extend(graft.scalars.values.get(STEP, torch.tensor([])).unique().tolist())
    )
    batch = state.next_batch()
    method.critic_loss(batch, Scripted(steps - 1))  # pyright: ignore
    method.student_loss(batch, Scripted(steps - 1), Uniform(Flow(), 0.02, 0.98))  # pyright: ignore
    assert told == [steps - 1] * 2


def test_indifferent_heads_pay_ln_2_and_a_student_that_has_arrived_gets_no_direction():
    state = begin(config({**METHOD, "adversarial_weight": 0.5}))
    for parameter in state.method.players["discriminator"].parameters.values():
        parameter.data.zero_()
    batch, rng = state.next_batch(), Scripted(1)
    terms = state.method.student_loss(batch, rng, Uniform(Flow(), 0.02, 0.98))  # pyright: ignore
    assert terms.losses["adversarial"].tolist() == pytest.approx(0.5 * LN2)
    terms.losses["adversarial"].backward()
    gradients = [p.grad for p in state.method.players["student"].parameters.values() if p.grad is not None]
    assert not any(g.any() for g in gradients)


def test_the_longer_sample_and_the_fake_score_take_no_gradient_of_the_student_s_turn():
    state = begin(config(METHOD))
    calls: list[bool] = []
    state.method.student.network.register_forward_hook(lambda _m, _a, out: calls.append(out[0].requires_grad))
    state.method.players["student"].require_grad(True)
    for name in ("fake_score", "discriminator"):
        state.method.players[name].require_grad(False)
    terms = state.method.student_loss(state.next_batch(), Scripted(1), Uniform(Flow(), 0.02, 0.98))  # pyright: ignore
    assert calls == [False, True, False, False, False], "two steps, gradient through the last; then three without"
    terms.total.backward()
    for name in ("fake_score", "discriminator"):
        assert {p.grad for p in state.method.players[name].parameters.values()} == {None}


def test_the_verdicts_do_not_move_the_fake_score():
    """Its gradient in the critic's turn is that of denoising alone, though its features are judged."""
    gradients = []
    for weight in (0.0, 1.0):
        state = begin(config({**METHOD, "adversarial_weight": weight}))
        state.method.players["fake_score"].require_grad(True)
        terms = state.method.critic_loss(state.next_batch(), Scripted(0))  # pyright: ignore
        terms.total.backward()
        gradients.append([p.grad for p in state.method.players["fake_score"].parameters.values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


class Width(torch.nn.Module):
    """n-step samples of N(0, 1) by Euler's steps have std .329 at n = 2 and .498 at n = 4; here it is learned."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.log_std, self.read = torch.nn.Parameter(torch.tensor(math.log(std))), torch.nn.Identity()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        return (self.log_std.exp() * self.read(sample),)


def test_the_std_of_n_steps_moves_to_that_of_n_plus_1_and_stops_there():
    """Data of std .7 on flow matching: Euler's n = 2 gives .329, n = 4 gives .498 (its ODE .7)."""
    target, start = 0.498, 0.329
    noise = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = GaussianMixture.gaussian(0.0, 0.7).denoiser(Flow())
    for steps, std in ((2, start), (4, target)):
        made = sample(exact, Sampler.of(Flow(), steps, "euler"), noise, Condition.none())
        assert float(made.std()) == pytest.approx(std, abs=3e-3)
    student = Width(start)
    example = Batch(torch.zeros(1, 1), Condition.none(), torch.zeros(1).long())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reader = denoiser(Width(1.0))
        reader.network.requires_grad_(False)
        judge = Discriminator.on(reader, example, ("read",), outputs=2, modulated=True)
    judge = Discriminator(judge.backbone, judge.heads, judge.times, Adversarial.RELATIVISTIC, trains_backbone=False)
    moves = torch.optim.Adam(student.parameters(), lr=5e-3, betas=(0.0, 0.99))
    judges = torch.optim.Adam(judge.heads.parameters(), lr=5e-3, betas=(0.0, 0.99))
    rng, widths = Rng(1), []
    for _ in range(500):
        longer = Judged(target * rng.normal(torch.zeros(256, 1)), Condition.none())
        for optimizer in (judges, moves):
            fake = Judged(student.log_std.exp() * rng.normal(torch.zeros(256, 1)), Condition.none())
            optimizer.zero_grad()
            judged = judge.pay(longer, fake, rng, output=1)["discriminator"]
            (judged if optimizer is judges else judge.fool(fake, rng, longer, output=1)).backward()
            optimizer.step()
        widths.append(student.log_std.detach().exp().clone())
    assert float(widths[60]) > start
    assert float(torch.stack(widths[-150:]).mean()) == pytest.approx(target, abs=0.04)


def test_turns_and_whom_they_move():
    state = begin(config(METHOD))
    for expected in ({"fake_score", "discriminator"}, {"fake_score", "discriminator"}, {"student"}):
        before = weights(state)
        go(state, 1)
        assert moved(before, weights(state)) <= expected
    turn = state.method.turn(2)
    assert isinstance(turn.loss, partial)
    assert set(begin(config({**METHOD, "adversarial_weight": 0.0})).method.players) == {"student", "fake_score"}


def test_stopped_and_resumed_is_bit_identical(tmp_path):
    run = config(METHOD, tmp_path)
    straight, first = begin(run), begin(run)
    go(straight)
    go(first, 4)
    checkpoint.save(tmp_path, first)
    second = begin(run)
    checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[-1], second)
    go(second)
    assert_same(everything(straight), everything(second))


def test_more_steps_than_it_trains_for_are_refused():
    with pytest.raises(UserError, match=r"student.steps=4 is beyond method.most_steps=3"):
        begin(config(METHOD, student={"steps": 4}))
    method = begin(config(METHOD)).method
    sampler = method.sampler(config(METHOD).method, Flow(), 2)
    assert (sampler.times, sampler.kind) == (Flow().step_list(3)[:2], "renoise")
