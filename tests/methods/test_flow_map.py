"""Flow maps end at the teacher's, or the data's, exact map; they start as their teacher on every process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.data.mixture import MixtureSet
from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import VP, Flow
from fewstep.diffusion.solvers import sample
from fewstep.errors import UserError
from fewstep.methods.flow_map.flow_map import FlowMap, FlowMapConfig
from fewstep.models.conditioning import SPAN, Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.graft import Graft, Scalars
from fewstep.models.guidance import Guided
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.rng import Rng
from fewstep.training import checkpoint
from fewstep.training.method import Setup
from fewstep.training.opening import Sources
from tests import tiny
from tests.methods.gaussians import denoiser, finish
from tests.training.runs import assert_same, begin, config, everything, go, sources

TEACHER = GaussianMixture.gaussian(1.5, 0.4)
FLOW_MAP: dict[str, Any] = {"name": "flow_map"}


class AverageVelocity(nn.Module):
    """u(x, t, r) of N(mean, exp(log_std)²), exactly: at the span of the pass under way.

    (S_t² − S_r²)/(t − r) = t + r − std²·(2 − t − r), so that no division by t − r is left.
    """

    def __init__(self, scalars: Scalars) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.scalars = scalars

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        t, variance = (timestep / 1000)[:, None], (2 * self.log_std).exp()
        r = t - self.scalars.values[SPAN][:, None]
        at_t, at_r = (((1 - one) ** 2 * variance + one**2).sqrt() for one in (t, r))
        pull = (t + r - variance * (2 - t - r)) / (at_t * (at_t + at_r))
        return (-self.mean + pull * (sample - (1 - t) * self.mean),)


def two_time_gaussian() -> NetworkDenoiser:
    """A student that has a span already."""
    scalars = Scalars()
    student = denoiser(AverageVelocity(scalars))
    return replace(student, kind=Kind.VELOCITY, graft=Graft((SPAN,), scalars))


def start(student: NetworkDenoiser, teacher: bool = True) -> Sources:
    return Sources(MixtureSet(TEACHER), TEACHER.denoiser(Flow()) if teacher else None, student)


def test_the_student_of_the_tests_is_the_exact_map():
    student = two_time_gaussian()
    with torch.no_grad():
        student.network.mean.fill_(1.5)  # pyright: ignore[reportCallIssue, reportArgumentType]
        student.network.log_std.fill_(torch.tensor(0.4).log())  # pyright: ignore[reportCallIssue, reportArgumentType]
    method = begin(config(FLOW_MAP, optim={"lr": 1e-2}), start(student)).method
    assert isinstance(method, FlowMap)
    x, t, r = torch.tensor([[0.3], [-1.0]]), torch.tensor([1.0, 0.6]), torch.tensor([0.0, 0.6 - 1e-3])
    found = method.map.jump(x, t, r, Condition.none())
    torch.testing.assert_close(found, TEACHER.flow_map(x, t, r, Flow()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "teacher"),
    [
        ("lsd", True),
        ("lsd", False),
        ("esd", True),
        pytest.param("esd", False, marks=pytest.mark.slow),
        ("psd", True),
        ("psd", False),
    ],
)
def test_the_fixed_point_is_the_map_of_the_teacher_or_of_the_data(kind, teacher):
    student = two_time_gaussian()
    method = {**FLOW_MAP, "kind": kind, "teacher": teacher}
    optim = {"lr": 5e-2, "betas": [0.9, 0.99], "decay": "cosine", "clip": None}
    run = config(method, optim=optim, data={"batch_size": 256}, train={"steps": 200})
    finish(begin(run, start(student, teacher)))
    mean, log_std = (float(p.detach()) for p in student.network.parameters())
    assert mean == pytest.approx(1.5, abs=5e-3 if teacher else 0.03)
    assert log_std == pytest.approx(-0.9163, abs=5e-3 if teacher else 0.05)


@pytest.mark.parametrize("settings", [{"kind": "lsd"}, {"kind": "esd"}, {"kind": "psd", "split": "midpoint"}])
def test_the_teacher_s_own_map_costs_nothing(settings):
    student = two_time_gaussian()
    with torch.no_grad():
        student.network.mean.fill_(1.5)  # pyright: ignore[reportCallIssue, reportArgumentType]
        student.network.log_std.fill_(torch.tensor(0.4).log())  # pyright: ignore[reportCallIssue, reportArgumentType]
    state = begin(config({**FLOW_MAP, **settings, "diagonal": 0.5}), start(student))
    terms = state.method.turn(0).loss(state.next_batch(), state.rng)
    assert set(terms.losses) == {"velocity", "jump"}
    assert float(terms.total.detach()) < 1e-10


def test_each_part_weighs_as_its_rows():
    """Both means over the whole batch: with every row on the diagonal, the one term is flow matching's."""
    student = two_time_gaussian()
    state = begin(config({**FLOW_MAP, "teacher": False, "diagonal": 1.0}), start(student, False))
    batch = state.next_batch()
    terms = state.method.turn(0).loss(batch, Rng(3))
    rng = Rng(3)
    drawn, _, _ = (rng.uniform(8) for _ in range(3))
    t, noise = ((drawn - 0.1) / 0.9).where(drawn >= 0.1, torch.tensor(1.0)), rng.normal(batch.x)
    x_t = Flow().add_noise(batch.x, noise, t)
    told = Condition.none().with_scalar(SPAN, torch.zeros(8))
    wanted = (student(x_t, t, told).velocity - (noise - batch.x)).square().mean()
    assert set(terms.losses) == {"velocity"}
    torch.testing.assert_close(terms.total, wanted)
    half = begin(config({**FLOW_MAP, "teacher": False, "diagonal": 0.5}), start(two_time_gaussian(), False))
    assert float(half.method.turn(0).loss(batch, Rng(3)).losses["velocity"].detach()) < float(wanted.detach())


