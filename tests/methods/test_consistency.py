"""Consistency distillation ends at its teacher's N-step solver, and keeps the clean end where it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from tests.methods.gaussians import finish, state_of
from tests.training.runs import METHODS, begin, config, go, sources

TEACHER = GaussianMixture.gaussian(1.5, 0.4)


class Table(nn.Module):
    """x̂_0 = slope·x + shift at each start of the N intervals, and x at the clean end."""

    def __init__(self, intervals: int) -> None:
        super().__init__()
        self.slope, self.shift = nn.Parameter(torch.ones(intervals)), nn.Parameter(torch.zeros(intervals))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        index = (timestep / 1000 * len(self.slope)).round().long()
        start = (index - 1).clamp_min(0)
        moved = self.slope[start, None] * sample + self.shift[start, None]
        return (torch.where(index[:, None] == 0, sample, moved),)


def products(intervals: int) -> list[float]:
    """Slopes of the Euler solver from t = i/N to 0, by hand: x' = A(t)·(x − m_t) − 1.5."""
    out, slope = [], 1.0
    for i in range(1, intervals + 1):
        t = i / intervals
        a = (t - (1 - t) * 0.16) / ((1 - t) ** 2 * 0.16 + t**2)
        slope *= 1 - a / intervals
        out.append(slope)
    return out


@pytest.mark.parametrize(
    ("target", "intervals", "expected"),
    [("self", 4, 0.25976), pytest.param("ema", 4, 0.25976, marks=pytest.mark.slow), ("ema", 8, 0.32511)],
)
def test_the_fixed_point_is_the_solver_s_own_map(target, intervals, expected):
    student = Table(intervals)
    method = {"name": "consistency", "solver": "euler", "intervals": intervals, "target": target, "metric": "l2"}
    method |= {"target_decay": 0.5} if target == "ema" else {}
    optim = {"lr": 5e-2, "betas": [0.9, 0.99], "decay": "cosine", "clip": None}
    state = state_of(method, student, TEACHER, TEACHER, optim=optim, train={"steps": 800})
    finish(state)
    assert products(intervals)[-1] == pytest.approx(expected, abs=1e-5)
    assert float(student.slope.detach()[-1]) == pytest.approx(expected, abs=2e-3)
    assert student.slope.tolist() == pytest.approx(products(intervals), abs=2e-3)
    assert float(student.shift.detach()[-1]) == pytest.approx(1.5, abs=5e-3)


def test_training_without_a_teacher_averages_over_what_the_noise_leaves_open():
    """At t = 1/2 that is E[x_0 | x_t], of slope k; at t = 1, E[f(x_1/2) | ε] = k·(ε + 1.5)/2 + shift, of slope k/2."""
    student = Table(2)
    method = {"name": "consistency", "teacher": False, "intervals": 2, "metric": "l2"}
    optim = {"lr": 5e-2, "betas": [0.9, 0.99], "decay": "cosine", "clip": None}
    state = state_of(method, student, TEACHER, TEACHER, optim=optim, train={"steps": 800})
    finish(state)
    posterior = 0.5 * 0.16 / (0.25 * 0.16 + 0.25)
    assert float(student.slope.detach()[0]) == pytest.approx(posterior, abs=0.02)
    assert float(student.slope.detach()[1]) == pytest.approx(posterior / 2, abs=0.02)
    assert float(student.shift.detach()[1]) == pytest.approx(1.5, abs=0.05)


@pytest.mark.parametrize("boundary", ["plain", "lcm"])
def test_the_clean_end_stays_fixed(boundary):
    method = begin(config({**METHODS["consistency"], "boundary": boundary})).method
    x, t = torch.randn(8, 2), torch.zeros(8)
    labels = Condition.of_labels(torch.arange(8) % 5)
    torch.testing.assert_close(method._f(method.student, x, t, labels), x)  # pyright: ignore[reportAttributeAccessIssue]


def test_the_target_follows_with_its_own_decay():
    state = begin(config(METHODS["consistency"]))
    before = {name: value.detach().clone() for name, value in state.method.averages["target"].shadow.items()}
    go(state, 1)
    student = state.method.players["student"].parameters
    for name, value in state.method.averages["target"].shadow.items():
        torch.testing.assert_close(value.detach(), 0.8 * before[name] + 0.2 * student[name].detach())
    assert not any(value.requires_grad for value in state.method.averages["target"].shadow.values())
    assert set(state.method.averages) == {"target", "ema"}


def test_a_range_of_guidance_needs_a_conditional_teacher():
    ranged = config({"name": "consistency", "guidance_range": [2.0, 8.0]})
    unconditional = replace(sources(), teacher=GaussianMixture.gaussian(torch.zeros(2), 1.0).denoiser(Flow()))
    for start in (unconditional, replace(sources(), teacher=None)):
        with pytest.raises(UserError, match=r"conditional teacher, and this run has none|teacher.path: missing"):
            begin(ranged, start)


def test_the_sampler_renoises():
    method = begin(config(METHODS["consistency"])).method
    sampler = method.sampler(config(METHODS["consistency"]).method, Flow(), 2)
    assert (sampler.times, sampler.kind) == ((1.0, 0.5), "renoise")
