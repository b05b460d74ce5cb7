"""Continuous-time consistency on a Gaussian, whose consistency function is closed, and on networks of both kinds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from fewstep.data.samples import Samples
from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import schedule_of
from fewstep.training import checkpoint
from fewstep.training.loop import TrainState
from fewstep.training.opening import Sources
from tests.methods.gaussians import finish, state_of
from tests.tiny import alive, unet2d_classes
from tests.training.runs import assert_same, begin, config, everything, go, sources

TEACHER = GaussianMixture.gaussian(1.5, 0.4)


class ExactMap(nn.Module):
    """x̂_0 = mean + std/√(α²std² + σ²)·(x − α·mean) on flow matching: the consistency function of N(mean, std²)."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std).log())

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        t, std = (timestep / 1000)[:, None], self.log_std.exp()
        scale = std / (((1 - t) * std).square() + t.square()).sqrt()
        return (self.mean + scale * (sample - (1 - t) * self.mean),)


def gaussian_state(student: nn.Module, steps: int = 1, **method: Any) -> TrainState:
    optim = {"lr": 3e-2, "betas": [0.9, 0.99], "decay": "cosine", "clip": None}
    return state_of({"name": "scm", **method}, student, TEACHER, TEACHER, optim=optim, train={"steps": steps})


@pytest.mark.parametrize("derivative", ["jvp", "central_difference"])
@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_the_exact_consistency_function_stays(sigma_data, derivative):
    student = ExactMap(1.5, 0.4)
    state = gaussian_state(student, sigma_data=sigma_data, derivative=derivative, warmup=0.0)
    (report,) = go(state)
    assert float(report.terms.figures["tangent"]) < (1e-5 if derivative == "jvp" else 1e-3)
    assert float(report.gradient_norms["student"]) < 1e-2
    shifted = gaussian_state(ExactMap(1.4, 0.4), sigma_data=sigma_data, derivative=derivative, warmup=0.0)
    assert float(go(shifted)[0].terms.figures["tangent"]) > 1e-2


@pytest.mark.parametrize(
    ("method", "off"),
    [
        ({}, 0.01),
        pytest.param({"sigma_data": 1.0, "weight": "none"}, 0.01, marks=pytest.mark.slow),
        ({"derivative": "central_difference"}, 0.01),
        ({"teacher": False, "c": 100.0, "time_mean": -0.8, "time_std": 1.6}, 0.05),
    ],
    ids=["jvp", "plain", "difference", "data"],
)
def test_the_student_ends_at_the_exact_map(method, off):
    student = ExactMap(0.0, 1.0)
    finish(gaussian_state(student, 250, **method))
    assert float(student.mean.detach()) == pytest.approx(1.5, abs=off)
    assert float(student.log_std.detach().exp()) == pytest.approx(0.4, abs=off)


def test_the_warm_up_of_the_tangent():
    method = gaussian_state(ExactMap(0.0, 1.0), 40, warmup=0.25).method

    def ramp(step: int) -> float:
        turn = method.turn(step)
        assert isinstance(turn.loss, partial)
        assert turn.trains == ("student", "weight")
        return turn.loss.keywords["ramp"]

    assert [ramp(step) for step in (0, 4, 9, 10, 39)] == [0.0, 0.4, 0.9, 1.0, 1.0]
    at_once = gaussian_state(ExactMap(0.0, 1.0), 40, warmup=0.0).method.turn(0).loss
    assert isinstance(at_once, partial)
    assert at_once.keywords["ramp"] == 1.0


def test_both_derivatives_lead_to_one_loss():
    found = {}
    for how in ("jvp", "central_difference"):
        state = begin(config({"name": "scm", "derivative": how, "warmup": 0.0}))
        found[how] = go(state, 1)[0]
    one, other = (float(report.terms.figures["tangent"]) for report in found.values())
    assert one == pytest.approx(other, rel=1e-3)
    one, other = (float(report.gradient_norms["student"]) for report in found.values())
    assert one == pytest.approx(other, rel=1e-3)


def test_a_step_takes_one_teacher_call_and_two_of_the_student():
    state = begin(config({"name": "scm"}), sources(network_teacher=True))
    calls = {"student": 0, "teacher": 0}

    def count(name: str, network: nn.Module) -> None:
        def hook(*_: object) -> None:
            calls[name] += 1

        network.register_forward_pre_hook(hook)

    count("student", state.method.student.network)
    count("teacher", state.method.guided.denoiser.network)  # pyright: ignore[reportAttributeAccessIssue]
    go(state, 3)
    assert calls == {"student": 6, "teacher": 3}


@pytest.mark.parametrize("teacher", [True, False])
def test_stopped_and_resumed_is_bit_identical(tmp_path, teacher):
    run = config({"name": "scm", "teacher": teacher}, tmp_path, optim={"warmup": 3, "decay": "cosine"})
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
    "method", [{}, {"teacher": False}, {"derivative": "central_difference", "step": 0.1}], ids=["jvp", "data", "cd"]
)
def test_a_vp_network_of_images_trains(method):
    """It has attention and group norm; its guided teacher is seen on TrigFlow. Twice the same, bit by bit."""

    def run() -> tuple[dict[str, Tensor], list[float]]:
        schedule = schedule_of({**DDIMScheduler(prediction_type="v_prediction").config, "_class_name": "DDIMScheduler"})
        teacher = make_denoiser(alive(unet2d_classes(8, 5, 1)), schedule)
        start = Sources(Images(), teacher, teacher.copy())
        sections: dict[str, Any] = {"teacher": {"path": "given", "guidance": 2.0}}
        state = begin(config({"name": "scm", **method}, **sections, data={"batch_size": 4}), start)
        reports = go(state, 3)
        return everything(state), [float(report.terms.total) for report in reports]

    (one, losses), (other, _) = run(), run()
    assert_same(one, other)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert all(bool(value.isfinite().all()) for value in one.values() if value.is_floating_point())


def test_distillation_needs_a_teacher():
    start = Sources(sources().dataset, None, sources().student)
    with pytest.raises(UserError, match=r"teacher.path: missing; distillation needs a teacher, method.teacher=false"):
        begin(config({"name": "scm"}), start)
    go(begin(config({"name": "scm", "teacher": False}), start), 1)


def test_the_sampler_renoises():
    method = begin(config({"name": "scm"})).method
    sampler = method.sampler(config({"name": "scm"}).method, Flow(), 2)
    assert (sampler.times, sampler.kind) == ((1.0, 0.5), "renoise")
