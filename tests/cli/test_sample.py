"""Grids of samples: what is in which cell, that a cell depends on its own row and column alone, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.commands import sample
from fewstep.commands.source import open_any, open_source
from fewstep.diffusion.solvers import trajectory
from fewstep.evaluation.features import to_uint8
from fewstep.models.conditioning import Condition
from tests import tiny
from tests.cli.lab import Outcome, call


@pytest.fixture
def grids(monkeypatch):
    """What every picture is made of."""
    seen = []

    def keep(out, rows, row_titles, column_titles=(), scale=3, ragged=False):
        seen.append((rows, list(row_titles), list(column_titles)))
        drawn(out, rows, row_titles, column_titles, scale, ragged)

    drawn = sample.save_grid
    monkeypatch.setattr(sample, "save_grid", keep)
    return seen


def draw(lab, *arguments: str) -> Outcome:
    outcome = call("sample", *arguments, "--out", str(lab.folder / "out.png"))
    assert outcome.code == 0, outcome.err
    return outcome


def expected(source, steps: int, label: int, seed: int) -> list[torch.Tensor]:
    """Every step's x̂_0 of one sampling by hand."""
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    condition, fresh = Condition.of_labels(torch.tensor([label])), torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        return [one.x0 for one in trajectory(source.denoiser, source.sampler_in(steps), noise, condition, fresh)]


def test_a_cell_is_the_sample_of_its_class_seed_and_step_count(lab, grids):
    told = draw(lab, str(lab.trained), "--steps", "1", "--steps", "3", "--classes", "class2", "--classes", "0",
                "--seed", "5", "--seed", "7")  # fmt: skip
    lines = told.out.splitlines()
    assert [lines[0].split(":")[0], lines[1].split(":")[0]] == ["1 step", "3 steps"]
    assert lines[2:] == [f"wrote {lab.folder / 'out.png'}"]
    ((rows, titles, columns),) = grids
    assert columns == ["1 step", "3 steps"]
    assert titles == ["class2\nseed 5", "class2\nseed 7", "class0\nseed 5", "class0\nseed 7"]
    source = open_source(str(lab.trained))
    for row, (label, seed) in zip(rows, [(2, 5), (2, 7), (0, 5), (0, 7)], strict=True):
        for image, steps in zip(row, (1, 3), strict=True):
            assert torch.equal(image, expected(source, steps, label, seed)[-1][0])
    with Image.open(lab.folder / "out.png") as picture:
        assert picture.width > 2 * 24


def test_the_teachers_samples_stand_beside_the_students_from_the_same_noise(lab, grids):
    draw(lab, str(lab.trained), "--beside-teacher", "--teacher-steps", "2", "--classes", "1", "--seed", "3")
    ((rows, titles, columns),) = grids
    assert (titles, columns) == (["class1"], ["student\n1 step", "teacher\n2 steps"])
    assert torch.equal(rows[0][0], expected(open_source(str(lab.trained)), 1, 1, 3)[-1][0])
    assert torch.equal(rows[0][1], expected(open_source(str(lab.teacher)), 2, 1, 3)[-1][0])


def test_a_trajectory_is_every_steps_estimate_a_row_a_sampling(lab, grids):
    draw(lab, str(lab.trained), "--trajectory", "--beside-teacher", "--steps", "2", "--teacher-steps", "4",
         "--classes", "1")  # fmt: skip
    ((rows, titles, columns),) = grids
    assert ([len(row) for row in rows], columns) == ([2, 4], [])
    assert titles == ["student, 2 steps\nclass1", "teacher, 4 steps\nclass1"]
    for row, (place, steps) in zip(rows, ((lab.trained, 2), (lab.teacher, 4)), strict=True):
        assert torch.equal(row, torch.cat(expected(open_source(str(place)), steps, 1, 0)))
    with Image.open(lab.folder / "out.png") as picture:
        pixels = np.array(picture)
    first = to_uint8(rows[0])[0].permute(1, 2, 0).numpy()
    found = pixels[14 : 14 + 24 : 3, -(14 + 4 * 29 - 5) :: 3][:, :8]
    assert np.array_equal(found, first), "the shorter row begins where the longer one does"


