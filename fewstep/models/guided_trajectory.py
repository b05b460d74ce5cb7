"""What a guided teacher says at states along its own trajectories, or at noised data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.solvers import TeacherSolver, step
from fewstep.diffusion.times import Law
from fewstep.models.conditioning import Condition
from fewstep.models.denoiser import NetworkDenoiser
from fewstep.models.guidance import Guided
from fewstep.models.guidance_input import with_guidance
from fewstep.rng import Rng


@dataclass(frozen=True)
class Taught:
    """The teacher's predictions at some states, and what it was told there.

    Attributes:
        prediction: the guided one; its `x_t` `(B, *)` and `t` `(B,)` are the states and their times.
        condition: of batch B.
        scale: the guidance scales `(B,)`.
    """

    prediction: Prediction
    condition: Condition
    scale: Tensor

    def gap(self, student: NetworkDenoiser) -> Tensor:
        """The student's prediction minus the teacher's, `(B, *)`, in the student's own parametrisation."""
        at, condition = self.prediction, with_guidance(self.condition, self.scale, student)
        return student(at.x_t, at.t, condition).as_kind(student.kind) - at.as_kind(student.kind)


@torch.no_grad()
def along_trajectories(guided: Guided, batch: Batch, steps: int, solver: TeacherSolver, rng: Rng) -> Taught:
    """All `steps` + 1 states of trajectories from pure noise, about as many states as the batch has samples.

    The fractions of the process's scale are 1 and (steps − i + u)/steps for i = 1 to steps, with one u a trajectory
    uniform in [0, 1): pure noise is always among them, and all other levels are as likely. Every evaluation of the
    teacher both moves a state and is a target, so that a target costs no more than at noised data.

    Several processes make the trajectories of one where `steps` + 1 divides the batch of each; else their number is
    rounded in each of them, and a run depends on how many processes there are.

    Args:
        guided: the teacher, with a range of scales; a trajectory has one.
        batch: every (`steps` + 1)th condition is a trajectory's, its samples only give their shape.
        steps: of the solver.
        solver: from one state to the next.
        rng: of scales, times and starting noise.
    """
    rows = slice(0, max(1, len(batch.x) // (steps + 1)) * (steps + 1), steps + 1)
    like, condition, process = batch.x[rows], batch.condition.rows(rows), guided.process
    teacher, u = guided.drawn(rng, len(like)), rng.uniform(len(like))
    x = process.prior(rng.normal(like))
    times = [process.times(process.t_max, x), *(process.at((steps - i + u) / steps) for i in range(1, steps + 1))]
    said = [teacher(x, times[0], condition)]
    for t in times[1:]:
        x = step(teacher, said[-1], t, condition, solver)
        said.append(teacher(x, t, condition))
    x_t, t, value = (torch.cat(parts) for parts in zip(*((p.x_t, p.t, p.value) for p in said), strict=True))
    states = Prediction(process, x_t, t, value, said[0].kind)
    return Taught(states, Condition.cat([condition] * len(said)), _scales(teacher).repeat(len(said)))


@torch.no_grad()
def at_noised_data(guided: Guided, batch: Batch, law: Law, rng: Rng) -> Taught:
    """At the batch's samples noised to times of `law`; `guided` has a range of scales."""
    teacher, t = guided.drawn(rng, len(batch.x)), law(rng.uniform(len(batch.x)))
    x_t = guided.process.add_noise(batch.x, rng.normal(batch.x), t)
    return Taught(teacher(x_t, t, batch.condition), batch.condition, _scales(teacher))


def _scales(drawn: Guided) -> Tensor:
    assert isinstance(drawn.scale, Tensor), "a teacher without a range of scales"
    return drawn.scale
