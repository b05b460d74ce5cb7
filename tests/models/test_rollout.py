"""How a student's samples are made in training: what each step sees, and where gradient flows."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.process import EDM, Flow, Process
from fewstep.diffusion.solvers import Sampler, sample
from fewstep.models.conditioning import Condition
from fewstep.models.rollout import backward_simulation, from_noised_data, one_step
from fewstep.rng import Rng


@dataclass
class Linear:
    """x̂_0 = gain·x, and a list of what it was called with."""

    gain: Tensor
    process: Process = field(default_factory=Flow)
    seen: list[tuple[float, Tensor, bool]] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        self.seen.append((float(t[0]), x_t.detach(), torch.is_grad_enabled()))
        return Prediction.of_x0(self.process, x_t, t, self.gain * x_t)


class Last(Rng):
    """Always the last step."""

    def integer(self, high: int) -> int:
        return high - 1


def gain(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


LIKE = torch.empty(20_000, 1)


def test_the_second_step_sees_the_student_s_own_samples():
    """First gain 1/2: then x at t = 1/2 has variance 1/4·1/4 + 1/4, but 1/4·1 + 1/4 from noised data N(0, 1)."""
    own, data = Linear(gain(0.5)), Linear(gain(0.5))
    backward_simulation(own, (1.0, 0.5), LIKE, Condition.none(), Last(0))
    from_noised_data(data, (1.0, 0.5), torch.randn(20_000, 1), Condition.none(), Last(1))
    assert float(own.seen[-1][1].var()) == pytest.approx(0.3125, rel=0.03)
    assert float(data.seen[-1][1].var()) == pytest.approx(0.5, rel=0.03)
    assert [time for time, _, _ in own.seen] == [1.0, 0.5]
    assert [time for time, _, _ in data.seen] == [0.5]


def test_only_the_last_evaluation_has_a_graph():
    student = Linear(gain(0.5))
    made = backward_simulation(student, (1.0, 0.75, 0.5, 0.25), LIKE[:8], Condition.none(), Last(0))
    assert [graph for _, _, graph in student.seen] == [False, False, False, True]
    (gradient,) = torch.autograd.grad(made.x.sum(), student.gain)
    torch.testing.assert_close(gradient, student.seen[-1][1].sum())


def test_the_noise_between_steps_is_fresh():
    student = Linear(gain(0.5))
    backward_simulation(student, (1.0, 0.5), LIKE, Condition.none(), Last(0))
    first, second = student.seen[0][1], student.seen[1][1]
    noise = (second - 0.5 * 0.5 * first) / 0.5
    assert float((noise * first).mean()) == pytest.approx(0, abs=0.03)
    assert float(noise.std()) == pytest.approx(1, abs=0.03)


def test_every_number_of_steps_comes_up():
    student, rng = Linear(gain(0.5)), Rng(0)
    depths = []
    for _ in range(60):
        student.seen.clear()
        backward_simulation(student, (1.0, 0.75, 0.5, 0.25), LIKE[:1], Condition.none(), rng)
        depths.append(len(student.seen))
    assert set(depths) == {1, 2, 3, 4}


def test_it_is_the_sampler_s_own_path():
    """With the same draws, the last step's x̂_0 is what the re-noising sampler returns."""
    student = Linear(gain(0.5))
    times = Flow(3.0).step_list(3)
    x_hat = backward_simulation(student, times, LIKE[:5], Condition.none(), Last(4)).x
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(5, 1, generator=generator)
    drawn = sample(student, Sampler(times), noise, Condition.none(), generator)
    torch.testing.assert_close(x_hat.detach(), drawn.detach())


def test_the_first_step_starts_from_pure_noise_at_the_process_s_scale():
    student = Linear(gain(1.0), EDM())
    times = EDM().step_list(2)
    from_noised_data(student, times[:1], torch.full((20_000, 1), 5.0), Condition.none(), Rng(0))
    backward_simulation(student, times[:1], LIKE, Condition.none(), Rng(0))
    one_step(student, times[0], torch.ones(3, 1), Condition.none())
    for _, x, _ in student.seen[:2]:
        assert float(x.std()) == pytest.approx(80, rel=0.02)
        assert float(x.mean()) == pytest.approx(0, abs=2)
    assert student.seen[2][1].flatten().tolist() == [80.0] * 3
