"""Adapter guidance distillation: the guided mean in one evaluation a step, from an exact conditional network."""

from __future__ import annotations

import pytest
import torch

from fewstep.diffusion.process import VP
from fewstep.diffusion.solvers import jump
from fewstep.errors import UserError
from fewstep.models.guidance import Guided
from fewstep.models.guided_trajectory import along_trajectories, at_noised_data
from fewstep.models.schedule import alphas_cumprod
from fewstep.rng import Rng
from fewstep.training import checkpoint
from tests.methods.guided_students import CLASSES, guided_mean, guided_run, samples_at
from tests.training.runs import assert_same, begin, config, everything, go, sources

AGD = {"name": "agd", "guidance_range": [1.0, 5.0], "rank": 16, "width": 32, "trajectory_steps": 4}


def taught_of(steps: int = 4, scales: tuple[float, float] = (3.0, 3.0 + 1e-6), batch: int = 60):
    """The lesson of one batch of the five labelled modes."""
    start = sources()
    teacher = start.teacher
    assert teacher is not None
    state = begin(config(AGD, data={"batch_size": batch}))
    guided = Guided(teacher, getattr(teacher, "null", None)).ranged(scales)
    return guided, along_trajectories(guided, state.next_batch(), steps, "ddim", Rng(3))


def test_the_states_are_the_guided_teacher_s_own_steps():
    """Each state is the jump of the one before it under its scale, from pure noise, and the last is near the data."""
    guided, taught = taught_of(scales=(1.0, 5.0))
    at, count = taught.prediction, 12
    assert len(at.x_t) == 5 * count
    teacher = guided.at(taught.scale[:count])
    assert torch.equal(at.t[:count], torch.ones(count))
    for i in range(1, 5):
        before, now = slice((i - 1) * count, i * count), slice(i * count, (i + 1) * count)
        said = teacher(at.x_t[before], at.t[before], taught.condition.rows(before))
        assert torch.equal(at.value[before], said.value)
        assert torch.equal(at.x_t[now], jump(said, at.t[now]))
        assert bool((at.t[now] < at.t[before]).all())
        assert bool(((at.t[now] * 4 - (4 - i)) >= 0).all())
        assert bool(((at.t[now] * 4 - (4 - i)) < 1).all())
    assert float(taught.scale.min()) < 2 < 4 < float(taught.scale.max())


def test_trajectories_fit_every_process():
    """On VP they start at the noise end of the table, and stay on it."""
    teacher = CLASSES.denoiser(VP(alphas_cumprod({"beta_schedule": "squaredcos_cap_v2"})))
    state = begin(config(AGD, data={"batch_size": 60}))
    guided = Guided(teacher, teacher.null).ranged((1.0, 2.0))
    batch = state.next_batch()
    batch = type(batch)(batch.x, type(batch.condition).of_labels(torch.zeros(60, dtype=torch.int64)), batch.index)
    at = along_trajectories(guided, batch, 4, "ddim", Rng(0)).prediction
    assert at.t[:12].tolist() == [999.0] * 12
    assert bool((at.t >= 0).all())
    assert bool(at.x_t.isfinite().all())


def test_the_first_loss_is_the_guidance_itself():
    """The gap of an exact conditional network is −(s − 1)(û_c − û_∅), in closed form: sign and factor."""
    state = guided_run(AGD, 1)
    student, teacher = state.method.student, state.method.guided.denoiser  # pyright: ignore[reportAttributeAccessIssue]
    guided = Guided(teacher, teacher.null).ranged((3.0, 3.0 + 1e-6))
    batch = state.next_batch()
    batch.condition.labels.zero_()  # pyright: ignore[reportOptionalMemberAccess]
    for taught in (
        along_trajectories(guided, batch, 4, "ddim", Rng(0)),
        at_noised_data(guided, batch, lambda u: u, Rng(0)),
    ):
        t = taught.prediction.t.double()[:, None]
        variance = ((1 - t) * 0.8) ** 2 + t**2
        # û = ε̂ − x̂_0, and a mean m moves x̂_0 by m·σ²/τ² and ε̂ by −m·ασ/τ².
        by_mean = -(t**2 + (1 - t) * t) / variance
        wanted = -2.0 * by_mean * (CLASSES.means[0] - CLASSES.means[1])
        torch.testing.assert_close(taught.gap(student).double(), wanted, rtol=0, atol=2e-5)


def test_the_student_s_mean_is_affine_in_the_scale():
    """In 1 step and in 4; a student deaf to the scale is 0.75 off at both ends, one with w = s − 1 is 0.5 off."""
    state = guided_run(AGD, 400)
    go(state)
    for scale in (1.5, 2.0, 3.0, 4.5):
        for steps in (1, 4):
            found = samples_at(state, scale, steps).mean(0)
            assert (found - guided_mean(scale)).abs().max() < 0.06, (scale, steps)


def test_the_frozen_network_stays_and_its_share_is_told():
    state = guided_run(AGD, 2)
    network = state.method.student.network
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    report = go(state)[-1]
    moved = {name.split(".")[0] for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"guidance_adapters"}
    own = sum(p.numel() for name, p in before.items() if name.startswith("guidance_adapters"))
    rest = sum(p.numel() for p in before.values()) - own
    assert float(report.terms.figures["parameter_share"]) == pytest.approx(own / rest)


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    run = config(AGD, train={"steps": 6})
    whole, half = begin(run), begin(run)
    go(whole)
    go(half, 3)
    resumed = begin(run)
    checkpoint.restore(checkpoint.save(tmp_path, half), resumed)
    go(resumed)
    assert_same(everything(resumed), everything(whole))


def test_a_second_scale_and_a_teacher_without_one_are_refused():
    with pytest.raises(UserError, match=r"teacher.guidance: 2.0 given; the scales come from method.guidance_range"):
        begin(config(AGD, teacher={"guidance": 2.0}))
    with pytest.raises(UserError, match=r"method.guidance_range: guidance comes from a conditional teacher"):
        Guided(CLASSES.of_class(0).denoiser(VP(torch.tensor([0.9, 0.1]))), None).ranged((1.0, 2.0))
