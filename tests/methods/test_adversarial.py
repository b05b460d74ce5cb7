"""ADD and LADD on Gaussians, where the gradient's sign and the anchor's fixed point are known."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.data.batch import Batch
from fewstep.data.pairs import Pair, save_pairs
from fewstep.diffusion.gaussian import GaussianMixture, five_modes
from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.rng import Rng
from fewstep.training import checkpoint
from tests.methods.gaussians import Gaussian, finish, state_of
from tests.training.runs import assert_same, begin, config, everything, go, moved, sources, weights

METHOD = {"name": "adversarial", "adversarial_loss": "relativistic", "r1_weight": 0.1, "r2_weight": 0.1}
ANCHOR = {"name": "adversarial", "adversarial_weight": 0.0, "distillation_weight": 2.5}
LN2 = math.log(2)


def test_the_teacher_s_denoising_pulls_to_its_own_mean_and_stops_there():
    """With λ alone, x̂ = a + b·z and c(t)·‖x̂ − sg x̂_0(x̂_t)‖², the direction is c·(1 − kα)(x̂ − m): a → m, b → 0.

    The collapse of b is why the anchor is never used without an adversary (ADD, table 1d).
    """
    student, teacher = Gaussian(1), GaussianMixture.gaussian(1.5, 0.4)
    optim = {"lr": 3e-2, "betas": [0.9, 0.99], "decay": "cosine", "clip": None}
    state = state_of(ANCHOR, student, teacher, teacher, optim=optim, train={"steps": 400})
    finish(state)
    assert float(student.mean.detach()) == pytest.approx(1.5, abs=0.02)
    assert float(student.log_std.detach().exp()) < 0.2, "half the width of the teacher, and still falling"


def test_the_anchor_s_value_and_gradient():
    """At x̂ = a: E_t[c(t)·((1 − kα)(a − m))² + c(t)·(kσ)²], k = αs²/(α²s² + σ²), and d/da counts x̂ alone."""
    student, mean, std = Gaussian(1), 1.5, 0.4
    with torch.no_grad():
        student.mean.fill_(0.3)
        student.log_std.fill_(-20.0)
    teacher = GaussianMixture.gaussian(mean, std)
    method = state_of(ANCHOR, student, teacher, teacher).method
    batch = Batch(torch.zeros(400_000, 1), Condition.none(), torch.arange(400_000))
    terms = method.student_loss(batch, Rng(0))  # pyright: ignore[reportAttributeAccessIssue]
    t = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    alpha, k = 1 - t, (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
    expected = (alpha * (((1 - k * alpha) * (0.3 - mean)) ** 2 + (k * t) ** 2)).mean()
    assert terms.losses["distillation"].tolist() == pytest.approx(2.5 * float(expected), rel=0.01)
    terms.total.backward()
    assert student.mean.grad is not None
    slope = 2.5 * 2 * float((alpha * (1 - k * alpha)).mean()) * (0.3 - mean)
    assert float(student.mean.grad) == pytest.approx(slope, rel=0.01)


@pytest.mark.parametrize("backbone", ["frozen", "trained"])
def test_turns_players_and_whom_each_moves(backbone):
    state = begin(config({**METHOD, "backbone": backbone, "discriminator_updates": 2}))
    judges = {"discriminator"} | ({"backbone"} if backbone == "trained" else set())
    assert set(state.method.players) == {"student"} | judges
    for expected in (judges, judges, {"student"}):
        before = weights(state)
        (report,) = go(state, 1)
        assert moved(before, weights(state)) == expected
    assert set(report.terms.losses) == {"adversarial"}
    frozen = state.method.judge.backbone.network  # pyright: ignore[reportAttributeAccessIssue]
    if backbone == "frozen":
        assert not any(p.requires_grad for p in frozen.parameters())


def test_the_frozen_backbone_is_the_teacher_s_network_and_a_trained_one_its_copy():
    start = sources(network_teacher=True)
    networks = [
        begin(config({**METHOD, "backbone": kind}), start).method.judge.backbone.network  # pyright: ignore
        for kind in ("frozen", "trained")
    ]
    assert networks[0] is start.teacher.network  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    assert networks[1] is not networks[0]
    assert networks[1] is not start.student.network


def test_indifferent_heads_pay_the_chance_level():
    state = begin(config({**METHOD, "distillation_weight": 2.5, "adversarial_weight": 0.5}))
    for parameter in state.method.players["discriminator"].parameters.values():
        parameter.data.zero_()
    batch = state.next_batch()
    student = state.method.student_loss(batch, state.rng)  # pyright: ignore[reportAttributeAccessIssue]
    assert student.losses["adversarial"].tolist() == pytest.approx(0.5 * LN2)
    assert float(student.losses["distillation"].detach()) > 0
    judged = state.method.judge_loss(batch, state.rng)  # pyright: ignore[reportAttributeAccessIssue]
    assert judged.losses["discriminator"].tolist() == pytest.approx(LN2)
    assert (judged.losses["r1"].tolist(), judged.losses["r2"].tolist()) == (0.0, 0.0)


@pytest.mark.slow
def test_an_adversary_alone_brings_the_student_to_the_data():
    """From N(0, 1) to N(1.5, .4²): both moments, with no other term."""
    student, data = Gaussian(1), GaussianMixture.gaussian(1.5, 0.4)
    method = {**METHOD, "r1_weight": 0.02, "r2_weight": 0.02, "taps": ["read"], "modulated": True}
    optim = {"lr": 1e-2, "betas": [0.0, 0.99], "decay": "cosine", "clip": None}
    state = state_of(method, Reading(student), data, data, optim=optim, train={"steps": 1200})
    finish(state)
    assert float(student.mean.detach()) == pytest.approx(1.5, abs=0.08)
    assert float(student.log_std.detach().exp()) == pytest.approx(0.4, abs=0.08)


class Reading(torch.nn.Module):
    """A student whose input can be tapped."""

    def __init__(self, student: Gaussian) -> None:
        super().__init__()
        self.student, self.read = student, torch.nn.Identity()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        self.read(sample)
        return self.student(sample, timestep)


def test_what_counts_as_real(tmp_path):
    """Data; a short rollout of the teacher; or its stored samples."""
    start, path = sources(), tmp_path / "pairs.safetensors"
    stored = torch.full((6, 2), 7.0) + torch.arange(6)[:, None]
    save_pairs(path, Pair(torch.randn(6, 2), stored, Condition.of_labels(torch.arange(6) % 5)))
    batch = Batch(torch.zeros(64, 2), Condition.of_labels(torch.arange(64) % 5), torch.arange(64))
    means = {}
    for name, more in {
        "data": {},
        "teacher": {"real": "teacher", "real_steps": 16},
        "pairs": {"real": "teacher", "pairs": str(path)},
    }.items():
        method = begin(config({**METHOD, **more}), start).method
        means[name] = method._real(batch, Rng(0))  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(means["data"].x, batch.x)
    assert set(means["pairs"].x[:, 0].tolist()) <= set(stored[:, 0].tolist())
    assert torch.equal(means["pairs"].condition.labels, (means["pairs"].x[:, 0] - 7).long() % 5)
    centres = five_modes(labelled=True).means[torch.arange(64) % 5].to(torch.float32)
    assert float((means["teacher"].x - centres).norm(dim=1).mean()) < 0.5
    assert not means["teacher"].x.requires_grad


def test_stopped_and_resumed_is_bit_identical(tmp_path):
    method = {**METHOD, "backbone": "trained", "modulated": True, "distillation_weight": 1.0}
    run = config(method, tmp_path, student={"steps": 2})
    straight, first = begin(run), begin(run)
    go(straight)
    go(first, 3)
    checkpoint.save(tmp_path, first)
    second = begin(run)
    checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[-1], second)
    go(second)
    assert_same(everything(straight), everything(second))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"adversarial_weight": 0.0}, r"method.adversarial_weight: 0, and so is distillation_weight"),
        ({"taps": ["midle"]}, r"taps: no sub-module 'midle'"),
    ],
)
def test_mistakes_are_told_before_the_first_step(method, message):
    with pytest.raises(UserError, match=message):
        begin(config({"name": "adversarial", **method}))


@pytest.mark.parametrize(
    "method",
    [
        {"adversarial_weight": 0.0, "distillation_weight": 1.0, "r1_weight": 1.0},
        {"real_steps": 8},
        {"noise_levels": "uniform", "logit_mean": 0.0},
        {"distillation_time": "one"},
    ],
)
def test_a_setting_without_effect_is_refused(method):
    with pytest.raises(UserError, match="it does nothing without"):
        config({"name": "adversarial", **method})


def test_the_sampler_is_the_rollout_s():
    state = begin(config(METHOD, student={"steps": 4}))
    sampler = state.method.sampler(state.config.method, Flow(), 4)
    assert (sampler.times, sampler.kind) == ((1.0, 0.75, 0.5, 0.25), "renoise")
    assert state.method.times == sampler.times  # pyright: ignore[reportAttributeAccessIssue]
    times = state.method.judge.times(torch.linspace(0.001, 0.999, 999))  # pyright: ignore[reportAttributeAccessIssue]
    assert float(times.median()) == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-3)
