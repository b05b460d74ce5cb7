"""SCFM's fixed point is a straight flow: a Gaussian's has no residual, the teacher's own curved one has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.process import VP, Flow
from fewstep.diffusion.view import View
from fewstep.errors import UserError
from fewstep.losses.trajectory import mean_velocity
from fewstep.methods.trajectory.scfm import Steps, two_steps
from fewstep.models.conditioning import Condition
from fewstep.rng import Rng
from fewstep.training import checkpoint
from tests.methods.gaussians import Gaussian, state_of
from tests.training.runs import assert_same, begin, config, everything, go

MEAN, STD = 1.5, 0.4
TEACHER = GaussianMixture.gaussian(MEAN, STD)
METHOD = {"name": "scfm", "intervals": 8, "target_decay": 0.8}


class Straight(nn.Module):
    """x̂_0 = mean + std·z of the straight flow to N(mean, std²), z = (x − (1−t)·mean)/((1−t)·std + t)."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        t = (timestep.double() / 1000)[:, None]
        return (self.mean + self.std * (sample - (1 - t) * self.mean) / ((1 - t) * self.std + t),)


def batch(rows: int = 1024) -> Batch:
    x = MEAN + STD * torch.randn(rows, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Batch(x, Condition.none(), torch.zeros(rows))


def residual(student: nn.Module, **method: object) -> float:
    state = state_of({"name": "scfm", "intervals": 64, **method}, student, TEACHER, TEACHER)
    return float(state.method.turn(0).loss(batch(), Rng(0)).total.detach())


def test_the_straight_field_has_no_residual_at_any_length():
    assert residual(Straight(MEAN, STD), teacher_share=0.0) < 1e-12
    assert residual(Straight(0.0, 1.0), teacher_share=0.0) < 1e-12, "straight it is to any Gaussian"
    assert residual(Straight(MEAN, STD), teacher_share=1.0) > 0.1, "but the teacher is not"


def test_the_teacher_s_own_field_has_one():
    """Two half steps from pure noise, by hand: v(x, 1) = x − 1.5, v(x', ½) = −1.5 + A·(x' − .75), A = .42/.29."""
    exact, x = TEACHER.denoiser(Flow()), torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    ones = torch.ones(7, dtype=torch.float64)
    target = two_steps(exact, x, Steps(ones, 0.5 * ones), Condition.none())
    middle = x - 0.5 * (x - MEAN)
    by_hand = 0.5 * (x - MEAN) + 0.5 * (-MEAN + 0.42 / 0.29 * (middle - 0.75))
    torch.testing.assert_close(target, by_hand, rtol=0, atol=1e-12)
    gap = exact(x, ones, Condition.none()).velocity - target
    assert gap[:, 0].tolist() == pytest.approx([(0.5 - 0.25 * 0.42 / 0.29) * v for v in range(-3, 4)], abs=1e-12)


def test_the_residual_of_the_teacher_s_field_in_the_method():
    """Only steps of half the way, so that it is E[(.5 − .25·.42/.29)²·z²] = .0190."""
    exact = Gaussian(1, steps=()).double()
    with torch.no_grad():
        exact.mean.fill_(MEAN)
        exact.log_std.fill_(torch.tensor(STD, dtype=torch.float64).log())
    found = residual(exact, intervals=2, teacher_share=0.0)
    assert found == pytest.approx((0.5 - 0.25 * 0.42 / 0.29) ** 2, rel=0.1)
    assert residual(exact, teacher_share=1.0) < 1e-3, "on its own finest steps there is little to learn"


def test_the_mean_velocity_weighs_by_length():
    first, second = torch.tensor([[1.0], [1.0]]), torch.tensor([[4.0], [4.0]])
    found = mean_velocity(first, second, torch.tensor([0.2, 0.1]), torch.tensor([0.1, 0.2]))
    assert found[:, 0].tolist() == pytest.approx([2.0, 3.0])


def test_the_steps_lie_on_the_grid_and_leave_room():
    """Of 8 intervals: lengths 1, 2, 4, each as often; the teacher's are the finest; every start that fits comes up."""
    method = begin(config(METHOD)).method
    u, v = torch.rand(2, 20000, generator=torch.Generator().manual_seed(0)).unbind()
    taught = torch.arange(20000) % 5 == 0
    steps = method._steps(u, v, taught)  # pyright: ignore[reportAttributeAccessIssue]
    starts, lengths = (8 * steps.t).long(), (8 * steps.gap).long()
    assert torch.equal(starts / 8, steps.t)
    assert set(lengths[taught].tolist()) == {1}
    for length in (1, 2, 4):
        chosen = (lengths == length) & ~taught
        assert float(chosen.sum() / (~taught).sum()) == pytest.approx(1 / 3, abs=0.02)
        assert set(starts[chosen].tolist()) == set(range(2 * length, 9))
    few = begin(config(METHOD, student={"steps": 4})).method
    assert set((8 * few._steps(u, v, taught).gap).long().tolist()) == {1, 2}  # pyright: ignore[reportAttributeAccessIssue]


def test_the_share_of_the_teacher(monkeypatch: pytest.MonkeyPatch):
    seen = {}

    def counted(denoiser, x, steps, condition):
        seen[id(denoiser)] = (len(x), condition.labels.tolist(), steps.gap.tolist())
        return torch.zeros_like(x)

    monkeypatch.setattr("fewstep.methods.trajectory.scfm.two_steps", counted)
    state = begin(config({**METHOD, "teacher_share": 0.25}, data={"batch_size": 4000}))
    given = state.next_batch()
    state.method.turn(0).loss(given, state.rng)
    teacher, target = (seen[id(getattr(state.method, name))] for name in ("guided", "target_flow"))
    assert teacher[0] == pytest.approx(1000, abs=100)
    assert teacher[0] + target[0] == 4000
    assert set(teacher[2]) == {0.125}
    labels = given.condition.labels
    assert labels is not None
    assert sorted(teacher[1] + target[1]) == sorted(labels.tolist())
    for share, whose in ((0.0, "target_flow"), (1.0, "guided")):
        seen.clear()
        state = begin(config({**METHOD, "teacher_share": share}))
        state.method.turn(0).loss(state.next_batch(), state.rng)
        assert list(seen) == [id(getattr(state.method, whose))]


def test_each_row_s_target_is_its_own():
    """Whoever makes it: the loss of a batch is the mean of the losses that its rows would have alone."""
    state = begin(config({**METHOD, "teacher_share": 0.5}))
    method, given = state.method, state.next_batch()
    rng = Rng(3)
    found = float(method.turn(0).loss(given, rng).total.detach())
    rng = Rng(3)
    taught = rng.rows(1_000_000, 8) < 500_000
    steps = method._steps(rng.uniform(8), rng.uniform(8), taught)  # pyright: ignore[reportAttributeAccessIssue]
    x = Flow().add_noise(given.x, rng.normal(given.x), steps.t)
    alone = []
    with torch.no_grad():
        for i in range(8):
            row = torch.tensor([i])
            one = method.guided if taught[i] else method.target_flow  # pyright: ignore[reportAttributeAccessIssue]
            target = two_steps(one, x[row], steps.rows(row), given.condition.rows(row))
            velocity = method.student(x[row], steps.t[row], given.condition.rows(row)).velocity
            alone.append(float((velocity - target).square().mean()))
    assert 0 < int(taught.sum()) < 8
    assert found == pytest.approx(sum(alone) / 8, rel=1e-4)


def test_two_averages_of_the_student():
    state = begin(config(METHOD))
    before = {name: value.detach().clone() for name, value in state.method.averages["target"].shadow.items()}
    go(state, 1)
    student = state.method.players["student"].parameters
    for name, value in state.method.averages["target"].shadow.items():
        torch.testing.assert_close(value.detach(), 0.8 * before[name] + 0.2 * student[name].detach())
    assert not any(value.requires_grad for value in state.method.averages["target"].shadow.values())
    assert set(state.method.averages) == {"target", "ema"}


def test_a_vp_network_is_straightened_on_the_flow_path():
    """Two steps of what is seen of a VP denoiser: x_VP = (α + σ)·x_F at equal ratio, velocity ε̂ − x̂_0."""
    process = VP(torch.linspace(0.9999, 1e-4, 1000, dtype=torch.float64))

    class Tanh:
        def __init__(self) -> None:
            self.process = process

        def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
            return Prediction.of_x0(process, x_t, t, x_t.tanh())

    x, t, gap = (
        torch.randn(16, 2, dtype=torch.float64),
        torch.full((16,), 0.75).double(),
        torch.full((16,), 0.25).double(),
    )
    found = two_steps(View(Tanh(), Flow()), x, Steps(t, gap), Condition.none())
    wanted, state = torch.zeros_like(x), x
    for time in (0.75, 0.5):
        index = process.time_at(torch.full((16,), time / (1 - time), dtype=torch.float64))
        total = (process.alpha(index) + process.sigma(index))[:, None]
        x0 = (total * state).tanh()
        velocity = (state - (1 - time) * x0) / time - x0
        state, wanted = state - 0.25 * velocity, wanted + velocity / 2
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("stop", [1, 4])
def test_stopped_and_resumed_is_bit_identical(tmp_path: Path, stop: int):
    run = config(METHOD, tmp_path, optim={"warmup": 3, "decay": "cosine"})
    straight, first = begin(run), begin(run)
    go(straight)
    go(first, stop)
    checkpoint.save(tmp_path, first)
    second = begin(run)
    checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[-1], second)
    go(second)
    assert_same(everything(straight), everything(second))


@pytest.mark.parametrize(
    ("intervals", "steps", "lengths"),
    [(64, 1, 6), (64, 2, 6), (64, 3, 5), (64, 4, 5), (48, 2, 5), (4, 4, 1), (2, 1, 1)],
)
def test_the_longest_step_is_the_sampler_s(intervals: int, steps: int, lengths: int):
    method = begin(config({"name": "scfm", "intervals": intervals}, student={"steps": steps})).method
    assert method.levels == lengths  # pyright: ignore[reportAttributeAccessIssue]


def test_a_grid_coarser_than_the_sampler_is_refused():
    with pytest.raises(UserError, match=r"method.intervals: 3 given, student.steps=4 needs at least as many"):
        begin(config({"name": "scfm", "intervals": 3}, student={"steps": 4}))


def test_the_sampler_is_euler_s():
    method = begin(config(METHOD)).method
    sampler = method.sampler(config(METHOD).method, Flow(), 4)
    assert (sampler.times, sampler.kind) == ((1.0, 0.75, 0.5, 0.25), "ddim")