def test_without_classes_rows_are_seeds(lab, grids, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(tiny.unet2d(), DDPMScheduler()).save_pretrained(tmp_path / "plain")
    draw(lab, str(tmp_path / "plain"), "--steps", "2")
    ((rows, titles, _),) = grids
    assert titles == [f"seed {n}" for n in range(8)]
    assert len({row.sum().item() for row in rows}) == 8


@pytest.fixture(scope="module")
def painter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "sd"
    tiny.sd15_pipeline().save_pretrained(folder)
    return folder


def test_a_prompt_is_encoded_guided_and_decoded_as_the_pipeline_does(lab, grids, painter):
    """One step by hand: diffusers' own embeddings, its UNet told both, its VAE."""
    from diffusers import StableDiffusionPipeline

    draw(lab, str(painter), "--prompt", "a cat", "--prompt", "two dogs", "--steps", "1", "--guidance", "2")
    ((rows, titles, _),) = grids
    assert titles == ["a cat", "two dogs"]
    pipe = StableDiffusionPipeline.from_pretrained(painter, safety_checker=None)
    source = open_any(str(painter), 2.0)
    (time,) = source.sampler_in(1).times
    process = source.denoiser.process
    noise = torch.randn(1, *source.shape, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (float(of(torch.tensor([time]))) for of in (process.alpha, process.sigma))
    for row, prompt in zip(rows, titles, strict=True):
        embeddings = pipe.encode_prompt(prompt, "cpu", 1, True)
        x = process.prior(noise, time)
        with torch.no_grad():
            told, untold = (pipe.unet(x, time, encoder_hidden_states=one).sample for one in embeddings)
            latents = (x - sigma * (untold + 2 * (told - untold))) / alpha
            image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
        assert torch.allclose(row, image, atol=1e-4)


def test_a_size_of_its_own_is_decoded_to_that_size(lab, grids, painter):
    draw(lab, str(painter), "--prompt", "a cat", "--steps", "1", "--size", "32")
    assert grids[0][0][0].shape == (1, 3, 32, 32)


def test_classes_of_a_latent_pipeline_are_decoded(lab, grids, tmp_path):
    tiny.dit_pipeline().save_pretrained(tmp_path / "dit")
    draw(lab, str(tmp_path / "dit"), "--classes", "3", "--classes", "7", "--steps", "2", "--guidance", "3")
    ((rows, titles, _),) = grids
    assert titles == ["class 3", "class 7"]
    assert rows[0].shape == (1, 3, 16, 16), "the tiny VAE doubles 8 × 8"
    assert float((rows[0] - rows[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{painter}"], "sample: a text pipeline draws what a prompt says; give --prompt, once or more often"),
        (["{painter}", "--prompt", "a", "--size", "33"], "33 pixels"),
        (["{trained}", "--prompt", "a cat"], "prompt: 'a cat' given, this network takes classes"),
        (["{trained}", "--prompt", "a", "--classes", "1"], "sample: classes or prompts are drawn, not both"),
        (["{teacher}", "--beside-teacher"], "--beside-teacher: {teacher} is no student of a teacher"),
        (["{trained}", "--teacher-steps", "2"], "--teacher-steps: acts with --beside-teacher only"),
        (["{painter}", "--classes", "1"], "classes: '1' given, this network takes none"),
        (["{teacher}", "--classes", "70"], "classes: '70' given; 0 to "),
        (["{teacher}/unet"], "{teacher}/unet: one component, without a model_index.json; give the pipeline"),
        (["{teacher}", "--out", "a.jpg"], "--out: a.jpg given; the name of a picture ends in .png"),
    ],
)
def test_what_cannot_be_drawn_is_refused(lab, painter, arguments, said):
    places = {"trained": lab.trained, "teacher": lab.teacher, "painter": painter}
    words = [word.format(**places) for word in arguments]
    outcome = call("sample", "--out", str(lab.folder / "out.png"), *words)
    assert outcome.code == 2
    (error,) = (line for line in outcome.err.splitlines() if line.startswith("error: "))
    assert said.format(**places) in error
    assert not (lab.folder / "out.png").exists()
