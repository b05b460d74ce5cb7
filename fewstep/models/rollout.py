"""How a student makes the sample it is judged by, and where gradient flows: through its last evaluation alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.diffusion.solvers import Denoiser
from fewstep.models.conditioning import Condition
from fewstep.rng import Rng


def backward_simulation(
    student: Denoiser, times: Sequence[float], like: Tensor, condition: Condition, rng: Rng
) -> Tensor:
    """x̂ `(B, *)` at a step drawn for the whole batch, reached by the student's own earlier steps (DMD2, section 4.5).

    Every earlier step estimates x̂_0 without gradient and re-noises it with fresh noise at the next of `times`, so
    the last evaluation sees what it will see when sampling, and its noise is uncorrelated with the sample's past.
    """
    last = rng.integer(len(times))
    x = student.process.prior(rng.normal(like), times[0])
    with torch.no_grad():
        for now, following in pairwise(times[: last + 1]):
            x0 = student(x, student.process.times(now, x), condition).x0
            x = student.process.add_noise(x0, rng.normal(like), student.process.times(following, x))
    return student(x, student.process.times(times[last], x), condition).x0


def from_noised_data(student: Denoiser, times: Sequence[float], x0: Tensor, condition: Condition, rng: Rng) -> Tensor:
    """x̂ `(B, *)` at a step drawn for the whole batch, from noised data; the first step starts from pure noise.

    Cheaper than backward simulation, but later steps then never see the student's own samples.
    """
    step = rng.integer(len(times))
    t, noise = student.process.times(times[step], x0), rng.normal(x0)
    x = student.process.add_noise(x0, noise, t) if step else student.process.prior(noise, times[0])
    return student(x, t, condition).x0


def one_step(student: Denoiser, time: float, noise: Tensor, condition: Condition) -> Tensor:
    """x̂ `(B, *)` by one evaluation at `time`, the noise end, from given unit noise `(B, *)`."""
    x = student.process.prior(noise, time)
    return student(x, student.process.times(time, x), condition).x0
