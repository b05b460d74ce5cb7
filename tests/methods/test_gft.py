"""Guidance-free training from data alone ends at the guided Gaussian, whose mean is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.mixture import MixtureSet
from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.losses.denoising import denoising
from fewstep.losses.guidance import guidance_free
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.families import Family
from fewstep.models.guidance_input import with_guidance
from fewstep.models.lora import Adapters
from fewstep.rng import Rng
from fewstep.training import checkpoint
from fewstep.training.opening import Sources
from tests.training.runs import assert_same, begin, config, everything, go, sources

DATA = GaussianMixture(torch.ones(1), torch.ones(1, 1), torch.full((1,), 0.7), torch.tensor([0]))
TINY = {"name": "gft", "guidance_range": [1.0, 5.0], "label_dropout": 0.25}


class Means(nn.Module):
    """x̂_0 = E[x_0 | x_t] of N(mean of the label, 0.7²), on flow matching; the null label's mean is held at −0.5.

    All data are of class 0, N(1, 0.7²). So f_∅ is known and stays, and the guided student of scale s is the Gaussian
    of mean −0.5 + 1.5·s.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.null = nn.Parameter(torch.ones(1)), nn.Buffer(torch.tensor([-0.5]))

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        t, mean = (timestep / 1000)[:, None], torch.cat([self.mean, self.null])[class_labels][:, None]
        gain = (1 - t) * 0.49 / ((1 - t) ** 2 * 0.49 + t**2)
        return (mean + gain * (sample - (1 - t) * mean),)


def start() -> Sources:
    network, null = Means(), Condition.of_labels(torch.tensor([1]))
    student = NetworkDenoiser(network, Family("n", "sample", lambda _: ""), Flow(), Kind.X0, null, Adapters(network))
    return Sources(MixtureSet(DATA), DATA.denoiser(Flow()), student)


@pytest.mark.parametrize("scale", [2.0, 4.0])
def test_the_student_ends_at_the_guided_mean(scale):
    """β = 1/s: −0.5 + 1.5·s, 2.5 at s = 2 and 5.5 at s = 4. Reading β as 1/(1 + s), or as s, is 1.5 off or more."""
    run = config(
        {"name": "gft", "guidance_range": None, "label_dropout": 0.1},
        teacher={"guidance": scale},
        data={"batch_size": 256},
        optim={"lr": 0.1, "betas": [0.9, 0.99], "decay": "cosine", "clip": None},
        train={"steps": 300},
    )
    state = begin(run, start())
    go(state)
    assert float(state.method.student.parameters()["mean"].detach()) == pytest.approx(-0.5 + 1.5 * scale, abs=0.06)


class Fixed(Rng):
    """Uniforms from a list, the same for every sample, and noise of zeros."""

    def __init__(self, *values: float) -> None:
        super().__init__(0)
        self.values = list(values)

    def uniform(self, batch: int) -> Tensor:
        return torch.full((batch,), self.values.pop(0))

    def normal(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like)


@pytest.mark.parametrize(("u", "scale"), [(0.0, 5.0), (0.25, 2.5), (1.0, 1.0)])
def test_the_temperature_is_uniform_and_its_inverse_is_what_the_network_hears(u, scale):
    """β from 1/5 to 1: a quarter of the way is 0.4, so s = 2.5. The unconditional half hears s = 1."""
    state = begin(config(TINY))
    method, batch = state.method, state.next_batch()
    loss = float(method.turn(0).loss(batch, Fixed(0.6, u, 0.9)).total.detach())  # times, β, kept
    t, x = torch.full((8,), 0.6), batch.x
    x_t, ones = 0.4 * x, torch.ones(8)
    null = Condition.of_labels(torch.full((8,), 5))
    said = method.student(x_t, t, with_guidance(batch.condition, scale * ones, method.student))
    base = method.student(x_t, t, with_guidance(null, ones, method.student))
    wanted = guidance_free(said, base, x, torch.zeros_like(x), scale * ones)
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-6)


def test_a_sample_without_its_condition_is_denoised_at_scale_one():
    state = begin(config(TINY))
    method, batch = state.method, state.next_batch()
    loss = float(method.turn(0).loss(batch, Fixed(0.6, 0.0, 0.2)).total.detach())  # the last: below the dropout's 0.25
    null = with_guidance(Condition.of_labels(torch.full((8,), 5)), torch.ones(8), method.student)
    said = method.student(0.4 * batch.x, torch.full((8,), 0.6), null)
    wanted = denoising(said, batch.x, torch.zeros_like(batch.x), Kind.VELOCITY)
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-6)


def test_it_needs_no_teacher_but_a_scale_and_a_null_condition():
    begin(config(TINY), replace(sources(), teacher=None))
    for start_ in (sources(), replace(sources(), teacher=None)):
        with pytest.raises(UserError, match=r"method.guidance_range: missing, and teacher.guidance is 1"):
            begin(config({**TINY, "guidance_range": None}), start_)
    with pytest.raises(UserError, match=r"method.guidance_range: starts at 0.5; s = 1/β starts at 1"):
        begin(config({**TINY, "guidance_range": [0.5, 2.0]}))
    with pytest.raises(UserError, match=r"teacher.guidance: 3.0 given, but method.guidance_range draws the scales"):
        begin(config(TINY, teacher={"guidance": 3.0}))
    with pytest.raises(UserError, match=r"teacher.guidance: a range is given"):
        begin(config({**TINY, "guidance_range": None}, teacher={"guidance": [2.0, 3.0]}))
    deaf = replace(sources(), student=replace(sources().student, null=None))
    with pytest.raises(UserError, match=r"student: guidance comes from a conditional network"):
        begin(config(TINY), deaf)


def test_a_share_of_the_times_is_the_noise_end():
    """Of 0.25, the upper quarter of the uniforms; the others cover the whole range."""
    method = begin(config({**TINY, "noise_end": 0.25})).method
    found = method._times(torch.tensor([0.0, 0.375, 0.749, 0.76, 0.99]))  # pyright: ignore
    assert found.tolist() == pytest.approx([0.0, 0.5, 0.749 / 0.75, 1.0, 1.0])
    assert float(found[-1]) == 1.0


def test_its_sampler_is_the_teacher_s():
    method = begin(config(TINY)).method
    sampler = method.sampler(config(TINY).method, Flow(), 4)
    assert (sampler.times, sampler.kind) == ((1.0, 0.75, 0.5, 0.25), "ddim")


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    run = config(TINY, train={"steps": 6})
    whole, half = begin(run), begin(run)
    go(whole)
    go(half, 3)
    resumed = begin(run)
    checkpoint.restore(checkpoint.save(tmp_path, half), resumed)
    go(resumed)
    assert_same(everything(resumed), everything(whole))