def vp_setup(scale: float = 1.0) -> tuple[Setup, Batch]:
    """A labelled UNet of v-prediction on a VP table, guided, with one batch of two noise-like images."""
    process = VP(torch.linspace(0.9999, 0.003, 1000, dtype=torch.float64))
    teacher = make_denoiser(tiny.alive(tiny.unet2d_classes()), Schedule(process, Kind.V))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = Batch(x, Condition.of_labels(torch.arange(4)), torch.arange(4))
    return Setup(teacher.copy(), teacher, Guided(teacher, teacher.null, scale), 4, 10, batch), batch


@pytest.mark.parametrize("kind", ["lsd", "esd", "psd"])
def test_a_vp_student_starts_as_its_teacher_and_learns_its_span(kind):
    setup, batch = vp_setup()
    method = FlowMap(FlowMapConfig(name="flow_map", kind=kind, diagonal=0.5), setup)
    method.players["student"].require_grad(True)
    assert setup.teacher is not None
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([999.0, 700.0, 300.5, 0.0])
    told = batch.condition.with_scalar(SPAN, torch.rand(4))
    assert torch.equal(method.student(x, t, told).value, setup.teacher(x, t, batch.condition).value)
    terms = method.turn(0).loss(batch, Rng(0))
    assert float(terms.losses["velocity"].detach()) == 0.0
    assert float(terms.losses["jump"].detach()) > 1e-4
    terms.total.backward()
    moving = {
        name for name, p in method.players["student"].parameters.items() if p.grad is not None and bool(p.grad.any())
    }
    assert any(f".second.{SPAN}." in name for name in moving)
    assert all(
        bool(p.grad.isfinite().all()) for p in method.players["student"].parameters.values() if p.grad is not None
    )


def test_a_guided_teacher_teaches_its_guided_velocity():
    setup, batch = vp_setup(3.0)
    method = FlowMap(FlowMapConfig(name="flow_map", diagonal=1.0), setup)
    assert float(method.turn(0).loss(batch, Rng(0)).losses["velocity"].detach()) > 1e-4


def test_students_of_one_run_serve_every_number_of_steps():
    state = begin(config(FLOW_MAP))
    sampler = state.method.sampler(state.config.method, Flow(3.0), 4)
    assert (sampler.times, sampler.kind) == ((1.0, 0.9, 0.75, 0.5), "flow_map")
    labels = Condition.of_labels(torch.arange(4))
    found = [sample(state.method.student, replace(sampler, times=sampler.times[:n]), torch.randn(4, 2), labels)
             for n in (1, 2, 4)]  # fmt: skip
    assert all(bool(one.isfinite().all()) for one in found)


@pytest.mark.parametrize("method", [{}, {"kind": "esd", "teacher": False}, {"kind": "psd", "split": "midpoint"}])
def test_a_run_that_is_stopped_and_resumed_goes_the_same_way(tmp_path, method):
    run = config({**FLOW_MAP, **method}, tmp_path)
    straight, first, second = (begin(run) for _ in range(3))
    go(straight)
    go(first, 3)
    checkpoint.save(tmp_path, first)
    checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[-1], second)
    go(second)
    assert_same(everything(straight), everything(second))


def test_distillation_needs_a_teacher():
    with pytest.raises(UserError, match=r"teacher.path: missing; .* method.teacher=false learns from data"):
        begin(config(FLOW_MAP), replace(sources(), teacher=None))


def test_a_low_rank_student_hears_its_span_and_its_teacher_does_not():
    network = sources(network_teacher=True)
    assert isinstance(network.teacher, NetworkDenoiser)
    x, t, labels = torch.randn(4, 2), torch.full((4,), 0.7), Condition.of_labels(torch.arange(4))
    before = network.teacher(x, t, labels).value
    state = begin(config(FLOW_MAP), replace(network, student=network.teacher.lora_view("student", 2)))
    go(state, 3)
    near, far = (state.method.student(x, t, labels.with_scalar(SPAN, torch.full((4,), r))).value for r in (0.1, 0.7))
    assert float((near - far).detach().abs().max()) > 1e-5
    assert torch.equal(network.teacher(x, t, labels).value, before)


def test_a_split_needs_two_halves():
    with pytest.raises(UserError, match=r"split.*it does nothing without kind=psd"):
        config({**FLOW_MAP, "split": "midpoint"})
