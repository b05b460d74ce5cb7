"""A Gaussian as a trainable network, so that a method can be run to a fixed point that is known exactly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fewstep.config_file import parse
from fewstep.data.mixture import MixtureSet
from fewstep.diffusion.gaussian import GaussianMixture
from fewstep.diffusion.prediction import Kind
from fewstep.diffusion.process import Flow
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.families import Family
from fewstep.models.lora import Adapters
from fewstep.training.loop import TrainState, train
from fewstep.training.opening import Sources
from tests.training.runs import begin


class Gaussian(nn.Module):
    """On flow matching, x̂_0 = E[x_0 | x_t] of N(mean, diag(exp(log_std))²), the fake score of a linear student.

    At the times of `steps` it is that student instead: x̂_0 = mean + exp(log_std)·gain·x. A sampled time is none of
    them but by an accident of measure zero.
    """

    def __init__(self, dim: int, steps: tuple[float, ...] = (1.0,)) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.steps = steps
        self.first_gain: float | None = None

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        t, std = (timestep / 1000)[:, None], self.log_std.exp()
        alpha, sigma = 1 - t, t
        posterior = self.mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (sample - alpha * self.mean)
        student = self.mean + std * sample
        if self.first_gain is not None:
            student = torch.where(t == 1, self.first_gain * sample, student)
        at_step = torch.zeros_like(t, dtype=torch.bool)
        for time in self.steps:
            at_step |= t == time
        return (torch.where(at_step, student, posterior),)


def denoiser(network: nn.Module) -> NetworkDenoiser:
    """Any network of vectors that says x̂_0."""
    family = Family("network", "sample", lambda network: "")
    return NetworkDenoiser(network, family, Flow(), Kind.X0, None, Adapters(network))


def state_of(
    method: Mapping[str, object],
    student: nn.Module,
    teacher: NetworkDenoiser | GaussianMixture,
    data: GaussianMixture,
    /,
    **sections: Mapping[str, object],
) -> TrainState:
    """A run of `method` from `student`, in which nothing but the method decides where it ends."""
    values: dict[str, Mapping[str, object]] = {
        "run": {"dir": "run"},
        "method": method,
        "data": {"name": "mixture", "batch_size": 256},
        "train": {"ema": 0.9},
    }
    run = parse({**values, **{name: {**values.get(name, {}), **section} for name, section in sections.items()}})
    exact = teacher.denoiser(Flow()) if isinstance(teacher, GaussianMixture) else teacher
    return begin(run, Sources(MixtureSet(data), exact, denoiser(student)))


def finish(state: TrainState) -> None:
    """Train to the end."""
    for _ in train(state):
        pass
