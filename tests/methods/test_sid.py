"""SiD on Gaussians: its gradient, where that flows, and where the student ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.rng import Rng
from fewstep.training.loop import TrainState
from tests.methods.gaussians import Gaussian, denoiser, finish, state_of
from tests.methods.quadrature import Quadrature
from tests.training.runs import begin, config, go, sources

UNIT = GaussianMixture.gaussian(0.0, 1.0)
OPTIM: dict[str, object] = {"lr": 3e-2, "betas": [0.0, 0.999], "decay": "cosine", "clip": None}
TINY: dict[str, object] = {"name": "sid", "fake_score_updates": 1}


def gradients(mean: float, teacher_std: float, b: float, alpha: float) -> tuple[list[float], float]:
    """∂L/∂a and ∂L/∂b at t = 0.4 of the student a + b·z in three dimensions, a = 0, whose fake score is exact."""
    student = Gaussian(3)
    with torch.no_grad():
        student.log_std.fill_(b).log_()
    method = {"name": "sid", "alpha": alpha, "weight": "none", "renoise": [0.39, 0.41], "anneal": 0.0}
    teacher = GaussianMixture.gaussian(torch.full((3,), mean), teacher_std)
    state = state_of(method, student, teacher, teacher, data={"batch_size": 4})
    turn = state.method.turn(1)
    assert turn.name == "student"
    turn.loss(state.next_batch(), Quadrature()).total.backward()
    assert student.mean.grad is not None
    assert student.log_std.grad is not None
    return student.mean.grad.tolist(), float(student.log_std.grad.sum()) / b


@pytest.mark.parametrize(
    ("b", "alpha", "expected"),
    [
        (0.5, 0.5, -0.4724),
        (0.5, 1.0, -0.6380),
        (0.5, 1.2, -0.7043),
        (3.0, 0.5, 0.8321),
        (3.0, 1.0, 0.2208),
        (3.0, 1.2, -0.0238),
    ],
)
def test_the_gradient_of_the_spread_is_that_of_two_gaussians(b, alpha, expected):
    """−2·d·b·(ρ_b − ρ_s)·((1 − a)·ρ_s + a·ρ_b): only with gradient through both scores."""
    assert gradients(0.0, 1.0, b, alpha)[1] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_the_gradient_of_the_mean_is_that_of_two_gaussians(alpha):
    """ρ²·(a − m) for every α, where the spreads agree."""
    rho = 0.4**2 / (0.6**2 * 0.7**2 + 0.4**2)
    assert gradients(2.0, 0.7, 0.7, alpha)[0] == pytest.approx([-2 * rho**2] * 3, rel=1e-4)


def test_a_student_that_has_arrived_gets_no_gradient():
    mean, spread = gradients(0.0, 1.0, 1.0, 1.2)
    assert [*mean, spread] == pytest.approx([0.0] * 4, abs=1e-5)


def flags(state: TrainState, trains: tuple[str, ...]) -> None:
    """As the loop sets them for a turn."""
    for name, optimizer in state.optimizers.items():
        optimizer.player.require_grad(name in trains)


def with_gradient(state: TrainState, start: Mapping[str, nn.Module]) -> set[str]:
    """Whose weights have a gradient, after the backward pass of the turn at the state's step."""
    turn = state.method.turn(state.step)
    flags(state, turn.trains)
    turn.loss(state.next_batch(), state.rng).total.backward()
    return {name for name, network in start.items() if any(p.grad is not None for p in network.parameters())}


@pytest.mark.parametrize("fake_score_lora", [None, 2])
def test_no_score_s_weights_get_a_gradient_in_the_student_s_turn(fake_score_lora):
    start = sources(network_teacher=True)
    assert start.teacher is not None
    state = begin(config({**TINY, "fake_score_lora": fake_score_lora}), start)
    networks = {"student": state.method.student.network, "teacher": start.teacher.network}  # pyright: ignore[reportAttributeAccessIssue]
    networks["fake_score"] = nn.ParameterList(state.method.players["fake_score"].parameters.values())
    first = with_gradient(state, networks)
    # A LoRA fake score lives inside the teacher's network; the frozen weights beside it stay without gradient.
    assert first == ({"fake_score"} if fake_score_lora is None else {"fake_score", "teacher"})
    base = [p for name, p in networks["teacher"].named_parameters() if "lora_" not in name]
    assert all(p.grad is None for p in base)
    for network in networks.values():
        network.zero_grad(set_to_none=True)
    state.step = 1
    assert with_gradient(state, networks) == {"student"}


@pytest.mark.parametrize(
    ("alpha", "rounds"),
    [
        pytest.param(1.0, 250, id="quick"),
        *(pytest.param(alpha, 3000, id=f"full-{alpha}", marks=pytest.mark.slow) for alpha in (0.5, 1.0, 1.2)),
    ],
)
def test_the_student_ends_at_the_teacher_s_moments(alpha, rounds):
    """Mean (1, −1, .5, 2) and variances (2, 1, .5, .1), with a learned fake score."""
    wanted = Gaussian(4)
    with torch.no_grad():
        wanted.mean.copy_(torch.tensor([1.0, -1.0, 0.5, 2.0]))
        wanted.log_std.copy_(0.5 * torch.tensor([2.0, 1.0, 0.5, 0.1]).log())
    teacher = Gaussian(4, steps=())
    teacher.load_state_dict(wanted.state_dict())
    student = Gaussian(4)
    method = {"name": "sid", "alpha": alpha, "fake_score_updates": 5}
    data = GaussianMixture.gaussian(torch.zeros(4), 1.0)
    state = state_of(method, student, denoiser(teacher), data, optim=OPTIM, train={"steps": 6 * rounds})
    finish(state)
    assert float((student.mean - wanted.mean).detach().abs().max()) < 0.05
    variance, target = ((2 * one.log_std.detach()).exp() for one in (student, wanted))
    assert float((variance - target).norm() / target.norm()) < 0.05


