"""Reflow on pairs whose straight flow is known: a Gaussian's, at once exact, and regressions with a closed answer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.pairs import Pair, save_pairs
from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.process import EDM, VP, Flow, Process, TrigFlow, transfer
from fewstep.diffusion.solvers import Sampler, euler, sample
from fewstep.diffusion.view import View
from fewstep.errors import UserError
from fewstep.methods.trajectory.reflow import PairTimes
from fewstep.models.conditioning import Condition
from fewstep.training import checkpoint
from tests.methods.gaussians import denoiser, finish, state_of
from tests.training.runs import assert_same, begin, config, everything, go

MEAN, STD = 1.5, 0.4
TARGET = GaussianMixture.gaussian(MEAN, STD)
TABLE = torch.linspace(0.9999, 1e-4, 1000, dtype=torch.float64)


class Straight(nn.Module):
    """x̂_0 = mean + std·z of the straight flow to N(mean, std²), z = (x − (1−t)·mean)/((1−t)·std + t)."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        t = (timestep.double() / 1000)[:, None]
        return (self.mean + self.std * (sample - (1 - t) * self.mean) / ((1 - t) * self.std + t),)


class Affine(nn.Module):
    """x̂_0 = slope·x + shift, the student of one step."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.slope * sample + self.shift,)


def write(folder: Path, noise: Tensor, x0: Tensor, labels: Tensor | None = None) -> str:
    """A file of pairs."""
    condition = Condition.none() if labels is None else Condition.of_labels(labels)
    save_pairs(folder / "pairs.safetensors", Pair(noise, x0, condition))
    return str(folder / "pairs.safetensors")


def unit_noise(rows: int = 4096, dim: int = 1) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_straight_field_of_a_gaussian_has_no_residual(tmp_path: Path):
    """v = (1 − s)·z − μ; a field of another spread has one, and one of the wrong sign a large one."""
    z = unit_noise()
    method = {"name": "reflow", "pairs": write(tmp_path, z, MEAN + STD * z)}
    residuals = {}
    for std in (STD, 0.5, -STD):
        state = state_of(method, Straight(MEAN, std), TARGET, TARGET)
        residuals[std] = float(state.method.turn(0).loss(state.next_batch(), state.rng).total.detach())
    assert residuals[STD] < 1e-12
    assert residuals[0.5] > 1e-3
    assert residuals[-STD] > 0.5


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_every_number_of_steps_along_it_is_exact(steps: int):
    z = unit_noise(64)
    with torch.no_grad():
        made = sample(denoiser(Straight(MEAN, STD)), Sampler.of(Flow(), steps, "ddim"), z, Condition.none())
    torch.testing.assert_close(made, MEAN + STD * z, rtol=0, atol=1e-12)
    torch.testing.assert_close(made, TARGET.flow_map(z, torch.ones(64), torch.zeros(64), Flow()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("times", ["uniform", "u_shaped"])
def test_training_ends_at_the_pairs_own_map(tmp_path: Path, times: str):
    z = unit_noise()
    method = {"name": "reflow", "pairs": write(tmp_path, z, MEAN + STD * z), "times": times}
    student = Straight(0.0, 1.0)
    optim = {"lr": 0.05, "betas": [0.9, 0.99], "decay": "cosine", "clip": None}
    finish(state_of(method, student, TARGET, TARGET, optim=optim, train={"steps": 300}))
    assert float(student.mean.detach()) == pytest.approx(MEAN, abs=1e-3)
    assert float(student.std.detach()) == pytest.approx(STD, abs=1e-3)


def test_at_the_noise_end_alone_it_is_the_regression_of_samples_on_noise(tmp_path: Path):
    """InstaFlow's distillation: for an affine student the least squares of the stored set, by hand."""
    z = unit_noise(64)
    x0 = z.sign() + 0.3 * z + 0.5
    method = {"name": "reflow", "pairs": write(tmp_path, z, x0), "one_step_share": 1.0}
    student = Affine()
    optim = {"lr": 0.05, "betas": [0.9, 0.99], "decay": "cosine", "clip": None}
    state = state_of(method, student, TARGET, TARGET, optim=optim, data={"batch_size": 1024}, train={"steps": 400})
    finish(state)
    slope = ((z - z.mean()) * (x0 - x0.mean())).sum() / (z - z.mean()).square().sum()
    assert float(student.slope.detach()) == pytest.approx(float(slope), abs=0.01)
    assert float(student.shift.detach()) == pytest.approx(float(x0.mean() - slope * z.mean()), abs=0.01)


def test_the_condition_of_a_pair_is_the_one_its_velocity_is_asked_for(tmp_path: Path):
    """Each class has a sample of its own, which the student only finds by the class that it is told."""

    class ByClass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = nn.Parameter(torch.zeros(2))

        def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False):
            return (class_labels[:, None].double() + self.offset,)

    labels = torch.arange(500) % 5
    z = unit_noise(500, 2)
    pairs = write(tmp_path, z, labels[:, None].double().expand(-1, 2), labels)
    data = GaussianMixture(torch.ones(5), torch.zeros(5, 2), torch.ones(5), torch.arange(5))
    student = ByClass()
    state = state_of({"name": "reflow", "pairs": pairs, "one_step_share": 1.0}, student, data, data)
    turn = state.method.turn(0)
    assert float(turn.loss(state.next_batch(), state.rng).total.detach()) < 1e-12


