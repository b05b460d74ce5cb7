"""The judge of `fewstep verify`: what it compares with, and which bar it holds a student to."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fewstep import registry
from fewstep.commands import verification, verify
from fewstep.commands.verification import Samples, draw, judge
from fewstep.data.mixture import MixtureSet
from fewstep.diffusion.gaussian import five_modes
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.errors import UserError
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.models.vector_network import VectorConfig, VectorNetwork
from fewstep.training.method import Claims
from fewstep.training.opening import Sources
from tests.cli.lab import call
from tests.training.runs import METHODS, begin, config

ONE_D = verify.one_dimensional()


@pytest.fixture
def brief(monkeypatch):
    """Few steps and few samples: the verdict then says nothing, but everything is run."""
    monkeypatch.setattr(verification, "WARM_STEPS", 2)
    monkeypatch.setattr(verification, "SAMPLES", 64)
    monkeypatch.setattr(verification, "PAIRS", 256)


def samples(student: float, teacher: float, mapped: torch.Tensor | None = None) -> Samples:
    """Exact standard normals, and the same shifted by `student` and `teacher`."""
    exact, again = (torch.randn(2048, 1, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    return Samples(again + student, again + teacher, exact, again, mapped, None)


@pytest.mark.parametrize(
    ("name", "steps", "share"),
    [("dmd2", 1, 0.03), ("consistency", 1, 0.06), ("dmd2", 2, 0.35), ("consistency", 4, 0.35)],
)
def test_the_bar_is_a_share_of_the_teacher_s_energy(name, steps, share):
    verdict = judge(name, steps, samples(0.05, 2.0), 1.0)
    assert verdict.tolerance == pytest.approx(share * verdict.teacher_energy)
    assert verdict.passed
    assert not judge(name, steps, samples(1.9, 2.0), 1.0).passed


def test_three_floors_pass_where_the_teacher_is_good_itself():
    verdict = judge("dmd2", 1, samples(0.0, 0.02), 1.0)
    assert verdict.teacher_energy < 9 * verdict.floor_energy
    assert verdict.tolerance == pytest.approx(3 * verdict.floor_energy)


def test_the_energy_is_that_of_two_normals():
    """2·E|X−Y| − E|X−X'| − E|Y−Y'| of N(0, 1) and N(2, 1): E|N(m, 2)| has a closed form."""
    m, std = 2.0, 2**0.5
    normal = torch.distributions.Normal(0.0, 1.0)
    folded = std * (2 / torch.pi) ** 0.5 * torch.exp(torch.tensor(-(m**2) / 4)) + m * (
        1 - 2 * normal.cdf(torch.tensor(-m / std))
    )
    exact = 2 * float(folded) - 2 * std * (2 / torch.pi) ** 0.5
    assert judge("dmd2", 1, samples(0.0, 2.0), 1.0).teacher_energy == pytest.approx(exact, rel=0.1)


def test_the_error_to_the_map_is_a_mean_distance():
    made = samples(0.0, 1.0)
    assert judge("dmd2", 1, replace(made, mapped=made.student + 0.25), 1.0).map_error == pytest.approx(0.25)


@pytest.mark.slow
def test_a_guided_target_is_the_guided_teacher_in_many_steps(monkeypatch):
    """Its Euler in 32 steps is near that, and samples without guidance are not."""
    state = begin(config(METHODS["consistency"], teacher={"guidance": 2.0}))
    mixture = five_modes(labelled=True)
    teacher = mixture.denoiser(Flow())
    monkeypatch.setattr(type(state.method), "claims", Claims(guided=True))
    drawn = draw(verification.Distilled(state, mixture, teacher, 0), 32)
    verdict = judge("consistency", 32, drawn, 1.0)
    plain = mixture.sample(4096, torch.Generator().manual_seed(5), drawn.labels)
    far = judge("consistency", 32, replace(drawn, student=plain), 1.0).student_energy
    assert verdict.floor_energy < 0.003
    assert verdict.teacher_energy < 0.05 * far


def test_the_teacher_has_no_guidance_where_none_is_distilled():
    state = begin(config(METHODS["consistency"], teacher={"guidance": 2.0}))
    mixture = five_modes(labelled=True)
    drawn = draw(verification.Distilled(state, mixture, mixture.denoiser(Flow()), 0), 8)
    verdict = judge("consistency", 8, drawn, 1.0)
    assert verdict.teacher_energy < 0.01


def test_the_map_is_drawn_from_the_same_noise(monkeypatch):
    network = VectorNetwork(VectorConfig(1, 0, (0.0,), 1.0, 16, 1))
    student = make_denoiser(network, Schedule(Flow(), Kind.VELOCITY))
    state = begin(config(METHODS["consistency"]), Sources(MixtureSet(ONE_D), ONE_D.denoiser(Flow()), student))
    monkeypatch.setattr(type(state.method), "claims", Claims(exact_map=True))
    drawn = draw(verification.Distilled(state, ONE_D, ONE_D.denoiser(Flow()), 0), 64)
    assert drawn.mapped is not None
    assert float((drawn.teacher - drawn.mapped).abs().mean()) < 0.03, "64 Euler steps follow the exact map"


def test_pairs_of_the_exact_teacher_lie_on_its_trajectories():
    run = config(METHODS["consistency"])
    pair = verification._make_pairs(run, ONE_D, ONE_D.denoiser(Flow()))
    ends = ONE_D.flow_map(pair.noise, torch.ones(len(pair.noise)), torch.zeros(len(pair.noise)), Flow())
    assert float((pair.x0 - ends).abs().mean()) < 0.01


def test_one_verdict_in_a_file(brief, monkeypatch, tmp_path):
    out, drawn = tmp_path / "verdict.json", tmp_path / "samples.safetensors"
    monkeypatch.setattr(verification, "load", _short(verification.load))
    outcome = call("verify", "consistency", "--steps", "2", "--json", str(out), "--save-samples", str(drawn))
    verdict = json.loads(out.read_text())
    assert (verdict["method"], verdict["steps"], verdict["dim"], verdict["map_error"]) == ("consistency", 2, 2, None)
    assert outcome.code == (0 if verdict["passed"] else 1)
    assert drawn.stat().st_size > 3 * 64 * 2 * 4


def _short(load):
    return lambda path, overrides=(): load(path, [*overrides, "train.steps=2"])


def test_a_method_or_all(tmp_path):
    assert "a method is missing" in call("verify").err
    assert "leave out dmd2" in call("verify", "dmd2", "--all").err


def test_guidance_needs_labels(monkeypatch):
    monkeypatch.setattr(registry.get("consistency"), "claims", Claims(guided=True))
    with pytest.raises(UserError, match="needs a mixture with labels"):
        verification.distil("consistency", ONE_D, 1, 0)
