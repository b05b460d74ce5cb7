"""MeanFlow on a Gaussian, whose average velocity is closed, and on networks of both kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from fewstep.data.samples import Samples
from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.losses.denoising import denoising
from fewstep.methods.flow_map import meanflow
from fewstep.methods.flow_map.meanflow import LATEST, MeanFlow
from fewstep.models.conditioning import SPAN, Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.graft import Graft, Scalars
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import schedule_of
from fewstep.models.two_time import two_time
from fewstep.rng import Rng
from fewstep.training import checkpoint
from fewstep.training.loop import TrainState
from fewstep.training.opening import Sources
from tests.methods.gaussians import denoiser, finish, state_of
from tests.tiny import alive, unet2d_classes
from tests.training.runs import assert_same, begin, config, everything, go, sources

TEACHER = GaussianMixture.gaussian(1.5, 0.4)
STEPPED = {"derivative": "central_difference"}


class AverageVelocity(nn.Module):
    """(x − X_{t→r}(x))/(t − r) of N(mean, std²), and its limit at r = t; said as x̂_0, which is x − t·u."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std).log())
        self.heard: Scalars | None = None

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        assert self.heard is not None
        t = (timestep / 1000)[:, None]
        return (sample - t * self.velocity(sample, t, t - self.heard.values[SPAN][:, None]),)

    def velocity(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """−mean + (S_t² − S_r²)/((t − r)·(S_t + S_r)·S_t)·(x − (1 − t)·mean), where t − r cancels."""
        s2 = (2 * self.log_std).exp()
        here, there = (((1 - at).square() * s2 + at.square()).sqrt() for at in (t, r))
        slope = ((t + r) - (2 - t - r) * s2) / ((here + there) * here)
        return -self.mean + slope * (x - (1 - t) * self.mean)


def gaussian_state(mean: float, std: float, steps: int = 1, **method: Any) -> TrainState:
    student = AverageVelocity(mean, std)
    optim = {"lr": 3e-2, "betas": [0.0, 0.99], "decay": "cosine", "clip": None}
    values = {"name": "meanflow", **method}
    return state_of(values, student, TEACHER, TEACHER, optim=optim, train={"steps": steps})


@pytest.fixture(autouse=True)
def spans_reach_the_closed_form(monkeypatch):
    """A closed form has no time embedding to add an input to: it reads the graft's value itself."""

    def given(student: NetworkDenoiser) -> NetworkDenoiser:
        if not isinstance(student.network, AverageVelocity):
            return two_time(student)
        graft = Graft((SPAN,))
        student.network.heard = graft.scalars
        return replace(student, graft=graft)

    monkeypatch.setattr(meanflow, "two_time", given)


@pytest.mark.parametrize("method", [{}, STEPPED], ids=["jvp", "difference"])
def test_the_exact_average_velocity_stays(method):
    (report,) = go(gaussian_state(1.5, 0.4, **method))
    assert float(report.terms.total) < 1e-5
    assert float(report.gradient_norms["student"]) < 2e-3
    (other,) = go(gaussian_state(1.4, 0.4, **method))
    assert float(other.terms.total) > 1e-3


@pytest.mark.parametrize(
    ("method", "off"),
    [
        ({}, 0.01),
        ({**STEPPED, "power": 0.0, "diagonal": 0.0, "damping": 0.0}, 0.01),
        ({"teacher": False, "power": 0.0}, 0.05),
    ],
    ids=["jvp", "jumps", "data"],
)
def test_the_student_ends_at_the_exact_map(method, off):
    state = gaussian_state(0.0, 1.0, 250, **method)
    finish(state)
    student = state.method.student.network
    assert isinstance(student, AverageVelocity)
    assert float(student.mean.detach()) == pytest.approx(1.5, abs=off)
    assert float(student.log_std.detach().exp()) == pytest.approx(0.4, abs=off)


def test_on_the_diagonal_it_is_flow_matching():
    state = begin(config({"name": "meanflow", "teacher": False, "diagonal": 1.0, "power": 0.0}))
    method, batch = state.method, state.next_batch()
    assert isinstance(method, MeanFlow)
    terms = method.loss(batch, Rng(5))
    rng = Rng(5)
    noise, t = rng.normal(batch.x), method.law.law(rng.uniform(8))
    told = batch.condition.with_scalar(SPAN, torch.zeros(8))
    prediction = method.student(Flow().add_noise(batch.x, noise, t), t, told)
    expected = denoising(prediction, batch.x, noise, method.student.kind)
    torch.testing.assert_close(terms.total, expected)


def test_times_stop_short_of_the_noise_end():
    method = begin(config({"name": "meanflow", "noise_end": 0.2, "diagonal": 0.0})).method
    assert isinstance(method, MeanFlow)
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    pair = method.law.pairs(u, u.flip(0))
    assert float((pair.t == LATEST).float().mean()) == pytest.approx(1 - 0.8**2, abs=0.02), "the noisier of two"
    assert bool((pair.t >= pair.s).all())


def test_guidance_from_data_mixes_three_velocities():
    """v_g = ω·(ε − x_0) + (1 − ω − κ)·u(∅) + κ·u(c), with both velocities the student's own at r = t."""
    state = begin(config({"name": "meanflow", "teacher": False, "omega": 2.0, "kappa": 0.5, "label_dropout": 0.0}))
    method, batch = state.method, state.next_batch()
    assert isinstance(method, MeanFlow)
    with torch.no_grad():
        slope, t = torch.randn_like(batch.x), torch.full((8,), 0.6)
        null = Condition.of_labels(torch.full((8,), 5))
        wanted = 2.0 * slope - 1.5 * method.map.velocity(batch.x, t, t, null)
        wanted += 0.5 * method.map.velocity(batch.x, t, t, batch.condition)
        torch.testing.assert_close(method._velocity(batch.x, t, slope, batch.condition, state.rng), wanted)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"omega": 2.0}, r"method.omega, method.kappa: 2 and 0 given; it needs method.teacher=false"),
        ({"omega": 2.0, "teacher": False}, r"the student takes no condition"),
    ],
)
def test_guidance_in_training_is_for_conditional_data(method, message):
    start = sources()
    if "teacher" in method:
        start = Sources(start.dataset, None, denoiser(AverageVelocity(0.0, 1.0)))
    with pytest.raises(UserError, match=message):
        begin(config({"name": "meanflow", **method}), start)


