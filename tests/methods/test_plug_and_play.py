"""Plug-and-play distillation: an external guide brings the guided mean, and takes it to another network."""

from __future__ import annotations

import pytest
import torch

from fewstep.diffusion.process import Flow
from fewstep.diffusion.solvers import sample
from fewstep.errors import UserError
from fewstep.models.conditioning import Condition
from fewstep.models.guidance_input import at_scale
from fewstep.models.guide_network import guide_of, with_guide
from fewstep.training import checkpoint
from tests.methods.guided_students import exact_student, guided_mean, guided_run, samples_at
from tests.training.runs import assert_same, begin, config, everything, go

PLUG = {"name": "plug_and_play", "guidance_range": [1.0, 5.0], "channels": 16, "width": 16}
ALONG = {**PLUG, "states": "trajectory", "trajectory_steps": 4}


@pytest.mark.parametrize(
    "method",
    [pytest.param(PLUG, id="noised_data", marks=pytest.mark.slow), pytest.param(ALONG, id="trajectory")],
)
def test_the_student_s_mean_is_affine_in_the_scale(method):
    """In 1 step and in 4; a guide deaf to the scale is 0.75 off at both ends, one with w = s − 1 is 0.5 off."""
    state = guided_run(method, 400)
    go(state)
    for scale in (1.5, 2.0, 3.0, 4.5):
        for steps in (1, 4):
            found = samples_at(state, scale, steps).mean(0)
            assert (found - guided_mean(scale)).abs().max() < 0.08, (scale, steps)


def test_a_guide_moves_a_fine_tuned_network_as_it_moves_its_own():
    """The other network's classes both lie 0.7 further along; so do its guided samples."""
    state = guided_run(PLUG, 400)
    go(state)
    tuned = exact_student()
    tuned.network.mean += torch.tensor([0.0, 0.7])  # pyright: ignore[reportOperatorIssue]
    with state.method.averages["ema"].swapped():
        plugged = with_guide(tuned, guide_of(state.method.student))
    noise = torch.randn(512, 2, generator=torch.Generator().manual_seed(7))
    labels = Condition.of_labels(torch.zeros(1024, dtype=torch.int64))
    sampler = state.method.sampler(state.config.method, Flow(), 4)
    with torch.no_grad():
        made = sample(at_scale(plugged, 3.0), sampler, torch.cat([noise, -noise]), labels)
    assert (made.mean(0) - guided_mean(3.0) - torch.tensor([0.0, 0.7])).abs().max() < 0.12


def test_only_the_guide_trains_and_its_share_is_told():
    state = guided_run(PLUG, 2)
    network = state.method.student.network
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    report = go(state)[-1]
    moved = {name.split(".")[0] for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"guide"}
    own = sum(p.numel() for name, p in before.items() if name.startswith("guide."))
    rest = sum(p.numel() for p in before.values()) - own
    assert float(report.terms.figures["parameter_share"]) == pytest.approx(own / rest)


@pytest.mark.parametrize("method", [PLUG, ALONG], ids=["noised_data", "trajectory"])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, method):
    run = config(method, train={"steps": 6})
    whole, half = begin(run), begin(run)
    go(whole)
    go(half, 3)
    resumed = begin(run)
    checkpoint.restore(checkpoint.save(tmp_path, half), resumed)
    go(resumed)
    assert_same(everything(resumed), everything(whole))


def test_idle_settings_and_a_second_scale_are_refused():
    with pytest.raises(UserError, match=r"method.trajectory_steps: 4 given; it does nothing without states=trajectory"):
        config({**PLUG, "trajectory_steps": 4})
    with pytest.raises(UserError, match=r"teacher.guidance: 2.0 given; the scales come from method.guidance_range"):
        begin(config(PLUG, teacher={"guidance": 2.0}))
