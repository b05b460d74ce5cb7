"""Pretraining learns the conditional mean, and unlearns a share of the labels."""

from __future__ import annotations

import pytest
import torch

from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.process import Flow
from fewstep.models.conditioning import Condition
from fewstep.rng import Rng
from tests.methods.gaussians import Gaussian, finish, state_of
from tests.training.runs import begin, config


def test_it_ends_at_the_exact_denoiser():
    data = GaussianMixture.gaussian(1.5, 0.4)
    student = Gaussian(1, steps=())
    optim = {"lr": 3e-2, "betas": [0.9, 0.99], "decay": "cosine", "clip": None}
    finish(state_of({"name": "pretrain"}, student, data, data, optim=optim, train={"steps": 400}))
    assert float(student.mean.detach()) == pytest.approx(1.5, abs=0.03)
    assert float(student.log_std.detach().exp()) == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0.0, 0.0), (0.1, 0.08, 0.12), (1.0, 1.0, 1.0)])
def test_the_share_of_dropped_labels(share, least, most):
    method = begin(config({"name": "pretrain", "label_dropout": share})).method
    labels = Condition.of_labels(torch.zeros(10_000).long())
    dropped = method._dropped(labels, Rng(0), 10_000).labels  # pyright: ignore[reportAttributeAccessIssue]
    assert set(dropped.tolist()) <= {0, 5}
    assert least <= float((dropped == 5).float().mean()) <= most


@pytest.mark.parametrize(("law", "low"), [("uniform", 0.1), ("logit_normal", 0.014)])
def test_the_law_of_times(law, low):
    method = begin(config({"name": "pretrain", "times": law})).method
    times = method.law(Rng(0).uniform(20_000))  # pyright: ignore[reportAttributeAccessIssue]
    assert float((times < 0.1).float().mean()) == pytest.approx(low, abs=0.01)


def test_its_sampler_is_the_teacher_s():
    method = begin(config({"name": "pretrain"})).method
    sampler = method.sampler(config({"name": "pretrain"}).method, Flow(), 4)
    assert (sampler.times, sampler.kind) == ((1.0, 0.75, 0.5, 0.25), "ddim")
