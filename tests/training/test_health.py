"""The health panel: its figures against numbers computed by hand, and a run that does not notice it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.commands.train import logged
from fewstep.diffusion.gaussian import GaussianMixture, five_modes
from fewstep.diffusion.prediction import Kind, Prediction
from fewstep.diffusion.process import Flow
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.training.health import BINS, Noised, Panel, drift, floor, gap, verdict
from fewstep.training.loop import TrainState
from tests.training.digits import digits_run
from tests.training.runs import METHODS, assert_same, begin, config, everything, go, sources

GAPS = {"health/gap", *(f"health/gap/{bin}" for bin in ("0.02-0.26", "0.26-0.50", "0.50-0.74", "0.74-0.98"))}


def run(method: str, folder: Path, every: int, **train: Any):
    return config(METHODS[method], folder, health={"every": every, "samples": 8} if every else {"every": 0},
                  train={"trackers": [], "log_every": 1, **train})  # fmt: skip


def modules(state: TrainState) -> list[nn.Module]:
    held = [one.network for one in vars(state.method).values() if isinstance(one, NetworkDenoiser)]
    return [*held, *([] if state.method.critics.discriminator is None else [state.method.critics.discriminator.heads])]


def switches(state: TrainState) -> list[bool]:
    """Every module's mode and every parameter's switch."""
    return [flag for one in modules(state) for flag in
            (*(m.training for m in one.modules()), *(p.requires_grad for p in one.parameters()))]  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_reading_leaves_the_run_as_it_was(name, tmp_path):
    state = begin(run(name, tmp_path, 1))
    go(state, 1)
    before, flags, stream = everything(state), switches(state), torch.random.get_rng_state()
    panel = Panel.of(state)
    one, other = panel.read(state).read(), panel.read(state).read()
    assert one == other
    assert all(torch.isfinite(torch.tensor(list(one.values()))))
    assert_same(before, everything(state))
    assert switches(state) == flags
    assert torch.equal(torch.random.get_rng_state(), stream)


@pytest.mark.parametrize("name", METHODS)
def test_the_panel_finds_every_judge(name, tmp_path):
    """By the names that its players have, which the method does not repeat."""
    state = begin(run(name, tmp_path, 1))
    players, critics = state.method.players, state.method.critics
    assert ("fake_score" in players) == (critics.fake_score is not None)
    assert ("discriminator" in players) == (critics.discriminator is not None)
    assert critics.teacher is not None
    figures = set(Panel.of(state).read(state).figures)
    assert (figures >= GAPS) == ("fake_score" in players)
    assert ("health/discriminator_ranked" in figures) == ("discriminator" in players)


@pytest.mark.parametrize("name", ["dmd2_gan", "self_adversarial", "progressive"])
def test_a_run_is_the_same_with_the_panel_and_without(name, tmp_path):
    """Seven steps, of every kind of turn, to the bit; and torch's global stream, which nothing may touch."""
    ends, streams = [], []
    for every in (0, 1):
        torch.manual_seed(5)
        state = begin(run(name, tmp_path / str(every), every))
        for _ in logged(state):
            pass
        ends.append(everything(state))
        streams.append(torch.random.get_rng_state())
    assert_same(*ends)
    assert torch.equal(*streams)
    lines = [json.loads(line) for line in (tmp_path / "1" / "log.jsonl").read_text().splitlines()]
    assert all("health/std_ratio" in line for line in lines)
    assert len({line["health/std_ratio"] for line in lines}) > 1, "the student moved, and the panel saw it"
    assert not (tmp_path / "1" / "health").exists(), "points in a plane are no pictures"


def test_a_fake_score_that_is_the_teacher_has_neither_gap_nor_lead(tmp_path):
    """At step 0 it is a copy of the teacher; with its training both figures leave 0."""
    state = begin(run("dmd2", tmp_path, 1), sources(network_teacher=True))
    panel = Panel.of(state)
    figures = panel.read(state).read()
    assert {figures[name] for name in GAPS} == {0.0}
    assert figures["health/fake_loss_above_teacher"] == 0.0
    assert figures["health/fake_loss"] == figures["health/teacher_loss"] > 0
    go(state, 2)  # of the critic
    figures = panel.read(state).read()
    assert min(figures[name] for name in GAPS) > 1e-4
    difference = figures["health/fake_loss"] - figures["health/teacher_loss"]
    assert figures["health/fake_loss_above_teacher"] == pytest.approx(difference, abs=1e-6)
    assert difference != 0


