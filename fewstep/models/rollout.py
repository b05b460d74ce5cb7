"""How a student makes the sample it is judged by, and where gradient flows: through its last evaluation alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.diffusion.solvers import Denoiser
from fewstep.models.conditioning import STEP, Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.rng import Rng


@dataclass(frozen=True)
class Rolled:
    """Clean estimates of a student.

    Attributes:
        x: `(B, *)` x̂, with the gradient of the last evaluation.
        step: which of the student's steps made them, counted from 0.
    """

    x: Tensor
    step: int

    def told(self, condition: Condition, judge: NetworkDenoiser) -> Condition:
        """The condition with the step that made the samples, for a judge that has an input for it."""
        if STEP not in judge.graft.names:
            return condition
        return condition.with_scalar(STEP, torch.full((len(self.x),), float(self.step), device=self.x.device))


def hears_step(judge: NetworkDenoiser) -> NetworkDenoiser:
    """The same judge with an input for the step that made what it sees; equal to the given one until trained.

    Of several steps' samples together only the mixture would have to look right, and each step could keep to some of
    the modes.
    """
    return judge.with_scalar(STEP)


def backward_simulation(
    student: Denoiser, times: Sequence[float], like: Tensor, condition: Condition, rng: Rng
) -> Rolled:
    """Estimates at a step drawn for the whole batch, reached by the student's own earlier steps (DMD2, section 4.5)."""
    last = rng.integer(len(times))
    return Rolled(last_estimate(student, times[: last + 1], like, condition, rng), last)


def last_estimate(student: Denoiser, times: Sequence[float], like: Tensor, condition: Condition, rng: Rng) -> Tensor:
    """x̂ `(B, *)` of the last of `times`, from noise of the shape of `like` `(B, *)`.

    Every earlier step estimates x̂_0 without gradient and re-noises it with fresh noise at the next of `times`, so
    the last evaluation sees what it will see when sampling, and its noise is uncorrelated with the sample's past.
    """
    x = student.process.prior(rng.normal(like), times[0])
    with torch.no_grad():
        for now, following in pairwise(times):
            x0 = student(x, student.process.times(now, x), condition).x0
            x = student.process.add_noise(x0, rng.normal(like), student.process.times(following, x))
    return student(x, student.process.times(times[-1], x), condition).x0


def from_noised_data(student: Denoiser, times: Sequence[float], x0: Tensor, condition: Condition, rng: Rng) -> Rolled:
    """Estimates at a step drawn for the whole batch, from noised data; the first step starts from pure noise.

    Cheaper than backward simulation, but later steps then never see the student's own samples.
    """
    step = rng.integer(len(times))
    t, noise = student.process.times(times[step], x0), rng.normal(x0)
    x = student.process.add_noise(x0, noise, t) if step else student.process.prior(noise, times[0])
    return Rolled(student(x, t, condition).x0, step)


def one_step(student: Denoiser, time: float, noise: Tensor, condition: Condition) -> Tensor:
    """x̂ `(B, *)` by one evaluation at `time`, the noise end, from given unit noise `(B, *)`."""
    x = student.process.prior(noise, time)
    return student(x, student.process.times(time, x), condition).x0
