"""Two Gaussian classes of one variance, on which everything about guidance is known, and students that start exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.data.mixture import MixtureSet
from fewstep.diffusion.gaussian import ExactDenoiser, GaussianMixture
from fewstep.diffusion.prediction import Kind, Prediction
from fewstep.diffusion.process import Flow, Process
from fewstep.diffusion.solvers import sample
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance_input import at_scale
from fewstep.models.load import make_denoiser
from fewstep.models.schedule import Schedule
from fewstep.models.vector_network import VectorConfig, VectorNetwork
from fewstep.training.loop import TrainState
from fewstep.training.opening import Sources
from tests.training.runs import begin, config

STD = 0.8
CLASSES = GaussianMixture(
    torch.ones(2), torch.tensor([[0.5, 0.0], [0.0, 0.3]]), torch.full((2,), STD), torch.tensor([0, 1])
)


@dataclass(frozen=True)
class AwayFromClass1:
    """The exact denoiser of the classes, with class 1 as what guidance leads away from.

    Guided from N(m_1, s_d²) to N(m_0, s_d²), the ODE's samples are exactly N(m_1 + s·(m_0 − m_1), s_d²).
    """

    exact: ExactDenoiser
    null: Condition

    @property
    def process(self) -> Process:
        return self.exact.process

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        return self.exact(x_t, t, condition)


def exact_student() -> NetworkDenoiser:
    """A network that is the exact denoiser of class 0, whose hidden units are zero but are heard."""
    mean = tuple(CLASSES.means[0].tolist())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = VectorNetwork(VectorConfig(2, 2, mean, STD, width=16, depth=2))
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
        nn.init.normal_(network.last.weight, std=0.3)
    return make_denoiser(network, Schedule(Flow(), Kind.VELOCITY))


def guided_run(method: Mapping[str, object], steps: int, **teacher: object) -> TrainState:
    """A run of `steps` steps from that student towards the guided teacher."""
    run = config(
        method,
        data={"batch_size": 256},
        optim={"lr": 1e-2, "decay": "cosine", "clip": None},
        train={"steps": steps, "ema": 0.9},
        teacher=teacher,
    )
    teacher_of_class_0 = AwayFromClass1(CLASSES.denoiser(Flow()), Condition.of_labels(torch.tensor([1])))
    return begin(run, Sources(MixtureSet(CLASSES), teacher_of_class_0, exact_student()))


@torch.no_grad()
def samples_at(state: TrainState, scale: float, steps: int) -> Tensor:
    """The averaged student's samples of class 0, from noise in pairs ±ε, so that their mean has no sampling error."""
    noise = torch.randn(1024, 2, generator=torch.Generator().manual_seed(7))
    noise = torch.cat([noise, -noise])
    labels = Condition.of_labels(torch.zeros(len(noise), dtype=torch.int64))
    sampler = state.method.sampler(state.config.method, Flow(), steps)
    with state.method.averages["ema"].swapped():
        return sample(at_scale(state.method.student, scale), sampler, noise, labels)


def guided_mean(scale: float) -> Tensor:
    """m_1 + s·(m_0 − m_1), which the teacher's Euler keeps in any number of steps."""
    first, second = CLASSES.means
    return (second + scale * (first - second)).float()