def test_the_pictures_are_what_the_judges_say(tmp_path):
    """Row by row: the sample, x_t = α·x + σ·ε, and both estimates at it, of one and the same noise."""
    state = begin(run("dmd2", tmp_path, 1), sources(network_teacher=True))
    go(state, 2)
    panel = Panel.of(state)
    rows = panel.read(state).rows
    assert list(rows) == ["student's sample", "with noise", "teacher's estimate", "fake score's estimate",
                          "real, same condition"]  # fmt: skip
    sample, x_t, real, fake, data = rows.values()
    process, critics = state.method.student.process, state.method.critics
    assert critics.teacher is not None
    assert critics.fake_score is not None
    t = process.at(0.02 + 0.96 * (torch.arange(8) + 0.5) / 8)
    noise = (x_t - process.alpha(t)[:, None] * sample) / process.sigma(t)[:, None]
    assert noise.mean().abs() < 1
    assert 0.3 < noise.std() < 2
    with torch.no_grad():
        torch.testing.assert_close(real, critics.teacher(x_t, t, panel.batch.condition).x0)
        torch.testing.assert_close(fake, critics.fake_score(x_t, t, panel.batch.condition).x0)
    assert torch.equal(data, panel.batch.x)
    figures = panel.read(state).read()
    assert figures["health/gap"] == pytest.approx(float((fake - real).abs().mean()), rel=1e-5)
    low = (fake[:2] - real[:2]).abs().mean()
    assert figures["health/gap/0.02-0.26"] == pytest.approx(float(low), rel=1e-5)


def prediction(value: Tensor, t: Tensor | None = None) -> Prediction:
    t = torch.full((len(value),), 0.5) if t is None else t
    return Prediction(Flow(), torch.zeros_like(value), t, value, Kind.X0)


def test_the_gap_is_binned_by_noise_level():
    offsets, x = torch.arange(8.0)[:, None].expand(8, 3), torch.full((8, 3), 7.0)
    figures = gap(prediction(offsets), prediction(torch.zeros(8, 3)), x)
    assert BINS == 4
    assert [float(value) for value in figures.values()] == [3.5, 0.5, 0.5, 2.5, 4.5, 6.5]


def test_drift_of_a_scaled_and_shifted_set():
    real = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    figures = drift(3 * real + 0.25, real)
    assert float(figures["mean_shift"]) == pytest.approx(float(2 * real.mean() + 0.25), abs=1e-6)
    assert float(figures["std_ratio"]) == pytest.approx(3, rel=1e-5)
    assert float(figures["spread_ratio"]) == pytest.approx(3, rel=1e-5)


def test_one_picture_sixteen_times_has_contrast_but_no_spread():
    real = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    figures = drift(real[:1].expand(16, -1, -1, -1), real)
    assert float(figures["spread_ratio"]) == 0
    assert 0.5 < float(figures["std_ratio"]) < 2


def test_the_verdict_counts_and_ranks():
    figures = verdict(torch.tensor([[1.0], [-1.0], [3.0], [0.5]]), torch.tensor([[-2.0], [2.0]]))
    assert [float(value) for value in figures.values()] == [0.75, 0.5, 5 / 8]


def noised(x: Tensor) -> Noised:
    generator = torch.Generator().manual_seed(1)
    noise, t = torch.randn(x.shape, generator=generator), torch.full((len(x),), 0.6)
    return Noised(x, noise, t, Flow().add_noise(x, noise, t))


def test_the_best_fake_score_is_below_the_teacher_by_what_it_knows():
    """Of samples of one mode the exact denoiser of that mode beats the exact denoiser of all five, and never loses."""
    whole = five_modes(labelled=False)
    mode = GaussianMixture(whole.weights[:1], whole.means[:1], whole.stds[:1])
    shown = noised(mode.means.float() + mode.stds.float() * torch.randn(512, 2))
    fake, teacher = (m.denoiser(Flow())(shown.x_t, shown.t, Condition.none()) for m in (mode, whole))
    figures = floor(fake, teacher, shown)
    assert float(figures["fake_loss_above_teacher"]) < -0.01
    assert float(floor(teacher, teacher, shown)["fake_loss_above_teacher"]) == 0


def test_a_run_on_pictures_leaves_a_sheet_at_each_reading(tmp_path):
    for _ in logged(digits_run(tmp_path, steps=3, health={"every": 2, "samples": 8})):
        pass
    folder = tmp_path / "run" / "health"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002.png", "step-00000003.png"]
    with Image.open(folder / "step-00000003.png") as picture:
        assert picture.width > 8 * 16
        assert picture.height >= 5 * 16, "five rows of eight-pixel pictures at twice their size"
