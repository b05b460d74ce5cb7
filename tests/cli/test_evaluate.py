"""Figures of a source: the same in any batch, whole on disk, and of the sampler that is asked for."""

from __future__ import annotations

import json

import pytest
import torch

from fewstep.commands.evaluate import make_images, sample_noise
from fewstep.commands.source import open_source
from fewstep.diffusion.solvers import Sampler, sample
from fewstep.models.conditioning import Condition
from tests.cli.lab import call, write_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A network of the size and classes that the shipped classifier knows."""
    return write_teacher(tmp_path_factory.mktemp("teacher"), 32, 24)


@pytest.fixture
def figures(teacher, tmp_path):
    """What `evaluate` writes about that network."""

    def measure(*arguments: str) -> dict[str, object]:
        out = tmp_path / "figures" / "out.json"
        words = ["evaluate", str(teacher), "--samples", "30", "--json", str(out), *arguments]
        outcome = call(*words)
        assert outcome.code == 0, outcome.err
        assert outcome.err == ""
        assert list(out.parent.iterdir()) == [out]
        return json.loads(out.read_text()) | {"printed": outcome.out}

    return measure


def test_figures_do_not_depend_on_the_batch(figures):
    small, large = figures("--batch-size", "7", "--steps", "2"), figures("--batch-size", "30", "--steps", "2")
    assert small["fd"] == pytest.approx(large["fd"], rel=1e-4)
    assert small["kid"] == pytest.approx(large["kid"], rel=1e-4)
    assert small["accuracy"] == large["accuracy"]
    assert (small["images"], small["real_images"], small["steps"], small["sampler"]) == (30, 30, 2, "ddim")
    assert f"fd                {small['fd']:.5g}" in str(small["printed"])


def test_another_seed_or_step_count_makes_other_figures(figures):
    first = figures("--steps", "1")["fd"]
    assert figures("--steps", "1")["fd"] == first
    assert figures("--steps", "1", "--seed", "1")["fd"] != first
    assert figures("--steps", "2")["fd"] != first


def test_a_teacher_takes_its_guidance(figures):
    assert figures("--steps", "1", "--guidance", "3")["guidance"] == 3.0


@pytest.mark.parametrize("kind", ["renoise", "ddim"])
def test_a_sample_is_a_function_of_seed_and_index(lab, kind):
    source = open_source(str(lab.teacher))
    sampler = Sampler.of(source.denoiser.process, 3, kind)
    whole, parts = make_images(source, sampler, 6, 6, seed=4), make_images(source, sampler, 6, 4, seed=4)
    torch.testing.assert_close(whole.images, parts.images, rtol=0, atol=1e-5)
    assert whole.labels is not None
    assert whole.labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert not torch.allclose(whole.images[0], make_images(source, sampler, 1, 1, seed=5).images[0])


def test_samples_are_those_of_the_sampler(lab, monkeypatch):
    source = open_source(str(lab.teacher))
    sampler = Sampler.of(source.denoiser.process, 3)
    fresh = iter([sample_noise(source.shape, range(2), 4, step) for step in (1, 2)])
    monkeypatch.setattr("fewstep.diffusion.solvers._fresh_noise", lambda like, generator: next(fresh))
    with torch.no_grad():
        noise = sample_noise(source.shape, range(2), 4, 0)
        wanted = sample(source.denoiser, sampler, noise, Condition.of_labels(torch.arange(2)))
    assert torch.equal(make_images(source, sampler, 2, 2, seed=4).images, wanted)


def test_noise_is_normal_and_independent():
    noise = sample_noise((3, 8, 8), range(200), seed=0, step=0).flatten(1)
    assert noise.dtype == torch.float32
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.var()) == pytest.approx(1, abs=0.03)
    assert torch.equal(noise[7], sample_noise((192,), range(7, 8), seed=0, step=0)[0])
    for other in (sample_noise((192,), range(200), 0, 1), sample_noise((192,), range(200), 1, 0)):
        assert float((noise * other).mean()) == pytest.approx(0, abs=0.02)
