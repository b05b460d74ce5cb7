"""Guidance distillation starts as its teacher, ends at the guided Gaussian, and tells the network the right scale."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.mixture import MixtureSet
from fewstep.diffusion.gaussian import ExactDenoiser, GaussianMixture
from fewstep.diffusion.prediction import Kind, Prediction
from fewstep.diffusion.process import Flow, Process
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.families import Family
from fewstep.models.guidance_input import with_guidance
from fewstep.models.lora import Adapters
from fewstep.rng import Rng
from fewstep.training import checkpoint
from fewstep.training.opening import Sources
from tests.training.runs import assert_same, begin, config, everything, go, sources

CLASSES = GaussianMixture(torch.ones(2), torch.tensor([[1.0], [-0.5]]), torch.full((2,), 0.7), torch.tensor([0, 1]))
TINY = {"name": "guidance", "guidance_range": [1.0, 5.0]}


@dataclass(frozen=True)
class AwayFromClass1:
    """Class 1, N(−0.5, 0.7²), is what guidance leads away from: at scale s class 0 is N(−0.5 + 1.5·s, 0.7²)."""

    exact: ExactDenoiser
    null: Condition

    @property
    def process(self) -> Process:
        return self.exact.process

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        return self.exact(x_t, t, condition)


class Means(nn.Module):
    """x̂_0 = E[x_0 | x_t] of N(mean of the class, 0.7²): guided Gaussians of one width are in its reach."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([[1.0], [-0.5]]))

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        t, mean = (timestep / 1000)[:, None], self.mean[class_labels]
        gain = (1 - t) * 0.49 / ((1 - t) ** 2 * 0.49 + t**2)
        return (mean + gain * (sample - (1 - t) * mean),)


def start() -> Sources:
    network = Means()
    null = Condition.of_labels(torch.tensor([1]))
    student = NetworkDenoiser(network, Family("n", "sample", lambda _: ""), Flow(), Kind.X0, null, Adapters(network))
    return Sources(MixtureSet(CLASSES), AwayFromClass1(CLASSES.denoiser(Flow()), null), student)


@pytest.mark.parametrize("weight", ["output", "snr_plus_one", "truncated_snr"])
def test_a_student_of_one_scale_ends_at_the_guided_mean(weight):
    """−0.5 + s·1.5 at s = 3 is 4, and class 1 stays where it is; taking w for s would end at 5.5."""
    run = config(
        {"name": "guidance", "guidance_range": None, "weight": weight},
        teacher={"guidance": 3.0},
        data={"batch_size": 64},
        optim={"lr": 0.1, "betas": [0.9, 0.99], "decay": "cosine", "clip": None},
        train={"steps": 150},
    )
    state = begin(run, start())
    go(state)
    mean = state.method.student.parameters()["mean"].detach().flatten()
    assert mean.tolist() == pytest.approx([4.0, -0.5], abs=5e-3)
    assert float(state.method.turn(0).loss(state.next_batch(), state.rng).total.detach()) < 1e-4


def test_the_range_s_student_starts_as_the_conditional_teacher():
    begun = sources(network_teacher=True)
    method = begin(config(TINY), begun).method
    assert begun.teacher is not None
    x, t, labels = torch.randn(6, 2), torch.linspace(0, 1, 6), Condition.of_labels(torch.arange(6) % 5)
    expected = begun.teacher(x, t, labels).value
    for scale in (1.0, 5.0):
        told = with_guidance(labels, torch.full((6,), scale), method.student)
        assert float((method.student(x, t, told).value - expected).abs().max()) == 0.0


def test_the_scale_that_is_told_is_the_scale_that_is_taught():
    """Of a student that would guide its teacher by whatever it hears, the loss is zero: s is not shifted on the way."""
    state = begin(config(TINY))
    method, batch = state.method, state.next_batch()
    teacher = sources().teacher
    assert teacher is not None
    heard: list[Tensor] = []

    def perfect(x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        heard.append(condition.scalars["guidance"])
        plain = Condition.of_labels(condition.batched["class_labels"])
        null = plain.nulled(Condition.of_labels(torch.tensor([5])), len(x_t))
        c, u = (teacher(x_t, t, one).velocity for one in (plain, null))
        return Prediction(Flow(), x_t, t, u + heard[-1][:, None] * (c - u), Kind.VELOCITY)

    method.student, network = _Called(method.student, perfect), method.student  # pyright: ignore
    assert float(method.turn(0).loss(batch, state.rng).total) < 1e-10
    method.student = network
    assert float(method.turn(0).loss(batch, state.rng).total.detach()) > 1e-3
    assert (heard[0] >= 1).all()
    assert (heard[0] <= 5).all()


class _Called:
    """A student with another call."""

    def __init__(self, student: NetworkDenoiser, call: object) -> None:
        self.process, self.graft, self.call = student.process, student.graft, call

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        return self.call(x_t, t, condition)  # pyright: ignore


def test_scales_are_uniform_in_the_range():
    method = begin(config({"name": "guidance", "guidance_range": [2.0, 4.0]})).method
    scales = method._scale(Rng(0), 20_000)  # pyright: ignore[reportAttributeAccessIssue]
    assert float(scales.min()) == pytest.approx(2.0, abs=1e-3)
    assert float(scales.max()) == pytest.approx(4.0, abs=1e-3)
    assert float(scales.mean()) == pytest.approx(3.0, abs=0.02)
    assert float(scales.var()) == pytest.approx(4 / 12, abs=0.01)


def test_a_run_without_guidance_is_refused():
    with pytest.raises(UserError, match=r"teacher.guidance: 1 is off; give the scale to learn, or"):
        begin(config({**TINY, "guidance_range": None}))
    with pytest.raises(UserError, match=r"teacher.guidance: 3.0 given, but method.guidance_range draws the scales"):
        begin(config(TINY, teacher={"guidance": 3.0}))
    with pytest.raises(UserError, match=r"teacher.guidance: a range is given; as method.guidance_range"):
        begin(config({**TINY, "guidance_range": None}, teacher={"guidance": [2.0, 3.0]}))
    unconditional = replace(sources(), teacher=GaussianMixture.gaussian(torch.zeros(2), 1.0).denoiser(Flow()))
    with pytest.raises(UserError, match=r"teacher: guidance comes from a conditional teacher"):
        begin(config(TINY), unconditional)


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
    assert method.student.guidance_range == (1.0, 5.0)


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    run = config(TINY, train={"steps": 6})
    whole, half = begin(run), begin(run)
    go(whole)
    go(half, 3)
    resumed = begin(run)
    checkpoint.restore(checkpoint.save(tmp_path, half), resumed)
    go(resumed)
    assert_same(everything(resumed), everything(whole))
    assert any("first.second.guidance" in name for name in everything(whole))
