"""A student that takes the guidance scale: on equal Gaussians its mean is affine in it, and known."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fewstep.data.mixture import MixtureSet
from fewstep.diffusion.gaussian import ExactDenoiser, GaussianMixture
from fewstep.diffusion.prediction import Kind, Prediction
from fewstep.diffusion.process import Flow, Process
from fewstep.diffusion.solvers import sample
from fewstep.models.conditioning import Condition
from fewstep.models.guidance_input import at_scale
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.models.vector_network import VectorConfig, VectorNetwork
from fewstep.training import checkpoint
from fewstep.training.loop import TrainState
from fewstep.training.opening import Sources
from tests.training.runs import METHODS, assert_same, begin, config, everything, go

CLASSES = GaussianMixture(torch.ones(2), torch.tensor([[0.5, 0.0], [0.0, 0.3]]), torch.ones(2), torch.tensor([0, 1]))


@dataclass(frozen=True)
class AwayFromClass1:
    """The exact denoiser of the two classes, with class 1 as what guidance leads away from.

    With the mixture of both as the null condition no guided mean is known. Guided from N(m_1, s²) to N(m_0, s²), the
    ODE's samples are exactly N(m_1 + scale·(m_0 − m_1), s²).
    """

    exact: ExactDenoiser
    null: Condition

    @property
    def process(self) -> Process:
        return self.exact.process

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        return self.exact(x_t, t, condition)


def trained(intervals: int, steps: int) -> TrainState:
    torch.manual_seed(0)
    network = VectorNetwork(VectorConfig(2, 2, (0.25, 0.15), 1.0, width=64, depth=2))
    student = make_denoiser(network, Schedule(Flow(), Kind.VELOCITY))
    teacher = AwayFromClass1(CLASSES.denoiser(Flow()), Condition.of_labels(torch.tensor([1])))
    method = {"name": "consistency", "solver": "euler", "intervals": intervals, "target": "self", "metric": "l2",
              "guidance_range": [1.0, 3.0]}  # fmt: skip
    run = config(
        method,
        data={"batch_size": 256},
        optim={"lr": 1e-2 if steps < 1000 else 5e-3, "decay": "cosine", "clip": None},
        train={"steps": steps, "ema": 0.98},
    )
    state = begin(run, Sources(MixtureSet(CLASSES), teacher, student))
    go(state)
    return state


@torch.no_grad()
def mean_at(state: TrainState, scale: float, label: int) -> Tensor:
    """Of the averaged student's one-step samples: noise in pairs ±ε, whose own mean is zero."""
    noise = torch.randn(1024, 2, generator=torch.Generator().manual_seed(7))
    noise = torch.cat([noise, -noise])
    sampler = state.method.sampler(state.config.method, Flow(), 1)
    labels = Condition.of_labels(torch.full((len(noise),), label))
    with state.method.averages["ema"].swapped():
        return sample(at_scale(state.method.student, scale), sampler, noise, labels).mean(0)


@pytest.mark.parametrize(
    ("intervals", "steps", "tolerance"),
    [pytest.param(4, 400, 0.12, id="quick"), pytest.param(8, 3000, 0.05, id="full", marks=pytest.mark.slow)],
)
def test_the_student_s_mean_is_affine_in_the_scale(intervals, steps, tolerance):
    """m_1 + scale·(m_0 − m_1), which the teacher's Euler keeps in any number of steps, and m_1 for class 1 itself.

    Its first entry grows by 0.5 a unit of scale. A student that is deaf to the scale is 0.5 off at both ends, one that
    takes w = s − 1 for s is 0.5 off everywhere: the tolerances are a quarter and a tenth of that. They allow for what a
    small network has not learned in so many steps; the mean itself has no sampling error to first order.
    """
    state = trained(intervals, steps)
    first, second = CLASSES.means
    for scale in (1.0, 2.0, 3.0):
        wanted = (second + scale * (first - second)).tolist()
        assert mean_at(state, scale, label=0).tolist() == pytest.approx(wanted, abs=tolerance), scale
        assert mean_at(state, scale, label=1).tolist() == pytest.approx(second.tolist(), abs=tolerance), scale


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    """With an averaged target, whose network hears the scale by itself."""
    run = config({**METHODS["consistency"], "guidance_range": [1.0, 4.0]}, train={"steps": 6})
    whole, half = begin(run), begin(run)
    go(whole)
    go(half, 3)
    resumed = begin(run)
    checkpoint.restore(checkpoint.save(tmp_path, half), resumed)
    go(resumed)
    assert_same(everything(resumed), everything(whole))
    added = [name for name in everything(whole) if "first.second.guidance" in name]
    assert {name.split("/")[0] for name in added} == {"student", "average target", "average ema"}
