"""DMD2 on students and teachers whose fixed points are known exactly."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.losses.score import score_direction
from fewstep.models.conditioning import Condition
from fewstep.rng import Rng
from tests.methods.gaussians import Gaussian, denoiser, finish, state_of
from tests.training.runs import METHODS, begin, config, go

UNIT = GaussianMixture.gaussian(0.0, 1.0)
OPTIM: dict[str, object] = {"lr": 2e-2, "betas": [0.0, 0.999], "decay": "cosine", "clip": None}


@pytest.mark.parametrize(
    "rounds", [pytest.param(250, id="quick"), pytest.param(3000, id="full", marks=pytest.mark.slow)]
)
def test_the_student_ends_at_the_teacher_s_moments(rounds):
    """Mean (1, −1, .5, 2) and variances (2, 1, .5, .1), with a learned fake score."""
    wanted = Gaussian(4)
    with torch.no_grad():
        wanted.mean.copy_(torch.tensor([1.0, -1.0, 0.5, 2.0]))
        wanted.log_std.copy_(0.5 * torch.tensor([2.0, 1.0, 0.5, 0.1]).log())
    teacher_network = Gaussian(4, steps=())
    teacher_network.load_state_dict(wanted.state_dict())
    student = Gaussian(4)
    data = GaussianMixture.gaussian(torch.zeros(4), 1.0)
    method = {"name": "dmd2", "critic_updates": 5}
    state = state_of(
        method, student, denoiser(teacher_network), data, optim={**OPTIM, "lr": 3e-2}, train={"steps": 6 * rounds}
    )
    finish(state)
    assert float((student.mean - wanted.mean).detach().abs().max()) < 0.05
    variance, target = ((2 * one.log_std.detach()).exp() for one in (student, wanted))
    assert float((variance - target).norm() / target.norm()) < 0.05


class LastStep(Rng):
    """Every rollout goes to the last step."""

    def integer(self, high: int) -> int:
        return high - 1


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [("backward_simulation", 3.2), pytest.param("noised_data", 2.0, marks=pytest.mark.slow)],
)
def test_the_second_step_learns_for_its_own_input(rollout, expected):
    """Its gain² is 1/(variance of what it is fed): .25·.25 + .25 of its own samples, .25 + .25 of noised data."""
    student = Gaussian(1, steps=(1.0, 0.5))
    student.first_gain = 0.5
    method = {"name": "dmd2", "critic_updates": 3, "rollout": rollout, "anneal": 0.0}
    train = {"steps": 4 * 500}
    state = state_of(method, student, UNIT, UNIT, optim=OPTIM, student={"steps": 2}, train=train)
    state.rng = LastStep(0)
    finish(state)
    assert float((2 * student.log_std.detach()).exp()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("t", "gap"), [(0.05, 0.0), (0.2, 0.0), (0.4, 0.00009), (0.6, 0.172), (0.8, 1.48), (0.95, 2.34)]
)
def test_only_high_noise_sees_a_lost_mode(t, gap):
    """Modes at ±3 of std .3, the student's weights (.9, .1), the teacher's (.5, .5): E|x̂_0,fake − x̂_0,real|."""
    means, stds = torch.tensor([[-3.0], [3.0]]), torch.tensor([0.3, 0.3])
    student, teacher = (GaussianMixture(torch.tensor(w), means, stds) for w in ([0.9, 0.1], [0.5, 0.5]))
    generator = torch.Generator().manual_seed(0)
    x_hat = student.sample(200_000, generator, dtype=torch.float64)
    times = torch.full((200_000,), t, dtype=torch.float64)
    noise = torch.randn(x_hat.shape, generator=generator, dtype=torch.float64)
    x_t = Flow().add_noise(x_hat, noise, times)
    fake, real = (one.denoiser(Flow())(x_t, times, Condition.none()) for one in (student, teacher))
    assert float(score_direction(fake, real).abs().mean()) == pytest.approx(gap, rel=0.03, abs=1e-4)


def test_a_student_that_has_arrived_gets_no_direction():
    """Fake and real agree there, so only the critic has a gradient."""
    student = Gaussian(1)
    state = state_of({"name": "dmd2", "critic_updates": 1}, student, UNIT, UNIT, train={"steps": 2})
    turn = state.method.turn(1)
    assert turn.name == "student"
    terms = turn.loss(state.next_batch(), state.rng)
    assert float(terms.figures["score_gap"]) < 1e-6
    assert set(terms.losses) == {"distribution_matching"}


def test_the_window_of_noise_levels():
    state = begin(config({**METHODS["dmd2"], "renoise": [0.3, 0.4], "anneal": 0.0}))
    student_turn = state.method.turn(2)
    assert isinstance(student_turn.loss, partial)
    times = student_turn.loss.keywords["judged_at"](torch.rand(1000))
    assert float(times.min()) == pytest.approx(0.3, abs=1e-3)
    assert float(times.max()) == pytest.approx(0.4, abs=1e-3)
    every = state.method.all_times(torch.tensor([0.0, 0.999]))  # pyright: ignore[reportAttributeAccessIssue]
    assert every.tolist() == pytest.approx([0.0, 0.999])


def test_the_gan_s_terms_and_their_weights():
    terms = {}
    for weight in (0.1, 0.2):
        state = begin(config({**METHODS["dmd2_gan"], "gan_weight": weight, "discriminator_weight": weight}))
        critic, _, student = go(state, 3)
        terms[weight] = {**critic.terms.losses, **student.terms.losses}
    assert set(terms[0.1]) == {"denoising", "discriminator", "r1", "distribution_matching", "adversarial"}
    assert float(terms[0.2]["discriminator"]) == pytest.approx(2 * float(terms[0.1]["discriminator"]), rel=1e-5)
    assert float(terms[0.1]["discriminator"]) == pytest.approx(0.1 * 2 * 0.6931, rel=0.2), "2·ln 2 at the start"
    assert float(terms[0.1]["adversarial"]) == pytest.approx(0.1 * 0.6931, rel=0.2)


def test_a_discriminator_on_the_teacher_needs_a_network():
    with pytest.raises(UserError, match=r"adapters and feature taps need a network, this teacher is a closed form"):
        begin(config({**METHODS["dmd2_gan"], "gan_features": "teacher"}))
    with pytest.raises(UserError, match=r"adapters and feature taps need a network"):
        begin(config({**METHODS["dmd2"], "fake_score_lora": 2}))


def test_the_sampler_is_the_rollout_s():
    state = begin(config(METHODS["dmd2"], student={"steps": 4}))
    sampler = state.method.sampler(state.config.method, Flow(3.0), 4)
    assert (sampler.times, sampler.kind) == ((1.0, 0.9, 0.75, 0.5), "renoise")
    assert state.method.times == (1.0, 0.75, 0.5, 0.25)  # pyright: ignore[reportAttributeAccessIssue]