class LastStep(Rng):
    """Every rollout goes to the last step."""

    def integer(self, high: int) -> int:
        return high - 1


def test_the_second_step_learns_for_its_own_input():
    """Its gain² is 1/(.25·.25 + .25), the inverse variance of the student's own samples, noised to t = 1/2."""
    student = Gaussian(1, steps=(1.0, 0.5))
    student.first_gain = 0.5
    method = {"name": "sid", "fake_score_updates": 3, "anneal": 0.0}
    state = state_of(method, student, UNIT, UNIT, optim=OPTIM, student={"steps": 2}, train={"steps": 1200})
    state.rng = LastStep(0)
    finish(state)
    assert float((2 * student.log_std.detach()).exp()) == pytest.approx(3.2, rel=0.05)


class Classed(nn.Module):
    """The Gaussian of gaussians.py with one mean for class 0 and one for the null label 1, and a common spread."""

    def __init__(self, means: tuple[float, float], std: float, student: bool) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.tensor(means))
        self.log_std = nn.Parameter(torch.tensor(std).log())
        self.student = student

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        t, mean, std = (timestep / 1000)[:, None], self.means[class_labels][:, None], self.log_std.exp()
        posterior = mean + (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2) * (sample - (1 - t) * mean)
        return (torch.where((t == 1) & self.student, mean + std * sample, posterior),)


@pytest.mark.slow
@pytest.mark.parametrize("fake_guidance", [1.0, 2.0])
def test_the_fixed_point_is_the_guided_teacher(fake_guidance):
    """m_∅ + s·(m_c − m_∅) = 1 with s = 2, whatever guidance the fake score is trained and judged under (SiD-LSG)."""
    null = Condition.of_labels(torch.tensor([1]))
    teacher = replace(denoiser(Classed((0.5, 0.0), 0.6, student=False)), null=null)
    student = Classed((0.0, 0.0), 1.0, student=True)
    data = GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    method = {"name": "sid", "fake_guidance": fake_guidance, "fake_score_updates": 3, "weight": "none"}
    state = state_of(method, student, teacher, data, optim=OPTIM, teacher={"guidance": 2.0}, train={"steps": 1200})
    finish(state)
    assert float(student.means.detach()[0]) == pytest.approx(1.0, abs=0.03)
    assert float(student.log_std.detach().exp()) == pytest.approx(0.6, abs=0.03)


def test_it_needs_no_data():
    """Only the conditions and the shape of a batch are read."""
    figures = []
    for scale in (1.0, float("nan")):
        state = begin(config(TINY))
        batches = [state.next_batch() for _ in range(2)]
        losses = [
            state.method.turn(step).loss(replace(batch, x=scale * batch.x), state.rng)
            for step, batch in enumerate(batches)
        ]
        figures.append([float(terms.total.detach()) for terms in losses])
    assert figures[0] == figures[1]
    assert all(map(bool, figures[0]))


def test_the_turns_and_their_windows():
    run = config({**TINY, "fake_score_updates": 2, "renoise": [0.2, 0.4], "anneal": 0.5}, train={"steps": 12})
    method = begin(run).method
    assert [method.turn(step).name for step in range(6)] == ["fake_score", "fake_score", "student"] * 2
    lows = []
    for step in (2, 5, 11):
        loss = method.turn(step).loss
        assert isinstance(loss, partial)
        window = loss.keywords["judged_at"]
        lows.append((window.low, window.high))
    # 0.7·(1 − 2·step/12) of the window's width is left out at first.
    assert lows == [pytest.approx((0.2 + 0.7 * left * 0.2, 0.4)) for left in (2 / 3, 1 / 6, 0.0)]


def test_the_sampler_starts_where_the_student_was_trained():
    run = config({**TINY, "times": [0.7, 0.3]}, student={"steps": 2})
    sampler = begin(run).method.sampler(run.method, Flow(), 2)
    assert (sampler.times, sampler.kind) == ((0.7, 0.3), "renoise")
    assert [report.turn for report in go(begin(run), 2)] == ["fake_score", "student"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": [0.7]}, "method.times: 1 given, student.steps=2 needs as many"),
        ({"fake_score_lora": 2}, "adapters and feature taps need a network, this teacher is a closed form"),
    ],
)
def test_mistakes_are_told_before_the_first_step(change, message):
    with pytest.raises(UserError, match=message):
        begin(config({**TINY, **change}, student={"steps": 2}))


def test_guidance_of_the_fake_score_needs_a_conditional_teacher():
    with pytest.raises(UserError, match=r"method.fake_guidance: 2.0 needs a conditional teacher"):
        state_of({"name": "sid", "fake_guidance": 2.0}, Gaussian(1), UNIT, UNIT)
