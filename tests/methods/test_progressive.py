"""Progressive distillation ends at the sampler it began with, in as many steps as it was told."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.prediction import Kind, Prediction
from fewstep.diffusion.process import EDM, VP, Flow, Process, TrigFlow
from fewstep.diffusion.solvers import Denoiser, Sampler, jump, sample
from fewstep.errors import UserError
from fewstep.losses.trajectory import distillation_weight, invert_jump
from fewstep.methods.trajectory.progressive import Progressive
from fewstep.models.conditioning import Condition
from fewstep.rng import Rng
from fewstep.training import checkpoint
from tests.methods.gaussians import finish, state_of
from tests.training.runs import assert_same, begin, config, everything, go

TEACHER = GaussianMixture.gaussian(1.5, 0.4)
TABLE = torch.linspace(0.9999, 0.01, 1000, dtype=torch.float64)
METHOD = {"name": "progressive", "start_steps": 8}


class Table(nn.Module):
    """x̂_0 = slope·x + shift at each of the times i/N."""

    def __init__(self, intervals: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(intervals, dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros(intervals, dtype=torch.float64))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        index = (timestep / 1000 * len(self.slope)).round().long() - 1
        return (self.slope[index, None] * sample + self.shift[index, None],)


def ddim(intervals: int, start: int, end: int) -> tuple[float, float]:
    """Slope and shift of the solver's map from i/N to j/N, by hand: x' = −1.5 + A(t)·(x − 1.5·(1 − t))."""
    slope, shift = 1.0, 0.0
    for i in range(start, end, -1):
        t = i / intervals
        a = (t - (1 - t) * 0.16) / ((1 - t) ** 2 * 0.16 + t**2)
        step, moved = 1 - a / intervals, (1.5 + a * 1.5 * (1 - t)) / intervals
        slope, shift = slope * step, shift * step + moved
    return slope, shift


@torch.no_grad()
def solve(student: Table, intervals: int, steps: int) -> None:
    """Give the student the exact answer of the stage of `steps`: x̂_0 whose one jump is the solver's map."""
    for i in range(1, steps + 1):
        t, s = i / steps, (i - 1) / steps
        slope, shift = ddim(intervals, i * intervals // steps, (i - 1) * intervals // steps)
        gain, index = 1 - s - s / t * (1 - t), i * len(student.slope) // steps - 1
        student.slope[index], student.shift[index] = (slope - s / t) / gain, shift / gain


@pytest.mark.parametrize("process", [Flow(), TrigFlow(), TrigFlow(0.5), EDM(), VP(TABLE)], ids=str)
def test_the_inversion_undoes_a_jump(process: Process):
    """To 4e-16 of the step's own size, and to the clean sample itself where the step is the last."""
    generator = torch.Generator().manual_seed(0)
    x_t, x0 = (torch.randn(64, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    t = process.at(0.5 + 0.5 * torch.rand(64, generator=generator, dtype=torch.float64))
    s = process.at(0.4 * torch.rand(64, generator=generator, dtype=torch.float64) + 0.01)
    clean = torch.arange(64) % 4 == 0
    x_t = process.sigma(t)[:, None] * x_t
    prediction = Prediction.of_x0(process, x_t, t, x0)
    x_s = torch.where(clean[:, None], x0, jump(prediction, s))
    assert float((invert_jump(process, x_t, t, x_s, s, clean) - x0).abs().max()) < 4e-15
    again = jump(Prediction.of_x0(process, x_t, t, invert_jump(process, x_t, t, x_s, s, clean)), s)
    scale = x_s.abs().max()
    assert float(((again - x_s)[~clean] / scale).abs().max()) < 4e-16


def test_two_steps_of_ddim_are_one_of_the_target():
    """Spec of the whole target on a Gaussian: where the student's jump lands, two Euler steps land."""
    teacher, t, m, s = TEACHER.denoiser(Flow()), *(torch.full((5,), v, dtype=torch.float64) for v in (0.8, 0.6, 0.4))
    x = torch.linspace(-2, 3, 5, dtype=torch.float64)[:, None]
    landing = jump(teacher(jump(teacher(x, t, Condition.none()), m), m, Condition.none()), s)
    x0 = invert_jump(Flow(), x, t, landing, s, torch.zeros(5, dtype=torch.bool))
    slope, shift = ddim(5, 4, 2)
    torch.testing.assert_close(0.6 * x0 + 0.4 * (x - 0.2 * x0) / 0.8, slope * x + shift, rtol=0, atol=1e-14)


def test_the_weights():
    t = torch.tensor([1.0, 0.8, 0.5, 0.2], dtype=torch.float64)
    assert distillation_weight(Flow(), t, "truncated_snr").tolist() == pytest.approx([1.0, 1.0, 1.0, 16.0])
    assert distillation_weight(Flow(), t, "snr_plus_one").tolist() == pytest.approx([1.0, 1.0625, 2.0, 17.0])


def batch(rows: int = 64) -> Batch:
    x = 1.5 + 0.4 * torch.randn(rows, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Batch(x, Condition.none(), torch.zeros(rows))


def test_each_stage_s_exact_student_has_no_residual():
    """Stages 8 → 4 → 2 → 1 of the 8-step sampler; a student of another sampler has one."""
    student = Table(8)
    state = state_of(METHOD, student, TEACHER, TEACHER, train={"steps": 30})
    for step, steps in ((0, 4), (10, 2), (20, 1)):
        turn = state.method.turn(step)
        assert (turn.name, turn.stage and (turn.stage.start, turn.stage.end)) == (f"{steps}_steps", (step, step + 10))
        for average in state.method.averages.values():
            average.restart()
        solve(student, 16, steps)
        assert float(turn.loss(batch(), Rng(0)).total.detach()) > 1e-5
        solve(student, 8, steps)
        assert float(turn.loss(batch(), Rng(0)).total.detach()) < 1e-13, "times are float32"


def test_trained_stage_by_stage_the_one_step_student_is_the_first_sampler():
    """The slope of Euler in eight steps, .32511; that of the exact flow map is .4."""
    student = Table(8)
    optim = {"lr": 0.1, "betas": [0.9, 0.99], "decay": "linear", "clip": None}
    state = state_of(METHOD, student, TEACHER, TEACHER, optim=optim, train={"steps": 1200})
    seen = []
    for end in (400, 800, 1200):
        go(state, end - state.step)
        steps = 8 >> (len(seen) + 1)
        network = state.method.student
        noise = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
        with torch.no_grad():
            made = sample(network, Sampler.of(Flow(), steps, "ddim"), noise, Condition.none())
        seen.append((float(made[2] - made[0]) / 2, float(made[1])))
    wanted = ddim(8, 8, 0)
    assert wanted[0] == pytest.approx(0.32511, abs=1e-5)
    for slope, shift in seen:
        assert slope == pytest.approx(wanted[0], abs=2e-3)
        assert shift == pytest.approx(wanted[1], abs=4e-3)


def test_the_student_s_times_are_every_second_of_the_teacher_s():
    for process in (Flow(3.0), TrigFlow(), EDM(), VP(TABLE)):
        for steps in (1, 2, 4, 32):
            assert process.step_list(2 * steps)[::2] == pytest.approx(process.step_list(steps), rel=1e-12)


@dataclass(frozen=True)
class Asked:
    """A teacher that notes its name each time it is asked."""

    name: str
    teacher: Denoiser
    names: list[str]

    def drawn(self, rng: Rng, batch: int) -> Asked:
        return self

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        self.names.append(self.name)
        return self.teacher(x_t, t, condition)


def test_the_first_teacher_is_the_guided_one_and_every_later_one_the_last_student():
    state = begin(config(METHOD, teacher={"guidance": 3.0}, train={"steps": 6}))
    method, weights = state.method, state.method.averages["teacher"].shadow
    assert isinstance(method, Progressive)
    names: list[str] = []
    method.guided = Asked("guided", method.guided, names)  # pyright: ignore[reportAttributeAccessIssue]
    method.teacher = Asked("last", method.teacher, names)  # pyright: ignore[reportAttributeAccessIssue]
    for step in range(6):
        before = {name: value.detach().clone() for name, value in weights.items()}
        student = {name: p.detach().clone() for name, p in method.players["student"].parameters.items()}
        go(state, 1)
        expected = student if step % 2 == 0 else before
        assert all(torch.equal(value.detach(), expected[name]) for name, value in weights.items()), step
    assert names == 2 * 2 * ["guided"] + 4 * 2 * ["last"]  # two evaluations a step
    assert not any(value.requires_grad for value in weights.values())


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_stopped_inside_a_stage_at_its_end_and_after_it(tmp_path: Path, stop: int):
    """Three stages of two steps; optimizers, averages and teachers go on bit for bit."""
    run = config(METHOD, tmp_path, optim={"decay": "linear", "warmup": 1}, train={"steps": 6})
    straight, first = begin(run), begin(run)
    go(straight)
    go(first, stop)
    checkpoint.save(tmp_path, first)
    second = begin(run)
    checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[-1], second)
    go(second)
    assert_same(everything(straight), everything(second))


def test_stages_fill_the_run_and_grow():
    for growth, expected in ((1.0, [(0, 10), (10, 20), (20, 30)]), (2.0, [(0, 4), (4, 13), (13, 30)])):
        method = begin(config({**METHOD, "growth": growth}, train={"steps": 30})).method
        halvings = method.halvings  # pyright: ignore[reportAttributeAccessIssue]
        assert [(one.stage.start, one.stage.end) for one in halvings] == expected
        assert [one.steps for one in halvings] == [4, 2, 1]
        assert [len(one.grid) for one in halvings] == [9, 5, 3]
        assert all((a.grid[::2] == b.grid).all() for a, b in pairwise(halvings))


@pytest.mark.parametrize(("start", "steps"), [(8, 3), (12, 1), (2, 2), (4, 8), (9, 1)])
def test_steps_that_do_not_halve_are_refused(start: int, steps: int):
    with pytest.raises(UserError, match=rf"method.start_steps: {start} does not halve .* such as {16 * steps}"):
        begin(config({**METHOD, "start_steps": start}, student={"steps": steps}))
    begin(config({**METHOD, "start_steps": 12}, student={"steps": 3}))


def test_a_stage_without_a_step_is_refused():
    with pytest.raises(UserError, match=r"train.steps: 2 leaves one of the 3 stages"):
        begin(config(METHOD, train={"steps": 2}))


def test_the_sampler_is_ddim_on_the_last_grid():
    method = begin(config(METHOD, student={"steps": 4})).method
    sampler = method.sampler(config(METHOD).method, Flow(), 4)
    assert (sampler.times, sampler.kind) == ((1.0, 0.75, 0.5, 0.25), "ddim")
    assert method.student.kind is Kind.VELOCITY


def test_a_stage_ends_where_its_own_learning_rate_does():
    student = Table(8)
    optim = {"lr": 0.1, "decay": "linear", "clip": None}
    state = state_of(METHOD, student, TEACHER, TEACHER, optim=optim, train={"steps": 6})
    rates = []
    for _ in range(6):
        go(state, 1)
        rates.append(state.optimizers["student"].adamw.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.05] * 3)
    finish(state)
