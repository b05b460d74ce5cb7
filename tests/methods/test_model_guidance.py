"""Model guidance from data alone: its fixed point is the guided prediction at s = 1/(1 − w)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.mixture import MixtureSet
from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.prediction import Kind, Prediction
from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.losses.denoising import denoising
from fewstep.losses.guidance import model_guidance
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.families import Family
from fewstep.models.lora import Adapters
from fewstep.rng import Rng
from fewstep.training import checkpoint
from fewstep.training.opening import Sources
from tests.training.runs import assert_same, begin, config, everything, go, sources, weights

DATA = GaussianMixture(torch.ones(1), torch.ones(1, 1), torch.full((1,), 0.7), torch.tensor([0]))
TINY = {"name": "model_guidance", "scale": 2.0, "label_dropout": 0.25, "target_decay": 0.5}


class Means(nn.Module):
    """x̂_0 = E[x_0 | x_t] of N(mean of the label, 0.7²), on flow matching; the null label's mean is held at −0.5.

    All data are of class 0, N(1, 0.7²), so the guided student of scale s is the Gaussian of mean −0.5 + 1.5·s.
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


@pytest.mark.parametrize(("target", "scale"), [("self", 2.0), ("self", 4.0), ("ema", 2.0), ("ema", 4.0)])
def test_the_student_ends_at_the_guided_mean(target, scale):
    """−0.5 + 1.5·s: w = 1/2 is s = 2, w = 3/4 is s = 4. Adding w to s instead (s = 1 + w) would end at 1.75 or 2.1."""
    method = {"name": "model_guidance", "scale": scale, "target": target}
    run = config(
        {**method, "target_decay": 0.8} if target == "ema" else method,
        data={"batch_size": 256},
        optim={"lr": 0.1, "betas": [0.9, 0.99], "decay": "cosine", "clip": None},
        train={"steps": 400},
    )
    state = begin(run, start())
    go(state)
    assert float(state.method.student.parameters()["mean"].detach()) == pytest.approx(-0.5 + 1.5 * scale, abs=0.06)


class Share(Rng):
    """Whether samples lose their condition is told; the rest is drawn."""

    def __init__(self, u: float) -> None:
        super().__init__(0)
        self.u, self.count = u, 0

    def uniform(self, batch: int) -> Tensor:
        self.count += 1
        return super().uniform(batch) if self.count == 1 else torch.full((batch,), self.u)


@pytest.mark.parametrize("target", ["self", "ema"])
def test_without_its_condition_a_sample_is_denoised(target):
    method = {**TINY, "target": target}
    if target == "self":
        del method["target_decay"]
    state = begin(config(method))
    batch, rng = state.next_batch(), Rng(0)
    terms = state.method.turn(0).loss(batch, Share(0.2))  # below the dropout's 0.25
    t, noise = rng.uniform(8), rng.normal(batch.x)
    x_t = Flow().add_noise(batch.x, noise, t)
    said = state.method.student(x_t, t, Condition.of_labels(torch.full((8,), 5)))
    wanted = denoising(said, batch.x, noise, Kind.VELOCITY)
    assert float(terms.figures["difference"]) < 1e-6
    assert float(terms.total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_both_targets_agree_where_the_average_has_not_moved():
    """One forward pass for both halves, or the loss's own for one of them: the same numbers."""
    found = []
    for target in ("self", "ema"):
        method = {**TINY, "target": target}
        if target == "self":
            del method["target_decay"]
        state = begin(config(method))
        terms = state.method.turn(0).loss(state.next_batch(), Share(0.9))
        found.append((float(terms.total.detach()), float(terms.figures["difference"])))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][1] > 1e-3


def test_a_half_precision_prediction_keeps_its_gradient():
    """The difference is computed without gradient from the very prediction that is trained."""
    method = begin(config({"name": "model_guidance", "scale": 2.0, "target": "self"})).method
    x, value = torch.randn(4, 2), torch.randn(4, 2, dtype=torch.bfloat16, requires_grad=True)
    said = Prediction(Flow(), x, torch.full((4,), 0.5), value, Kind.VELOCITY)
    difference = method._difference(said, Condition.of_labels(torch.arange(4)))  # pyright: ignore
    model_guidance(said, difference, x, x, 2.0).backward()
    assert value.grad is not None
    assert float(value.grad.abs().max()) > 1e-2


def test_the_target_follows_with_its_own_decay():
    state = begin(config(TINY))
    before = {name: value.detach().clone() for name, value in state.method.averages["target"].shadow.items()}
    go(state, 1)
    for name, value in state.method.averages["target"].shadow.items():
        torch.testing.assert_close(value.detach(), 0.5 * before[name] + 0.5 * weights(state)[f"student/{name}"])
    assert not any(value.requires_grad for value in state.method.averages["target"].shadow.values())


def test_the_scale_is_the_method_s_or_the_run_s():
    begin(config(TINY), replace(sources(), teacher=None))
    alone = {key: value for key, value in TINY.items() if key != "scale"}
    assert begin(config(alone, teacher={"guidance": 3.0})).method.scale == 3.0  # pyright: ignore
    for text, method, guidance in (
        ("method.scale: missing, and teacher.guidance is 1; give one of them, above 1", alone, 1.0),
        ("method.scale: 2 given, but teacher.guidance is 3; leave one out", TINY, 3.0),
        (r"method.scale: .*greater than 1; found 1.0|method.scale", {**TINY, "scale": 1.0}, 1.0),
    ):
        with pytest.raises(UserError, match=text):
            begin(config(method, teacher={"guidance": guidance}))
    with pytest.raises(UserError, match=r"teacher.guidance: a range is given, but a student of model guidance"):
        begin(config(alone, teacher={"guidance": [2.0, 3.0]}))
    with pytest.raises(UserError, match=r"student: guidance comes from a conditional network"):
        begin(config(TINY), replace(sources(), student=replace(sources().student, null=None)))


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
    assert any(name.startswith("average target/") for name in everything(whole))