def test_distillation_needs_a_teacher():
    start = Sources(sources().dataset, None, sources().student)
    with pytest.raises(UserError, match=r"teacher.path: missing; distillation needs one, method.teacher=false"):
        begin(config({"name": "meanflow"}), start)
    go(begin(config({"name": "meanflow", "teacher": False}), start), 1)


def test_both_derivatives_lead_to_one_loss():
    found = []
    for how in ("jvp", "central_difference"):
        state = begin(config({"name": "meanflow", "derivative": how}))
        found.append(go(state, 1)[0])
    one, other = (float(report.terms.total) for report in found)
    assert one == pytest.approx(other, rel=1e-3)
    one, other = (float(report.gradient_norms["student"]) for report in found)
    assert one == pytest.approx(other, rel=1e-2)


@pytest.mark.parametrize("method", [{}, {"teacher": False, "omega": 1.5, "kappa": 0.2}], ids=["teacher", "data"])
def test_stopped_and_resumed_is_bit_identical(tmp_path, method):
    run = config({"name": "meanflow", **method}, tmp_path, optim={"warmup": 3, "decay": "cosine"})
    straight, first = begin(run), begin(run)
    go(straight)
    go(first, 3)
    checkpoint.save(tmp_path, first)
    second = begin(run)
    checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[-1], second)
    go(second)
    assert_same(everything(straight), everything(second))


class Images:
    """The plane's five modes, repeated into pictures."""

    shape, length = (1, 8, 8), None

    def __init__(self) -> None:
        self.mixture = sources().dataset
        self.classes = self.mixture.classes

    def batch(self, indices: Sequence[int]) -> Samples:
        vectors = self.mixture.batch(indices)
        return Samples(vectors.images.repeat(1, 32).reshape(-1, 1, 8, 8), vectors.labels)


@pytest.mark.parametrize(
    "method",
    [{}, {"teacher": False, "omega": 1.5, "kappa": 0.2}, {**STEPPED, "step": 0.1}],
    ids=["jvp", "data", "difference"],
)
def test_a_vp_network_of_images_trains(method):
    """It has attention and group norm, and is seen on flow matching. Twice the same, bit by bit."""
    guidance = {} if "teacher" in method else {"guidance": 2.0}

    def run() -> tuple[dict[str, Tensor], list[float]]:
        schedule = schedule_of({**DDIMScheduler(prediction_type="v_prediction").config, "_class_name": "DDIMScheduler"})
        teacher = make_denoiser(alive(unet2d_classes(8, 5, 1)), schedule)
        start = Sources(Images(), teacher, teacher.copy())
        sections: dict[str, Any] = {"teacher": {"path": "given", **guidance}, "data": {"batch_size": 4}}
        state = begin(config({"name": "meanflow", **method}, **sections), start)
        reports = go(state, 3)
        return everything(state), [float(report.terms.total) for report in reports]

    (one, losses), (other, _) = run(), run()
    assert_same(one, other)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert all(bool(value.isfinite().all()) for value in one.values() if value.is_floating_point())


def test_the_sampler_jumps():
    method = begin(config({"name": "meanflow"})).method
    sampler = method.sampler(config({"name": "meanflow"}).method, Flow(), 2)
    assert (sampler.times, sampler.kind) == ((1.0, 0.5), "flow_map")