@pytest.mark.parametrize("process", [VP(TABLE), TrigFlow(), TrigFlow(0.5), EDM(0.002, 500.0)], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_ddim_step_is_euler_s_on_the_straight_path(process: Process, steps: int):
    """For any denoiser of any process: jump there = Euler on flow matching of what is seen through the view."""

    class Bent:
        def __init__(self) -> None:
            self.process = process

        def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
            ratio = process.ratio(t)[:, None]
            return Prediction.of_x0(process, x_t, t, torch.tanh(x_t / process.sigma(t)[:, None] + ratio.log1p()))

    sampler, z, bent = Sampler.of(process, steps, "ddim"), unit_noise(32), Bent()
    if isinstance(process, TrigFlow):
        sampler = replace(sampler, times=(1.5, *sampler.times[1:]))  # pure noise has no finite ratio for this denoiser
    made, flow = sample(bent, sampler, z, Condition.none()), View(bent, Flow())
    state = transfer(process.prior(z, sampler.times[0]), process.times(sampler.times[0], z), process, Flow())
    x = state.x
    for time in (*sampler.times[1:], None):
        t = state.t
        s = (
            torch.zeros(32, dtype=torch.float64)
            if time is None
            else Flow().time_at(process.ratio(process.times(time, z)))
        )
        x, state = euler(flow(x, t, Condition.none()), s), replace(state, t=s)
    torch.testing.assert_close(x, made, rtol=0, atol=1e-9)


def test_a_network_of_another_process_learns_the_same_flow(tmp_path: Path):
    """The straight flow written for VP states, x_VP = x_F·(α + σ), has no residual either."""
    process = VP(TABLE)

    class StraightVP(Straight):
        def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
            time = timestep.double()
            alpha, sigma = process.alpha(time), process.sigma(time)
            total = (alpha + sigma)[:, None]
            return super().forward(sample / total, 1000 * sigma / (alpha + sigma))

    z = unit_noise()
    method = {"name": "reflow", "pairs": write(tmp_path, z, MEAN + STD * z)}
    state = state_of(method, StraightVP(MEAN, STD), TARGET, TARGET)
    student = replace(denoiser(StraightVP(MEAN, STD)), process=process)
    state.method.flow = View(student, Flow())  # pyright: ignore[reportAttributeAccessIssue]
    low = float(Flow().time_at(process.ratio(torch.zeros(1, dtype=torch.float64))))
    high = float(Flow().time_at(process.ratio(torch.full((1,), 999.0, dtype=torch.float64))))
    state.method.times = lambda u: low + (high - low) * u.double()  # pyright: ignore[reportAttributeAccessIssue]
    assert float(state.method.turn(0).loss(state.next_batch(), state.rng).total.detach()) < 1e-12


def test_the_u_shaped_law():
    """Its density is (e^(at) + e^(a(1−t)))·a/(2·(e^a − 1)), so its distribution function rises as u does."""
    a, u = 4.0, torch.linspace(0, 1, 101, dtype=torch.float64)
    t = PairTimes(0.0, bend=a)(u)
    distribution = (torch.exp(a * t) - torch.exp(a * (1 - t)) + math.exp(a) - 1) / (2 * (math.exp(a) - 1))
    torch.testing.assert_close(distribution, 1 - u, rtol=0, atol=1e-12)
    torch.testing.assert_close(PairTimes(0.1)(u), 1 - 0.9 * u, rtol=0, atol=1e-12)
    assert float(PairTimes(0.0, bend=1e-3)(u).add(u).sub(1).abs().max()) < 1e-6, "its limit is uniform"


def test_a_share_of_the_times_is_the_noise_end():
    u = torch.arange(1000, dtype=torch.float64) / 1000
    t = PairTimes(0.02, one_step_share=0.25)(u)
    assert (t[:251] == 1).all()
    torch.testing.assert_close(t[251:], 0.02 + 0.98 * (1 - u[251:]) / 0.75, rtol=0, atol=1e-12)
    assert (PairTimes(0.0, one_step_share=1.0)(u) == 1).all()


def test_pairs_are_needed_and_must_fit(tmp_path: Path):
    with pytest.raises(UserError, match=r"method.pairs: missing; method.name=reflow needs the file"):
        begin(config({"name": "reflow"}))
    with pytest.raises(UserError, match=r"method.pairs: .*none.safetensors cannot be read as pairs"):
        begin(config({"name": "reflow", "pairs": str(tmp_path / "none.safetensors")}))
    unlabelled = write(tmp_path, torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(UserError, match=r"method.pairs: the data has class labels, .*pairs.safetensors has none"):
        begin(config({"name": "reflow", "pairs": unlabelled}))


@pytest.mark.parametrize("stop", [1, 4])
def test_stopped_and_resumed_is_bit_identical(tmp_path: Path, stop: int):
    generator = torch.Generator().manual_seed(0)
    noise, x0 = torch.randn(2, 50, 2, generator=generator).unbind()
    pairs = write(tmp_path, noise, x0, torch.arange(50) % 5)
    run = config({"name": "reflow", "pairs": pairs, "times": "u_shaped", "one_step_share": 0.3}, tmp_path / "run")
    straight, first = begin(run), begin(run)
    go(straight)
    go(first, stop)
    checkpoint.save(tmp_path / "saved", first)
    second = begin(run)
    checkpoint.restore(checkpoint.list_checkpoints(tmp_path / "saved")[-1], second)
    go(second)
    assert_same(everything(straight), everything(second))
